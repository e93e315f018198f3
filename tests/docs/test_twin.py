"""docs/twin.md and docs/scheduler.md name every key, command and stage that there is."""

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT, blocks
from tests.support import run
from tokenworks.engine.work import Limits
from tokenworks.sched.config import CLASSES, ClassRules, Policy, Router, ScaleRules
from tokenworks.sched.job import Stage
from tokenworks.twin.scenario import (
    CapChange,
    Chance,
    Fault,
    Pool,
    PowerRules,
    PriceChange,
    Scenario,
)
from tokenworks.workload import Share, names

TWIN = (ROOT / "docs/twin.md").read_text()
SCHEDULER = (ROOT / "docs/scheduler.md").read_text()
RECORDS = (
    Scenario, Pool, Limits, ClassRules, Policy, ScaleRules, Share, Fault, Chance, PowerRules,
    CapChange, PriceChange,
)  # fmt: skip


def test_every_key_of_a_scenario_is_told() -> None:
    keys = {key for record in RECORDS for key in record.__struct_fields__}
    assert {key for key in keys if f"`{key}`" not in TWIN} == set()


@pytest.mark.parametrize("record", [Limits, ScaleRules, Policy], ids=lambda r: str(r.__name__))
def test_the_defaults_told_are_the_defaults(record: type[Limits | ScaleRules | Policy]) -> None:
    told = dict(re.findall(r"`(\w+)` \(([\w.]+)[):]", TWIN))
    found = record()
    words = {True: "true", False: "false", None: "none"}
    for key in record.__struct_fields__:
        value = getattr(found, key)
        if key == "kv_blocks":
            continue  # what fits
        shown = words[value] if value is None or isinstance(value, bool) else value
        assert told[key] == (f"{shown:g}" if isinstance(shown, float) else str(shown)), key


def test_every_workload_and_route_is_told() -> None:
    assert {name for name in names() if f"`{name}`" not in TWIN} == set()
    routes = Router.__args__  # type: ignore[attr-defined]
    assert {name for name in (*routes, *CLASSES) if f"`{name}`" not in SCHEDULER} == set()


def test_the_stages_told_are_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", SCHEDULER, re.MULTILINE)
    told = {stage: re.findall(r"`(\w+)`", after) for stage, after in rows}
    assert told == {s.value: [each.value for each in s.after] for s in Stage if s.after}


def test_the_first_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = re.search(r"^    tokenworks (replay azure-.*)$", TWIN, re.MULTILINE)
    assert command is not None
    words = [
        str(ROOT / word) if word.endswith(".toml") else word for word in shlex.split(command[1])
    ]
    done = run(*words, "--requests", "200", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 1_000_000


def test_the_workload_shown_runs(tmp_path: Path) -> None:
    (shown,) = blocks(TWIN, "toml")
    file = tmp_path / "workload.toml"
    file.write_text(shown)
    fleet = str(ROOT / "examples/scenarios/8xh100.toml")
    out = str(tmp_path / "out")
    done = run("replay", str(file), "--fleet", fleet, "--requests", "300", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "300" in done.stdout
    file.write_text(shown.replace("cv = 2.0", "cv = -2.0"))
    done = run("replay", str(file), "--fleet", fleet, "--out", out)
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert "arrivals.cv" in done.stderr
