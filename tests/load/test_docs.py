"""docs/bench.md tells every flag and every kind of violation there is."""

import inspect
from pathlib import Path

from tokenworks.cli.bench import bench
from tokenworks.load.check import KINDS

DOC = (Path(__file__).parents[2] / "docs/bench.md").read_text()


def test_every_flag_is_told() -> None:
    names = [name for name in inspect.signature(bench).parameters if name != "trace"]
    flags = [f"--{name.replace('_', '-')}" for name in names]
    assert [flag for flag in [*flags, "--whole"] if f"`{flag}" not in DOC] == []


def test_every_violation_is_told() -> None:
    assert [kind for kind in KINDS if f"`{kind}`" not in DOC] == []
