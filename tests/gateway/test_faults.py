"""Faults of engines, each counted as the clients see it: no stream lost, no token twice, none
missing, and one row of the ledger for each request.
"""

import asyncio
import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.gateway.faulty import MODEL, Plant, Told, ask, body, crowd, faults, fleet_file, plant
from tests.gateway.faulty import prompt as fresh
from tests.gateway.scripted import HEAD, SCENES, TAIL, Play, ScriptedEngine, event, framed, scene
from tests.support import Client, Running, gateway, request_bytes, wait_for
from tokenworks.gateway.flaws import flaw_in

STREAMS, TOKENS, SLOW = 40, 40, 3


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """A gateway over two engines that are mended after each test."""
    with plant(tmp_path_factory.mktemp("factory"), 2, slow=SLOW) as found:
        yield found


@pytest.fixture
def two(factory: Plant) -> Iterator[Plant]:
    yield factory
    for engine in factory.engines:
        if engine.process.poll() is not None:
            engine.start()
        engine.hurt("wake")
        engine.hurt("slow", factor=SLOW)
    wait_for(lambda: ups(factory.gateway) == [1, 1], 20)


def ups(running: Running) -> list[float]:
    return [value for name, value in running.figures().items() if "engine_up{" in name]


def busy(factory: Plant) -> int:
    """Which engine has most of the work."""
    return max(range(len(factory.engines)), key=lambda index: factory.engines[index].running())


def under(factory: Plant, act: Callable[[int], None], count: int = STREAMS) -> list[Told]:
    """The answers to so many streams; `act` is done to the busiest engine in the midst of them."""

    def act_later() -> None:
        wait_for(lambda: sum(engine.running() for engine in factory.engines) >= count, 20)
        time.sleep(0.4)
        act(busy(factory))

    actor = threading.Thread(target=act_later)
    actor.start()
    answers = asyncio.run(crowd(factory.gateway.address, count, TOKENS))
    actor.join()
    return answers


def rows_of(factory: Plant, answers: list[Told]) -> list[dict[str, Any]]:
    """Their rows: exactly one each."""
    ids = [told.id for told in answers]

    def found() -> list[dict[str, Any]]:
        return [row for row in factory.rows() if row["id"] in ids]

    wait_for(lambda: len(found()) >= len(ids), 20)
    rows = found()
    assert sorted(row["id"] for row in rows) == sorted(ids)
    return rows


def test_an_engine_killed_in_mid_stream_is_not_noticed_by_clients(two: Plant) -> None:
    answers = under(two, lambda at: two.engines[at].end(signal.SIGKILL))
    assert faults(answers) == Counter()
    rows = rows_of(two, answers)
    assert {row["output_tokens"] for row in rows} == {TOKENS}
    assert {row["moves"] for row in rows} <= {0, 1, 2}
    assert any(row["moves"] for row in rows)


def test_nor_one_that_is_started_again(two: Plant) -> None:
    def restart(at: int) -> None:
        two.engines[at].end(signal.SIGTERM)
        two.engines[at].start()

    assert faults(under(two, restart)) == Counter()


def test_nor_one_that_hangs_with_its_connections_open(two: Plant) -> None:
    answers = under(two, lambda at: two.engines[at].hurt("hang"))
    assert faults(answers) == Counter()
    assert any(row["moves"] for row in rows_of(two, answers))
    # It calls itself well, and is not asked again before it has shown that it is.
    assert 0 in ups(two.gateway)
    again = asyncio.run(crowd(two.gateway.address, 5, 5))
    assert faults(again) == Counter()
    assert {row["moves"] for row in rows_of(two, again)} == {0}


def test_nor_one_that_gets_slow(two: Plant) -> None:
    answers = under(two, lambda at: two.engines[at].hurt("slow", factor=4 * SLOW))
    assert faults(answers) == Counter()


