"""The documents say what is: every command and every setting in them is run or compared."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import Running
from tokenworks.gateway.allowance import TenantSettings
from tokenworks.gateway.batch.settings import BatchSettings
from tokenworks.gateway.energy.meters import MeterSettings
from tokenworks.gateway.limits import Limits
from tokenworks.gateway.refusals import _CODES, _WHY
from tokenworks.gateway.settings import (
    EngineSettings,
    LedgerSettings,
    PoolSettings,
    PowerSettings,
    Settings,
    WatchSettings,
    load,
)
from tokenworks.gateway.stage import Stage
from tokenworks.sched.config import ClassRules, Policy, ScaleRules
from tokenworks.sched.prior import Prior

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GATEWAY = (ROOT / "docs/gateway.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


@pytest.mark.engine
def test_the_readmes_client_runs(live_gateway: Running) -> None:
    (program,) = blocks(README, "python")
    program = program.replace("http://127.0.0.1:8000", live_gateway.url)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip()


@pytest.mark.engine
def test_the_readmes_transcript_is_real(live_gateway: Running) -> None:
    (shown,) = blocks(README, "text")
    command = re.search(r"\$ (curl .*?\}'\n)", shown, re.DOTALL)
    assert command is not None
    asked = command[1].replace("http://127.0.0.1:8000", live_gateway.url)
    done = subprocess.run(
        ["sh", "-c", asked], capture_output=True, text=True, timeout=120, check=True
    )
    answer = json.loads(done.stdout)
    said = re.search(r'"content":"([^"]*)"', shown)
    assert said is not None
    assert answer["choices"][0]["message"]["content"] == said[1]
    assert f'"prompt_tokens":{answer["usage"]["prompt_tokens"]}' in shown
    assert f'"completion_tokens":{answer["usage"]["completion_tokens"]}' in shown


def test_the_settings_shown_are_the_defaults(tmp_path: Path) -> None:
    (shown,) = blocks(GATEWAY, "toml")
    file = tmp_path / "factory.toml"
    file.write_text(shown)
    assert load(file, {}) == Settings()
    named = set(re.findall(r"^(?:# )?(\w+) =", shown, re.MULTILINE))
    tables = (EngineSettings, Limits, Policy, PowerSettings, LedgerSettings, BatchSettings)
    every = {key for table in (*tables, WatchSettings) for key in table.__struct_fields__}
    headed = set(re.findall(r"^\[(\w+)\]", shown, re.MULTILINE))
    told = {"pools", "classes", "tenants"}  # below
    assert named | headed == every | set(Settings.__struct_fields__) - told


@pytest.mark.parametrize(
    "record", [PoolSettings, ClassRules, ScaleRules, MeterSettings, Prior, TenantSettings]
)
def test_every_setting_of_pools_classes_and_tenants_is_told(record: type[Any]) -> None:
    assert {key for key in record.__struct_fields__ if f"`{key}`" not in GATEWAY} == set()


def test_every_error_code_is_documented() -> None:
    sources = (ROOT / "src/tokenworks/gateway").rglob("*.py")
    codes = {code for source in sources for code in re.findall(r'code="(\w+)"', source.read_text())}
    codes |= set(_WHY) - set(_CODES)
    assert "engine_lost" in codes
    assert {code for code in codes if f"`{code}`" not in GATEWAY} == set()


def test_every_file_the_documents_name_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_stages_of_an_exchange_are_the_table() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    table = page.partition("An exchange's stages")[2].partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    told = {stage: re.findall(r"`(\w+)`", after) for stage, after in rows}
    assert told == {s.value: [each.value for each in s.after] for s in Stage if s.after}


def test_every_module_of_the_gateway_is_on_the_map() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for source in (ROOT / "src/tokenworks/gateway").iterdir():
        name = f"{source.name}/" if source.is_dir() else source.name
        if name not in ("__init__.py", "__pycache__/", "gateway.py", "telemetry.py", "demo.toml"):
            assert name in page, name
