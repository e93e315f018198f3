"""docs/batches.md says what is."""

import re
import subprocess
import sys
from pathlib import Path

import msgspec

from tests.docs.test_docs import ROOT, blocks
from tests.gateway.batch_factory import factory
from tests.gateway.test_batch import line
from tokenworks.gateway.batch import BatchSettings
from tokenworks.gateway.batch.store import AFTER

PAGE = (ROOT / "docs/batches.md").read_text()


def test_the_program_runs(tmp_path: Path) -> None:
    (program,) = blocks(PAGE, "python")
    (tmp_path / "requests.jsonl").write_bytes(line(1) + line(2))
    with factory(tmp_path / "ledger") as live:
        program = program.replace("http://127.0.0.1:8000", live.url).replace("…", "alice")
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert re.findall(r'"custom_id":"(line-\d)"', done.stdout) == ["line-1", "line-2"]


def test_the_settings_shown_are_the_defaults() -> None:
    (shown,) = blocks(PAGE, "toml")
    batches = msgspec.toml.decode(shown)["batches"]
    assert set(batches) == set(BatchSettings.__struct_fields__)
    assert msgspec.convert(batches, BatchSettings) == BatchSettings()


def test_the_life_of_a_batch_is_the_table() -> None:
    shown = {
        before: tuple(re.findall(r"`(\w+)`", after))
        for before, after in re.findall(
            r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", PAGE, re.MULTILINE
        )
    }
    assert shown == {before: after for before, after in AFTER.items() if after}


def test_every_fault_of_a_file_is_listed() -> None:
    sources = (ROOT / "src/tokenworks/gateway/batch").glob("*.py")
    codes = {
        code for file in sources for code in re.findall(r'Fault\(\s*"(\w+)"', file.read_text())
    }
    assert "duplicate_custom_id" in codes
    assert {code for code in codes if f"`{code}`" not in PAGE} == set()