@pytest.mark.parametrize("kind", ["reset", "malformed"])
def test_nor_events_that_are_broken(two: Plant, kind: str) -> None:
    for engine in two.engines:
        engine.hurt(kind, times=STREAMS // 4, after=20)
    answers = asyncio.run(crowd(two.gateway.address, STREAMS, TOKENS))
    assert faults(answers) == Counter()
    assert any(row["moves"] for row in rows_of(two, answers))


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_refuses_is_passed_by(two: Plant, stream: bool) -> None:
    two.engines[0].hurt("refuse", times=STREAMS)
    answers = asyncio.run(crowd(two.gateway.address, STREAMS, 10, stream=stream))
    assert faults(answers) == Counter()
    assert len(rows_of(two, answers)) == STREAMS
    two.engines[0].end(signal.SIGKILL)  # and what is left of its refusals with it


@pytest.mark.parametrize("stream", [True, False])
def test_nobody_pays_for_tokens_that_cannot_have_been_made(two: Plant, stream: bool) -> None:
    for engine in two.engines:
        engine.hurt("wrong_usage", times=4)
    answers = asyncio.run(crowd(two.gateway.address, 4, 10, stream=stream))
    assert faults(answers) == Counter()  # each counts the tokens of its usage
    assert {row["output_tokens"] for row in rows_of(two, answers)} == {10}
    for engine in two.engines:
        engine.end(signal.SIGKILL)


def test_clients_that_hang_up_free_their_engines(two: Plant) -> None:
    def leave(after: int) -> None:
        with Client(two.gateway.address) as client:
            client.send(request_bytes(body(fresh(), 2000)))
            if after:
                client.head()
                list(itertools.islice(client.chunks(), after))

    before = len(two.rows())
    for after in (0, 5):
        leavers = [threading.Thread(target=leave, args=(after,)) for _ in range(10)]
        for leaver in leavers:
            leaver.start()
        for leaver in leavers:
            leaver.join()
    wait_for(lambda: sum(engine.running() for engine in two.engines) == 0, 20)
    rows = two.settled(before + 20)[before:]
    assert len(rows) == 20
    assert {(row["outcome"], row["reason"]) for row in rows} == {("cancelled", "client_left")}
    assert two.gateway.working() == 0


def test_a_slow_first_token_is_asked_for_twice_and_answered_once(tmp_path: Path) -> None:
    with plant(tmp_path, 2, slow=1) as quick:
        quick.engines[0].hurt("hang")
        answers = asyncio.run(crowd(quick.gateway.address, 8, 5, service_tier="priority"))
        assert faults(answers) == Counter()
        rows = rows_of(quick, answers)
        assert {row["outcome"] for row in rows} == {"finished"}
        assert any(row["hedged"] for row in rows)
        assert {row["replica"] for row in rows} == {"gpu-1"}
        wait_for(lambda: quick.gateway.working() == 0, 5)
        quick.engines[0].hurt("wake")
        wait_for(lambda: quick.engines[0].running() == 0, 5)  # the losers were cancelled


# Engines that fail in words


@scene
async def ails(play: Play) -> None:
    """Two words, and the engine's last one: that it is dead, as vLLM says it."""
    error = b'data: {"error":{"message":"EngineCore died","type":"x","param":null,"code":500}}\n\n'
    await play.send(HEAD, framed(event("one")), pause_s=0.02)
    await play.send(framed(event(" two")) + framed(error) + framed(b"data: [DONE]\n\n"))
    await play.send(b"0\r\n\r\n")


@scene
async def blames(play: Play) -> None:
    """A word, and that the request is to blame."""
    error = b'data: {"error":{"message":"your fault","type":"x","param":null,"code":400}}\n\n'
    await play.send(HEAD, framed(event("one")), framed(error), b"0\r\n\r\n", pause_s=0.02)


@scene
async def quits(play: Play) -> None:
    """Two words, and a clean end of a stream that has none."""
    await play.send(HEAD, framed(event("one")), framed(event(" two")), b"0\r\n\r\n", pause_s=0.02)


@scene
async def stutters(play: Play) -> None:
    """Nothing but who speaks, and half of an event that is called whole."""
    role = event("").replace(b'"content":""', b'"role":"assistant","content":""')
    await play.send(HEAD, framed(role), framed(b'data: {"choices":[\n\n'), pause_s=0.02)
    SCENES["stutters"] = SCENES["good"]


async def _rest(play: Play) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    tail = (
        framed(event()) + framed(event("", choices=[], usage=usage)) + framed(b"data: [DONE]\n\n")
    )
    await play.send(HEAD, framed(event(" three")), tail, b"0\r\n\r\n")


SCENES["one"] = _rest  # the answer's beginning is the last message then


def scripted(content: str, **more: Any) -> dict[str, Any]:
    """A request for a scene."""
    messages = [{"role": "user", "content": content}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "messages": messages, **options, **more}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """A gateway over a scripted engine, and its state."""
    folder = tmp_path_factory.mktemp("alone")
    with ScriptedEngine() as engine:
        path = fleet_file(folder, [engine.url])
        state = folder / "state"
        with gateway("--fleet", str(path), TOKENWORKS_STATE=str(state)) as running:
            yield running, folder


@pytest.mark.parametrize("name", ["ails", "quits", "stutters"])
def test_an_engine_that_tells_of_its_end_is_lost_and_nobody_is_told(
    alone: tuple[Running, Path], name: str
) -> None:
    answer = alone[0].post(scripted(name))
    assert answer.status == 200
    assert answer.text == "one two three"
    assert b"error" not in answer.body
    assert answer.body.count(b"[DONE]") == 1


def test_an_engine_that_blames_the_request_is_believed(alone: tuple[Running, Path]) -> None:
    answer = alone[0].post(scripted("blames"))
    assert answer.text == "one"
    assert answer.events[-1]["error"]["message"] == "your fault"


class Pair(NamedTuple):
    """A gateway over two scripted engines."""

    running: Running
    engines: tuple[ScriptedEngine, ScriptedEngine]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with ScriptedEngine() as one, ScriptedEngine() as other:
        path = fleet_file(folder, [one.url, other.url])
        with gateway("--fleet", str(path), TOKENWORKS_STATE=str(folder / "state")) as running:
            yield Pair(running, (one, other))


def test_an_engine_that_only_opens_a_stream_is_hedged(pair: Pair) -> None:
    asked: list[ScriptedEngine] = []

    async def opens(play: Play) -> None:
        """The first to be asked says who it is, and no more."""
        asked.append(play.engine)
        if len(asked) > 1:
            await SCENES["good"](play)
            return
        role = event("").replace(b'"content":""', b'"role":"assistant","content":""')
        await play.send(HEAD + framed(role))
        await play.until_gone()
        play.engine.hung_up += 1
        play.writer.close()

    SCENES["opens"] = opens
    answer = pair.running.post(scripted("opens", service_tier="priority"))
    assert answer.text == "one two three"
    assert b"assistant" not in answer.body
    assert pair.running.receipt(answer)["hedged"]
    wait_for(lambda: asked[0].hung_up == 1)


def test_an_engine_that_limits_us_gets_less_and_is_not_taken_for_dead(pair: Pair) -> None:
    """As Groq's cloud does it."""
    asked: list[ScriptedEngine] = []
    limited: set[ScriptedEngine] = set()

    async def limits(play: Play) -> None:
        if not asked:
            limited.add(play.engine)
        asked.append(play.engine)
        if play.engine not in limited:
            await SCENES["good"](play)
            return
        body = b'{"error":{"message":"Rate limit reached","code":"rate_limit_exceeded"}}'
        head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\n"
        more = b"retry-after: 41.5\r\ncontent-length: %d\r\n\r\n" % len(body)
        await play.send(head + more + body)

    SCENES["limits"] = limits
    for _ in range(6):
        answer = pair.running.post(scripted("limits"))
        assert answer.text == "one two three"
    assert len(asked) == 7
    assert asked.count(asked[0]) == 1
    assert ups(pair.running) == [1, 1]
    limited.update(pair.engines)
    refused = pair.running.post(scripted("limits"))
    assert (refused.status, refused.headers["retry-after"]) == (429, "42")
    assert refused.headers["x-refusal-reason"] == refused.error["code"] == "rate_limit_exceeded"
    assert asked.count(asked[0]) == 1
    # Now that both rest, whoever comes is for them to judge.
    limited.clear()
    assert pair.running.post(scripted("limits")).text == "one two three"
    assert ups(pair.running) == [1, 1]


ERROR = b'data: {"error":{"message":"gone"}}\n\n'


@pytest.mark.parametrize(
    ("before", "broken"),
    [
        (event("one"), ERROR),
        (b"", ERROR),
        (event("one") + b": ping\n\n", b'data: {"object":"error","message":"gone","code":500}\n\n'),
        (event("one"), b'data: {"choices":[{"delta":{"content"\n\n'),
        (event("one").replace(b"\n", b"\r\n"), ERROR.replace(b"\n", b"\r\n")),
    ],
)
def test_what_comes_before_a_flaw_counts(before: bytes, broken: bytes) -> None:
    found = flaw_in(before + broken + event("two"))
    assert found is not None
    assert found.at == len(before)
    assert found.problem is None


def test_texts_that_talk_of_errors_are_no_flaws() -> None:
    events = [event('{"error":{"message":"x"}}'), event('"error"'), event("}\n\n"), event("data:")]
    assert flaw_in(b"".join(events) + b": error\n\ndata: \n\n" + TAIL) is None


STUCK: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"response_format": {"type": "json_object"}},
    {"logprobs": True},
    {"n": 2},
]


def test_what_cannot_go_on_ends_in_an_error_and_is_counted_apart(
    alone: tuple[Running, Path],
) -> None:
    running, folder = alone
    for more in STUCK:
        answer = running.post(scripted("ails", **more))
        assert answer.status == 200
        assert answer.text == "one two"
        assert answer.events[-1]["error"]["code"] == "not_resumable"
        assert "[DONE]" not in answer.events
    figures = running.figures()
    assert figures['tokenworks_unresumable_total{reason="not_resumable"}'] == len(STUCK)
    found = Plant(running, [], folder / "state")
    wait_for(lambda: [r["reason"] for r in found.rows()].count("not_resumable") == len(STUCK), 20)


def test_a_stream_asked_for_once_is_answered_by_whoever_is_left(tmp_path: Path) -> None:
    """Of three engines two die, one after the other."""
    with plant(tmp_path, 3, slow=SLOW) as three:

        def kill_two(at: int) -> None:
            three.engines[at].end(signal.SIGKILL)
            time.sleep(1)
            del three.engines[at]
            three.engines[busy(three)].end(signal.SIGKILL)

        assert faults(under(three, kill_two)) == Counter()
        told = asyncio.run(ask(three.gateway.address, 3))
        assert told.is_whole
