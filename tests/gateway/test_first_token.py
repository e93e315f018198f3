"""What counts as a first token: not a role, a comment or a record of what is to come."""

import json
from typing import Any

import pytest

from tests.gateway.scripted import HEAD, SCENES, TAIL, Play, event, framed, scene
from tests.support import Running
from tokenworks.gateway.speech import speaks

PAUSE_S = 0.3
ROLE = event("").replace(b'"content":""', b'"role":"assistant","content":""')
CALL = {"type": "function", "function": {"name": "f", "arguments": ""}}
END = b"0\r\n\r\n"


def step(kind: str, **more: Any) -> bytes:
    """One event of /v1/responses."""
    data = json.dumps({"type": f"response.{kind}", **more})
    return f"data: {data}\n\n".encode()


# The record repeats the request.
CREATED = step("created", response={"id": "r1", "instructions": "x", "text": {"content": "y"}})
ADDED = step("output_item.added", item={"type": "function_call", "name": "f", "arguments": ""})
COMPLETED = step(
    "completed", response={"id": "r1", "usage": {"input_tokens": 7, "output_tokens": 1}}
)


@scene
async def hesitates(play: Play) -> None:
    """Who speaks, and a comment, at once; a word when it is there."""
    await play.send(HEAD + framed(ROLE), framed(b": ping\n\n"), pause_s=PAUSE_S / 2)
    await play.send(framed(event("one")), framed(event(" two")), framed(TAIL), END)


@scene
async def says_nothing(play: Play) -> None:
    await play.send(HEAD + framed(ROLE), framed(TAIL), END, pause_s=0.02)


@scene
async def responds(play: Play) -> None:
    await play.send(HEAD + framed(CREATED), framed(ADDED), pause_s=PAUSE_S / 2)
    await play.send(framed(step("output_text.delta", delta="one")), framed(COMPLETED), END)


@scene
async def dies_early(play: Play) -> None:
    """A record of the response, and the connection is gone; the next time all goes well."""
    SCENES["dies_early"] = SCENES["responds"]
    await play.send(HEAD + framed(CREATED), pause_s=0.05)
    play.writer.transport.abort()


def test_its_time_is_that_of_the_first_word(relay: Running) -> None:
    """Also where heads of streams are known by now."""
    for _ in range(2):
        for path, asked in (
            ("chat/completions", {"messages": [{"role": "user", "content": "hesitates"}]}),
            ("responses", {"input": "responds"}),
        ):
            answer = relay.post({"model": "scripted", "stream": True, **asked}, f"/v1/{path}")
            assert relay.receipt(answer)["actual"]["ttft_s"] >= PAUSE_S
            if path == "responses":
                assert [each["type"].partition(".")[2] for each in answer.events] == [
                    "created", "output_item.added", "output_text.delta", "completed",
                ]  # fmt: skip
            else:
                assert answer.events[0]["choices"][0]["delta"]["role"] == "assistant"
                assert answer.text == "one two"


def test_a_stream_without_a_word_is_told_whole(relay: Running) -> None:
    asked = {"model": "scripted", "messages": [{"role": "user", "content": "says_nothing"}]}
    answer = relay.post({**asked, "stream": True})
    assert [each["choices"][0]["finish_reason"] for each in answer.events[:-1]] == [None, "stop"]
    assert answer.events[-1] == "[DONE]"


def test_who_has_said_nothing_yet_can_go_elsewhere(relay: Running) -> None:
    answer = relay.post(
        {"model": "scripted", "stream": True, "input": "dies_early"}, "/v1/responses"
    )
    assert answer.status == 200
    assert answer.body.count(b'"response.created"') == 1
    assert answer.events[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("said", "route", "is_word"),
    [
        (ROLE, "chat/completions", False),
        (ROLE.replace(b'"content":""', b'"content":null'), "chat/completions", False),
        (b": OPENROUTER PROCESSING\n\n", "chat/completions", False),
        (event("", choices=[], usage={"prompt_tokens": 3}), "chat/completions", False),
        (event("", tool_calls=[]), "chat/completions", False),
        (event("one"), "chat/completions", True),
        (event('"'), "chat/completions", True),
        (event().replace(b":", b": "), "chat/completions", True),
        (event(choices=[{"delta": {"tool_calls": [CALL]}}]), "chat/completions", True),
        (event(choices=[{"delta": {"reasoning_content": "hm"}}]), "chat/completions", True),
        (event(choices=[{"text": "", "finish_reason": None}]), "completions", False),
        (event(choices=[{"text": " one"}]), "completions", True),
        (CREATED + ADDED, "responses", False),
        (step("output_text.delta", delta=""), "responses", False),
        (CREATED + step("output_text.delta", delta="one"), "responses", True),
        (step("reasoning_text.delta", delta="hm"), "responses", True),
        (framed(step("function_call_arguments.delta", delta='{"')), "responses", True),
    ],
)
def test_what_is_a_word(said: bytes, route: Any, is_word: bool) -> None:
    assert speaks(said, route) is is_word
