"""The layer contracts hold, and they bite: a planted import breaks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint(folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(folder / "src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        (None, "", ""),
        ("catalog/models.py", "import tokenworks.gateway.server", "Layers"),
        ("gateway/app.py", "import tokenworks.web", "Layers"),
        ("assets/store.py", "import tokenworks.cli", "Layers"),
        ("model/gguf.py", "import time", "pure core"),
        ("catalog/models.py", "import random", "pure core"),
        ("model/gguf.py", "import asyncio", "pure core"),
        ("gateway/server.py", "import xllamacpp", "engine library"),
        ("assets/store.py", "import uvloop", "HTTP server"),
        ("gateway/app.py", "import rich", "terminal"),
        ("load/run.py", "import rich", "terminal"),
        ("load/run.py", "import tokenworks.gateway.framing", "Layers"),
        ("nowhere/__init__.py", "", "Layers"),
    ],
)
def test_contracts(tmp_path: Path, file: str | None, line: str, contract: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src")
    if file is not None:
        planted = tmp_path / "src/tokenworks" / file
        planted.parent.mkdir(exist_ok=True)
        with planted.open("a") as module:
            module.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert (done.returncode == 0) is (file is None), done.stdout + done.stderr
    if contract:
        broken = [row for row in done.stdout.splitlines() if "BROKEN" in row]
        told = done.stdout + done.stderr
        assert any(contract in row for row in broken) or "nowhere" in told
