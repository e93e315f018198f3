"""The generator's parts without a network."""

import asyncio
import time
from random import Random

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from tests.load.server import DONE, event
from tokenworks.alarm import Alarm
from tokenworks.errors import UserError
from tokenworks.load import endpoint
from tokenworks.load.bins import Bins, table
from tokenworks.load.check import Check
from tokenworks.load.endpoint import Accepted
from tokenworks.load.prompts import Prompts
from tokenworks.load.strain import Strain, worst
from tokenworks.workload import Request

GOOD = Strain(100, 2_000_000, 0.0, 1_000_000, 30_000_000, 0.4, 3.0)
HERE = endpoint.parse("http://127.0.0.1:8000/v1")


@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=200))
def test_bins_keep_a_hundredth(times: list[int]) -> None:
    bins = Bins()
    for each in times:
        bins.add(each)
    gaps = table([bins])
    assert len(bins) == gaps.count == len(times)
    for share in (0.5, 0.9, 1.0):
        exact = int(np.quantile(times, share, method="inverted_cdf"))
        assert bins.quantile_ns(share) == pytest.approx(exact, rel=0.01, abs=0)
        assert (gaps.quantile_ps(share) or 0) == pytest.approx(exact * 1000, rel=0.01, abs=0)


def test_many_times_are_few_bins() -> None:
    bins, chance = Bins(), Random(1)
    for _ in range(100_000):
        bins.add(int(10 ** chance.uniform(3, 11)))
    assert len(bins.counts) < 2000


STREAM = (
    event("", role="assistant")
    + event("one")
    + b": ping\n\n"
    + event(" two")
    + event(" three", "stop")
    + event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
    + DONE
)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream_reads_the_same_wherever_it_is_cut(newline: bytes) -> None:
    whole = STREAM.replace(b"\n", newline)
    for at in range(len(whole)):
        told: list[str] = []
        check = Check(3, Bins(), lambda kind, seen, told=told: told.append(kind), is_stream=True)  # type: ignore[misc]
        check.feed(whole[:at], 1)
        check.feed(whole[at:], 2)
        assert check.end(3)
        assert told == []
        assert (check.chunks, check.output_tokens, check.finish) == (3, 3, "stop")


@given(st.binary(max_size=300))
def test_any_bytes_are_an_answer_or_none(data: bytes) -> None:
    for is_stream in (True, False):
        check = Check(3, Bins(), lambda _kind, _seen: None, is_stream=is_stream)
        check.feed(data, 1)
        check.feed(DONE, 2)
        check.end(3)


def test_the_bottleneck_is_named() -> None:
    assert GOOD.reasons() == []
    busy = Strain(0, 0, 0.0, 0, 0, 0.97, 9.0)
    assert busy.reasons() == ["it used 97% of a core"]
    late = Strain(100, 80_000_000, 0.2, 20_000_000, 90_000_000, 0.5, 1.0)
    assert len(late.reasons()) == 2
    assert "20.0% of the requests were sent more than 10 ms late" in late.reasons()[0]
    assert Strain(4, 80_000_000, 0.25, 0, 0, 0.1, 1.0).reasons() == []  # one late request
    assert worst([GOOD, busy]).reasons() == busy.reasons()
    assert worst([GOOD, busy]).cpu_s == 12.0


def test_the_alarm_never_rings_early() -> None:
    rang: list[tuple[int, int]] = []

    async def ring() -> None:
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        due = [0]

        def rung() -> None:
            rang.append((due[0], time.monotonic_ns()))
            if len(rang) == 20:
                over.set_result(None)
                return
            due[0] = time.monotonic_ns() + 700_000
            alarm.set(due[0])

        alarm = Alarm(loop, rung)
        due[0] = time.monotonic_ns() - 5  # a time that is over rings at once
        alarm.set(due[0])
        await over
        alarm.close()

    uvloop.run(ring())
    assert len(rang) == 20
    assert all(at >= due for due, at in rang)


@pytest.mark.parametrize("rate", [0.5, 1.0, 1.37])
def test_prompts_have_their_length(rate: float) -> None:
    accepted = Accepted(words_per_token=rate, base_tokens=11)
    prompts = Prompts(HERE, "m", accepted, {}, 0, stream=True)
    for tokens in (12, 40, 1000, 200_000):
        text = prompts._text(1, Request(0, tokens, 5))
        assert len(text.split()) == max(round((tokens - 11) * rate), 1)
    prefix = (1, 2, 3)
    text = prompts._text(1, Request(0, 150, 5, prefix=prefix, prefix_block_tokens=50))
    # Never longer than the prompt: what the model adds is taken off the end.
    assert len(text.split()) == round(139 * rate)


@pytest.mark.parametrize(
    ("url", "authority", "base"),
    [
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", "/v1"),
        ("https://api.example.com/openai/v1/", "api.example.com", "/openai/v1"),
        ("http://[::1]:8000/v1", "[::1]:8000", "/v1"),
        ("http://somewhere", "somewhere", ""),
    ],
)
def test_addresses(url: str, authority: str, base: str) -> None:
    found = endpoint.parse(url)
    assert (found.authority, found.base) == (authority, base)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://x/v1", "http:///v1", "http://x:port/v1", "http://a:b@x/v1", "http://x/v1?a=1"]
)  # fmt: skip
def test_no_addresses(url: str) -> None:
    with pytest.raises(UserError, match="--url"):
        endpoint.parse(url)
