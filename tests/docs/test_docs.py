"""The documents say what is: every command and every setting in them is run or compared."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import Running
from tokenworks.gateway.gateway import Limits
from tokenworks.gateway.settings import EngineSettings, Settings, load

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
    every = {*Settings.__struct_fields__, *EngineSettings.__struct_fields__}
    assert named == (every | set(Limits.__struct_fields__)) - {"engine", "limits"}


def test_every_error_code_is_documented() -> None:
    sources = (ROOT / "src/tokenworks/gateway").rglob("*.py")
    codes = {code for source in sources for code in re.findall(r'code="(\w+)"', source.read_text())}
    assert "engine_lost" in codes
    assert {code for code in codes if f"`{code}`" not in GATEWAY} == set()


def test_every_file_the_documents_name_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
