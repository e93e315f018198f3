"""Every request ends in exactly one row, whatever happens to the gateway or its disk."""

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tokenworks.errors import UserError
from tokenworks.gateway.ledger import Ledger, LedgerError, Row, journal, table
from tokenworks.gateway.ledger.journal import Admitted, Amended

DAY_NS = 86_400 * 10**9
NOW_NS = 1_780_000_000 * 10**9


def row(identity: str, **more: Any) -> Row:
    return Row(identity, more.pop("unix_ns", time.time_ns()), **more)


def admit(ledger: Ledger, identity: str) -> None:
    ledger.admit(identity, NOW_NS, "acme", "k1", "m", "/v1/completions", "realtime")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with_ledger = opened(tmp_path / "state")
    yield with_ledger
    with_ledger.close()


def opened(folder: Path, **more: Any) -> Ledger:
    found = Ledger(folder, **{"keep_days": 30.0, **more})
    found.open()
    return found


def after_a_kill(ledger: Ledger) -> dict[str, Row]:
    """What a gateway finds that starts on this folder, as it is at this moment."""
    folder = ledger.books.path.parent
    copy = folder.parent / f"{folder.name}-copy"
    # In the writer's thread, which otherwise would go on meanwhile.
    ledger.books.wait(lambda _: shutil.copytree(folder, copy))
    found = opened(copy)
    rows = {one.id: one for one in everything(found)}
    found.close()
    shutil.rmtree(copy)
    return rows


def everything(ledger: Ledger) -> list[Row]:
    return ledger.books.wait(lambda connection: list(table.rows(connection)))


def soon(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.002)


ROWS = st.builds(
    Row,
    st.uuids().map(str),
    st.integers(NOW_NS, NOW_NS + 3 * DAY_NS),
    tenant=st.sampled_from(["", "acme", "globex"]),
    key=st.sampled_from(["", "k1", "k2"]),
    model=st.sampled_from(["m1", "ünï'\n\"", "\x00"]),
    service_class=st.sampled_from(["realtime", "standard"]),
    outcome=st.sampled_from(["finished", "rejected", "cancelled", "failed"]),
    prompt_tokens=st.integers(0, 2**40),
    cached_tokens=st.integers(0, 9),
    output_tokens=st.integers(0, 9),
    counted=st.booleans(),
    ttft_ns=st.integers(-1, 50),
    total_ns=st.integers(50, 2**62),
    promise_ttft_ns=st.integers(-1, 50),
    energy_j=st.floats(0, 1e9),
    usd=st.floats(0, 1e3),
    hedged=st.booleans(),
)
RECORDS = st.one_of(
    ROWS,
    st.builds(Amended, st.text(), st.floats(0, 1), st.just("measured")),
    st.builds(Admitted, st.text(), st.integers(0, 2**62), *[st.text()] * 5),
)


# The journal


