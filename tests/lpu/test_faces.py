"""The commands, the picture of a schedule, and the docs that are made from tables."""

import json
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from playwright.sync_api import Browser, expect

from tests.lpu import made
from tests.support import run
from tests.web.conftest import chromium
from tokenworks.lpu import isa, program
from tokenworks.lpu.timing import timing, token_cycles
from tokenworks.model.tokens import _LETTERS, Vocabulary
from tokenworks.report import lpu_trace

__all__ = ["chromium"]
DOC = Path(__file__).parents[2] / "docs/lpu.md"
WORDS = Vocabulary(
    tokens=(*_LETTERS.values(), *(f"w{n}" for n in range(made.SIZES.vocab - 257)), "<|end|>"),
    merges=(),
    controls=(made.SIZES.vocab - 1,),
    digit_by_digit=False,
    end=made.SIZES.vocab - 1,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpu") / "made.lpu"
    loaded = replace(made.loaded(2, 640), tokenizer=msgspec.msgpack.encode(WORDS))
    path.write_bytes(program.encode(loaded))
    return path


def test_run_answers_with_exact_cycles(file: Path) -> None:
    asked = ("lpu", "run", str(file), "--prompt", "abc", "--max-tokens", "4")
    done = run(*asked, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    full = token_cycles(made.loaded(2, 640).program, 0)
    short = token_cycles(made.loaded(2, 640).program, 0, with_scores=False)
    assert said["prompt_tokens"] == 3
    assert said["prompt_cycles"] == 2 * short + full
    assert said["cycles_by_token"] == [full] * (said["output_tokens"] - 1)
    plain = run(*asked)
    assert f"{said['cycles']:,} cycles" in plain.stdout
    assert "on the chip this took" in plain.stdout


def test_a_prompt_longer_than_the_program_is_one_line(file: Path) -> None:
    done = run("lpu", "run", str(file), "--prompt", "x" * 700)
    assert done.returncode == 2
    assert "contexts of up to 640 tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_program_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.lpu"
    bad.write_bytes(b"nothing")
    done = run("lpu", "run", str(bad), "--prompt", "x")
    assert done.returncode == 2
    assert "bad.lpu is no LPU program" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    done = run("lpu", "compile", str(bad), "--out", str(tmp_path / "x.lpu"))
    assert done.returncode == 2
    assert "not a usable GGUF file" in done.stderr


def test_explain_tells_where_the_cycles_go(file: Path) -> None:
    said = json.loads(run("lpu", "explain", str(file), "--json").stdout)
    found = timing(made.loaded(2, 640).program, 0)
    assert said["timing"]["cycles"] == found.cycles
    assert said["chips"] == 2
    assert "softmax" in run("lpu", "explain", str(file)).stdout


def test_trace_writes_a_page_and_json_with_every_instruction(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.html"
    done = run("lpu", "trace", str(file), "--out", str(out), "--disassemble")
    assert done.returncode == 0, done.stderr
    events = json.loads(out.with_suffix(".json").read_bytes())["traceEvents"]
    segments = [s for part in made.loaded(2, 640).program.parts for s in part.buckets[0].segments]
    count = sum(len(s.instructions) for s in segments)
    drawn = [event for event in events if event["ph"] == "X"]
    assert len(drawn) >= count
    assert "ACC" in done.stdout


def test_the_trace_keeps_to_the_format_that_perfetto_reads() -> None:
    """Its documented rules (docs/getting-started/other-formats.md and the Trace Event Format)."""
    program = made.loaded(2, 640).program
    events = json.loads(lpu_trace.chrome(program, 0))["traceEvents"]
    by_thread: dict[tuple[int, int], list[tuple[int, int]]] = {}
    named: dict[str, dict[tuple[int, int], str]] = {}
    for event in events:
        where = event["pid"], event["tid"]
        assert all(type(number) is int and number >= 0 for number in where)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            named.setdefault(event["name"], {})[where] = event["args"].get("name", "")
            continue
        assert event["ph"] == "X"
        assert event["name"] in isa.OPS
        assert isinstance(event["cat"], str)
        assert type(event["ts"]) is type(event["dur"]) is int
        assert event["dur"] > 0
        by_thread.setdefault(where, []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(by_thread) == set(named["thread_name"]) == set(named["thread_sort_index"])
    assert len({(pid, name) for (pid, _), name in named["thread_name"].items()}) == len(by_thread)
    assert [pid for pid, _ in named["process_name"]] == [0, 1]
    # Complete events of a thread come in order and nest; here none overlaps another at all.
    for times in by_thread.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(times))
    assert max(end for times in by_thread.values() for _, end in times) <= token_cycles(program, 0)


@pytest.fixture
def picture(chromium: Browser, tmp_path: Path) -> tuple[Browser, Path]:
    path = tmp_path / "trace.html"
    path.write_text(lpu_trace.page(made.loaded(2, 640).program, 0), "utf-8")
    return chromium, path


@pytest.mark.browser
def test_the_picture_shows_in_a_browser(picture: tuple[Browser, Path]) -> None:
    browser, path = picture
    page = browser.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(path.as_uri())
    expect(page.get_by_role("heading", level=2)).to_have_count(5)
    bar = page.locator("rect").first
    box = bar.bounding_box()
    assert box is not None
    assert box["height"] > 4
    picture_of = page.get_by_role("img").nth(0)
    before = picture_of.bounding_box()
    page.get_by_label("Width of a cycle").fill("2")
    after = picture_of.bounding_box()
    assert before is not None
    assert after is not None
    assert after["width"] > before["width"]
    assert not told
    page.close()


def test_the_docs_table_is_the_instruction_set() -> None:
    assert isa.table() in DOC.read_text()


def test_every_instruction_is_used_or_said_to_be_unused() -> None:
    used = {
        each.op
        for part in made.loaded(2, 640).program.parts
        for bucket in part.buckets
        for segment in bucket.segments
        for each in segment.instructions
    }
    assert used == set(isa.OPS)
