"""The processor at hand: measured with the real engine, kept, and refused where it is broken."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support import MODEL, run, wait_for
from tokenworks.assets import host, store
from tokenworks.catalog.book import catalog
from tokenworks.catalog.models import model
from tokenworks.cost import Batch, Chunk, place, prepare
from tokenworks.errors import UserError
from tokenworks.gateway.embedded import measure
from tokenworks.model import library
from tokenworks.model.precision import BYTES

LINES = """
flops.bf16 = {value = 5e10, grade = "measured", source = "a test"}
flops.fp32 = {value = 5e10, grade = "measured", source = "a test"}
memory.ddr.bytes = {value = 2e10, grade = "measured", source = "a test"}
memory.ddr.bytes_per_s = {value = 1e10, grade = "measured", source = "a test"}
units.cores = {value = 4, grade = "measured", source = "a test"}
"""
RECORD = f"""
[processor.cpu]
title = "TITLE"
kind = "cpu"
{LINES}
{host.power(catalog(), 4, "a test")}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, but for the model."""
    file = store.ensure(model(MODEL))
    folder = tmp_path / "cache"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / file.name).symlink_to(file)
    monkeypatch.setenv("TOKENWORKS_CACHE", str(folder))
    return folder


def kept(text: str) -> None:
    host.path().parent.mkdir(parents=True, exist_ok=True)
    host.path().write_text(text)


def mine() -> str:
    """A record that could be of this machine."""
    return RECORD.replace("TITLE", measure._title())


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.engine
def test_what_is_measured_is_a_whole_record_and_kept(cache: Path) -> None:
    said: list[str] = []
    before = children()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    book = host.with_power(measure.with_cpu(catalog(), False, said.append))
    assert children() == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert any("Measuring this processor" in line for line in said)
    assert sum("tokens/s" in line for line in said) == 2
    record = book.processor("cpu")
    assert record.kind == "cpu"
    assert record.title == measure._title()
    assert record.names("memory") == ("ddr",)
    for path, number in record.numbers.items():
        assert number.value > 0, path
        assert number.grade == ("assumed" if path == "tdp_w" else "measured"), path
        assert number.source.startswith("tokenworks, 2"), path
        assert number.note, path
    assert host.path() == cache / "processors" / "cpu.toml"
    assert [path.name for path in host.path().parent.iterdir()] == ["cpu.toml"]
    said.clear()
    assert host.with_power(measure.with_cpu(catalog(), False, said.append)) == book
    assert said == []


@pytest.mark.engine
def test_the_command_measures_again_when_asked(cache: Path) -> None:
    kept("broken")  # is not read
    done = run("catalog", "CPU", "--measure")
    assert done.returncode == 0, done.stderr
    assert "Measuring this processor" in done.stderr
    raw = host.kept()
    assert raw is not None
    host.check(raw)


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["starting", "measuring"])
def test_an_interrupted_measurement_leaves_nothing(
    cache: Path, number: signal.Signals, when: str
) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short enough for a socket file
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenworks", "catalog", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    parent = psutil.Process(process.pid)
    wait_for(lambda: bool(parent.children() if when == "starting" else [*folder.glob("*/*.sock")]))
    engines = parent.children(recursive=True)
    assert engines
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "tokenworks: interrupted"
    assert "Traceback" not in said
    assert not any(engine.is_running() for engine in engines)
    folder.rmdir()  # nothing is in it
    assert not host.path().parent.exists()


@pytest.mark.engine
def test_an_engine_that_cannot_start_is_one_readable_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = store.ensure(model(MODEL))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[: 1 << 25])
    monkeypatch.setattr(store, "ensure", lambda *_: cut)
    header = store.read_header(whole)
    monkeypatch.setattr(store, "read_header", lambda _: header)
    before = children()
    with pytest.raises(UserError, match=r"the engine could not load .*cut\.gguf"):
        measure.record(lambda _: None)
    assert children() == before


def test_a_kept_record_is_used_as_it_is(cache: Path) -> None:
    kept(mine())
    before = host.path().read_bytes()
    done = run("cost", "smollm2-135m", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "processor.cpu.memory.ddr.bytes_per_s" in json.loads(done.stdout)["numbers"]
    assert host.path().read_bytes() == before
    assert json.loads(done.stdout)["usd_per_mtok"] is None
    shown = run("catalog", "cpu").stdout
    assert "processor.cpu" in shown
    assert "fit.cpu" in shown
    drafted = run(
        *("cost", "llama-3.1-8b", "h100", "--draft-on", "cpu", "--draft-model", "smollm2-135m")
    )
    assert drafted.returncode == 0, drafted.stderr
    # Nobody else sees it.
    assert "cpu" not in run("catalog").stdout.split()


@pytest.mark.parametrize("precision", sorted(BYTES))
def test_every_precision_can_be_asked_for(precision: str) -> None:
    book = catalog().with_user(mine().encode(), "cpu.toml")
    shape = library.shape("smollm2-135m")
    prepared = prepare(shape, place(book, shape, "cpu", weights=precision), book)
    assert prepared.step(Batch.of(1, 64)).time_ps > 0
    assert prepared.step(Batch((), (Chunk(64),))).time_ps > 0


def test_watts_follow_the_assumptions_and_the_users_own() -> None:
    book = catalog().with_user(mine().encode(), "cpu.toml")
    shape = library.shape("smollm2-135m")

    def watts(*assignments: str) -> float:
        changed = book
        for assignment in assignments:
            changed = changed.with_set(assignment)
        changed = host.with_power(changed)
        return prepare(shape, place(changed, shape, "cpu"), changed).power_w

    per_core = catalog().assumed("cpu_w_per_core").value
    assert watts() == pytest.approx(4 * per_core)
    assert watts("assumption.cpu_w_per_core=10") == pytest.approx(40)
    assert watts("assumption.idle_fraction=0.5") == pytest.approx(4 * per_core)
    assert watts("processor.cpu.tdp_w=33") == pytest.approx(33)
    assert watts("processor.cpu.tdp_w=33", "processor.cpu.idle_w=40") == pytest.approx(40)
    assert watts("processor.cpu.idle_w=3", "fit.cpu.active_w=4") == pytest.approx(7)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no processor 'cpu'"),
        ("[processor.cpu", "is not valid TOML"),
        ("\0", "is not valid TOML"),
        (f"[processor.cpu]\nkind = 'gpu'\n{LINES}\ntdp_w = 20", "kind is not 'cpu'"),
        (RECORD.replace("5e10", "'fast'"), "flops.bf16: Expected"),
        (RECORD.replace("5e10", "nan"), "flops.bf16 is nan"),
        (RECORD.replace("5e10", "0"), "flops.bf16 is 0"),
        (RECORD.replace("flops.fp32", "flops.fp64"), "flops.fp32 is missing"),
        (RECORD.replace("units.cores", "units.core"), "units.cores is missing"),
        (RECORD.replace("tdp_w", "tpd_w"), "'tpd_w'"),
        (RECORD.replace("active_w", "idle_w"), "idle_w"),
    ],
)
def test_a_broken_file_is_named_with_the_remedy(cache: Path, text: str, told: str) -> None:
    kept(text)
    with pytest.raises(UserError) as caught:
        host.kept()
    assert told in caught.value.message
    assert str(host.path()) in caught.value.message
    assert "tokenworks catalog cpu --measure" in caught.value.remedy


def test_a_file_that_is_none_is_told_by_the_command(cache: Path) -> None:
    host.path().mkdir(parents=True)
    refused = run("cost", "smollm2-135m", "cpu")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert f"cannot read {host.path()}" in refused.stderr


def test_another_processors_record_is_not_taken(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(RECORD.replace("TITLE", "Another One, 96 threads"))
    monkeypatch.setattr(measure, "record", lambda _: mine().encode())
    said: list[str] = []
    found = measure.with_cpu(catalog(), False, said.append)
    assert found.processor("cpu").title == measure._title()
    assert "Another One" in said[0]
    assert host.path().read_text() == mine()


def test_a_record_is_kept_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.keep(b"first")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        host.keep(b"second")
    assert host.path().read_bytes() == b"first"
    assert [path.name for path in host.path().parent.iterdir()] == ["cpu.toml"]
    with tempfile.NamedTemporaryFile() as file:
        monkeypatch.setenv("TOKENWORKS_CACHE", file.name)
        with pytest.raises(UserError, match="TOKENWORKS_CACHE"):
            host.keep(b"third")


def test_measure_is_for_this_processor_only() -> None:
    refused = run("catalog", "h100", "--measure")
    assert refused.returncode == 2
    assert "tokenworks catalog cpu --measure" in refused.stderr