@given(st.lists(st.lists(RECORDS, min_size=1, max_size=3), max_size=5), st.data())
def test_of_a_torn_journal_whole_frames_are_left(
    tmp_path_factory: pytest.TempPathFactory, frames: list[list[Any]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("torn") / "segment"
    whole = b"".join(journal._frame(frame) for frame in frames)
    cut = data.draw(st.integers(0, len(whole)))
    rest = data.draw(st.sampled_from([b"", b"\0" * 40, b"00000004 00000000\nnull", whole[:30]]))
    torn = whole[:cut] + rest
    path.write_bytes(torn)
    found: list[Any] = []
    with path.open("rb") as file:
        start = -1
        after = 0
        while after > start:
            start = after
            lines, after = journal.read(file.fileno(), start, len(torn), 64)
            found += journal.decode(lines) if lines else []
    told, size = [], 0
    for frame in frames:
        size += len(journal._frame(frame))
        if size <= cut:
            told += frame
    # What follows the cut can only be what completes it: the same frames again.
    assert found[: len(told)] == told
    if not rest:
        assert found == told


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    frame = bytearray(journal._frame([row("a", energy_j=1.5)]))
    path = tmp_path / "segment"
    for at in set(range(len(frame))) - {8, 17}:  # what separates says nothing
        frame[at] ^= 4
        path.write_bytes(frame)
        with path.open("rb") as file:
            assert journal.read(file.fileno(), 0, len(frame), 1000) == (b"", 0)
        frame[at] ^= 4


# The ledger


def test_what_ended_can_be_read_at_once_and_after_a_restart(tmp_path: Path) -> None:
    one = opened(tmp_path)
    admit(one, "a")
    one.flush()
    ended = row("a", energy_j=0.1 + 0.2, hedged=True, counted=False, total_ns=2**62)
    one.end(ended)
    refused = row("b", outcome="rejected", status=429, reason="no_room")
    one.end(refused)  # was never admitted
    assert one.receipt("a") == ended
    one.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.sqlite", "lock"]
    other = opened(tmp_path)
    assert other.receipt("a") == ended
    assert other.receipt("b") == refused
    assert other.receipt("c") is None
    other.close()


def test_a_restart_closes_what_was_under_way(ledger: Ledger, tmp_path: Path) -> None:
    for identity in ("a", "b"):
        admit(ledger, identity)
    ledger.admit("c", NOW_NS, "", "", "m", "/v1/completions", "batch", batch="batch_1")
    ledger.flush()
    ledger.end(row("b"))
    ledger.flush()
    admit(ledger, "never flushed, so never dispatched")
    found = after_a_kill(ledger)
    assert set(found) == {"a", "b"}  # a batch's line is run again: it has no end yet
    assert found["b"].outcome == "finished"
    orphan = found["a"]
    assert (orphan.outcome, orphan.reason) == ("failed", "gateway_restart")
    assert (orphan.unix_ns, orphan.tenant, orphan.key) == (NOW_NS, "acme", "k1")
    assert orphan.service_class == "realtime"


def test_the_first_end_counts(ledger: Ledger, tmp_path: Path) -> None:
    for tokens in (1, 2):
        ledger.end(row("a", output_tokens=tokens))
        ledger.flush()
    assert after_a_kill(ledger)["a"].output_tokens == 1


def test_energy_comes_later(ledger: Ledger, tmp_path: Path) -> None:
    ledger.end(row("a", energy_j=1.0, energy_grade="modelled"))
    ledger.flush()
    soon(lambda: len(everything(ledger)) == 1)
    ledger.amend("a", 2.0, "measured")
    ledger.end(row("b"))
    ledger.amend("b", 3.0, "measured")
    ledger.amend("b", 4.0, "measured")
    ledger.flush()
    for find in (after_a_kill(ledger).__getitem__, ledger.receipt):
        for identity, energy_j in (("a", 2.0), ("b", 4.0)):
            found = find(identity)
            assert found is not None
            assert (found.energy_j, found.energy_grade) == (energy_j, "measured")


def test_numbers_that_json_does_not_have(ledger: Ledger, tmp_path: Path) -> None:
    ledger.end(row("a", energy_j=float("nan"), usd=1.0))
    ledger.end(row("b", energy_j=2.0))
    ledger.amend("b", float("nan"), "measured")
    ledger.end(row("c", energy_j=np.float64(0.1), prompt_tokens=np.int64(7)))
    ledger.flush()
    found = after_a_kill(ledger)
    assert (found["c"].energy_j, found["c"].prompt_tokens) == (0.1, 7)
    assert (found["a"].energy_j, found["a"].usd, found["b"].energy_j) == (0.0, 1.0, 0.0)


def test_segments_go_when_they_are_settled_and_carry_on_what_runs(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    ledger = opened(folder, segment_bytes=5000)
    admit(ledger, "long")
    for number in range(2000):
        admit(ledger, str(number))
        ledger.flush()
        ledger.end(row(str(number)))
        ledger.flush()
    soon(lambda: len(journal.numbers(folder)) == 1)
    assert journal.numbers(folder)[0] > 50
    assert (folder / f"journal-{journal.numbers(folder)[0]:08}").stat().st_size < 10_000
    found = after_a_kill(ledger)
    assert Counter(one.reason for one in found.values()) == {"": 2000, "gateway_restart": 1}
    assert found["long"].outcome == "failed"
    ledger.end(row("long"))
    ledger.close()
    assert journal.numbers(folder) == []
    again = opened(folder)
    assert len(everything(again)) == 2001
    assert again.receipt("long") is not None
    again.close()


@given(
    st.lists(st.sampled_from(["admit", "end", "refuse", "amend", "flush", "settle"]), max_size=40)
)
def test_one_row_each_whenever_it_is_killed(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("ledger") / "state"
    with mock.patch("tokenworks.gateway.ledger.ledger._SETTLE_S", 0.002):
        ledger = opened(folder, segment_bytes=300)
    ended: dict[str, Row] = {}
    running: list[str] = []
    safe: tuple[dict[str, Row], list[str]] = ({}, [])
    for number, step in enumerate(steps):
        if step == "admit":
            running.append(str(number))
            admit(ledger, str(number))
        elif step in ("end", "refuse"):
            identity = running.pop(0) if step == "end" and running else str(number)
            ended[identity] = row(identity, output_tokens=number)
            ledger.end(ended[identity])
        elif step == "amend" and ended:
            identity = random.Random(number).choice(sorted(ended))
            ended[identity] = replace(ended[identity], energy_j=number, energy_grade="measured")
            ledger.amend(identity, number, "measured")
        elif step == "settle":
            soon(lambda: ledger._settler.is_done)
        elif step == "flush":
            ledger.flush()
            safe = (dict(ended), list(running))
    found = after_a_kill(ledger)
    ledger.close()
    ended, running = safe
    assert set(found) == {*ended, *running}
    assert {identity: found[identity] for identity in ended} == ended
    assert all(found[identity].reason == "gateway_restart" for identity in running)


def test_recent_rows_are_bounded(ledger: Ledger) -> None:
    for number in range(30_000):
        ledger.end(row(str(number)))
        if number % 100 == 0:
            ledger.flush()
    ledger.flush()
    assert 5000 <= len(ledger._young) + len(ledger._old) <= 10_000
    soon(lambda: ledger.receipt("0") is not None)  # not in memory any more


def test_old_rows_go(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    now_ns = time.time_ns()
    for number in range(12_000):
        ledger.end(row(str(number), unix_ns=now_ns - 40 * DAY_NS))
    ledger.end(row("new", unix_ns=now_ns))
    ledger.close()
    ledger = opened(tmp_path)  # looks at once, then every hour
    soon(lambda: len(everything(ledger)) == 1)
    assert ledger.receipt("new") is not None
    ledger.close()


# Faults


def child(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.gateway.ledger_child", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_9_loses_nothing(tmp_path: Path) -> None:
    rng = random.Random(5)
    running: set[str] = set()
    ended: dict[str, int] = {}
    for life in range(12):
        process = child("serve", tmp_path, f"life{life}")
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        for line in process.stdout.read().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            number, *done = map(int, line.split())
            running |= {f"life{life}-{one}" for one in range(max(0, number - 4), number + 1)}
            ended |= {f"life{life}-{one}": one for one in done}
            ended[f"life{life}-{number}-refused"] = 0
        process.wait()
    assert len(ended) > 2000
    ledger = opened(tmp_path)
    rows = everything(ledger)
    ledger.close()
    found = {one.id: one for one in rows}
    assert len(found) == len(rows)
    assert running | set(ended) <= set(found)
    for identity, tokens in ended.items():
        assert (found[identity].output_tokens, found[identity].reason) == (tokens, "")
    # Of each life, those that were under way: closed, or ended in a turn that was never told.
    orphans = [one for one in rows if one.reason == "gateway_restart"]
    assert len(orphans) > 12 * 10
    for one in orphans:
        assert one.outcome == "failed"
        assert one.id not in ended


def test_a_full_disk_is_said_and_got_over(tmp_path: Path) -> None:
    process = child("fill", tmp_path)
    said = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert str(tmp_path) in said[0]
    count, is_broken = said[1].split()
    assert is_broken == "True"
    assert said[2] == "still full"
    size, end = said[3].split()
    assert size == end  # no half frame is left
    assert said[4:] == ["False 0", "trouble: "]
    ledger = opened(tmp_path)
    found = {one.id: one for one in everything(ledger)}
    ledger.close()
    assert set(found) == {*map(str, range(int(count) + 1)), "after"}
    assert found[count].status == 503
    assert all(found[str(one)].output_tokens == one for one in range(int(count)))


def test_while_it_is_broken_refusals_are_bounded(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    admit(ledger, "before")
    ledger.flush()
    ledger._journal._file, file = -1, ledger._journal._file  # a file that can't be written
    admit(ledger, "a")
    with pytest.raises(LedgerError):
        ledger.flush()
    for number in range(12_000):
        ledger.end(row(f"refused {number}", outcome="rejected", status=503))
        with pytest.raises(LedgerError):
            ledger.flush()
    ledger.end(row("before"))
    assert ledger.lost == 2000
    ledger._journal._file = file
    ledger._tried_ns = 0
    ledger.flush()
    assert not ledger.is_broken
    ledger.close()
    ledger = opened(tmp_path)
    found = {one.id for one in everything(ledger)}
    assert "a" not in found  # was not dispatched, and its refusal was not ended here
    assert {"before", "refused 9999"} <= found
    assert len(found) == 10_001
    ledger.close()


def test_one_gateway_a_folder(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another gateway \(process \d+\) keeps its ledger in"):
        Ledger(tmp_path / "state", keep_days=1)
    ledger.end(row("a"))
    ledger.flush()  # the first is none the worse for it


@pytest.mark.parametrize("kind", ["file", "directory", "garbage", "later"])
def test_a_folder_that_is_none(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "state"
    if kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
    path = folder / "ledger.sqlite"
    if kind == "directory":
        path.mkdir()
    elif kind == "garbage":
        path.write_bytes(b"nonsense" * 1000)
    elif kind == "later":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError) as told:
        opened(folder)
    assert str(folder) in told.value.message
    assert told.value.remedy


def test_a_ledger_of_an_earlier_version_gets_its_columns(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("INSERT INTO requests (id, unix_ns, usd) VALUES ('a', 7, 0.5)")
        for gone in ("batch", "counted", "promise_read_j", "outcome"):
            connection.execute(f"ALTER TABLE requests DROP COLUMN {gone}")
    ledger = opened(tmp_path, keep_days=1e6)
    assert ledger.receipt("a") == Row("a", 7, usd=0.5)
    ledger.close()
