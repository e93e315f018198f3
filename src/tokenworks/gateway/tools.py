"""Tool calls for a model whose chat template knows none: made to hold by a JSON schema.

The functions are told in the system message, the answer is constrained to one JSON object, either
`{"name": …, "arguments": …}` or `{"content": …}`, and turned back into OpenAI's shape, streamed
or whole. One call per turn: small models don't stop by themselves.
"""

import json
import re
import secrets
from typing import Any, Final

import msgspec

from tokenworks.gateway.problem import invalid
from tokenworks.gateway.schema import ChatRequest, NamedTool

_CALL: Final = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*')
_TEXT: Final = re.compile(r'\s*\{\s*"content"\s*:\s*"')
_WRAPPER_END: Final = re.compile(r"\s*\}\s*$")
# As much of a JSON string as is certain: whole characters, whole escapes, whole surrogate pairs.
_STRING: Final = re.compile(
    r"""(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"""
    r"""|\\u[dD][89abAB][0-9a-fA-F]{2}"""
    r"""(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?=[^\\]|\\[^u]|\\u(?![dD][c-fC-F])[0-9a-fA-F]{4})))*"""
)


class Emulation:
    """One request's tools: what to ask of the engine, and how to read its answer."""

    def __init__(self, request: ChatRequest) -> None:
        assert request.tools
        if request.n is not None and request.n > 1:
            raise invalid("n above 1 with tools is not supported by this engine.", "n")
        if request.logprobs:
            raise invalid("logprobs with tools are not supported by this engine.", "logprobs")
        if request.response_format is not None and request.response_format.type != "text":
            raise invalid(
                "response_format with tools is not supported by this engine: "
                "the tools' own schemas shape its answer.",
                "response_format",
            )
        offered = {tool.function.name: tool.function for tool in request.tools}
        choice = request.tool_choice
        self._may_talk = choice in (None, "auto")
        if isinstance(choice, NamedTool):
            if choice.function.name not in offered:
                raise invalid(
                    f"tool_choice names {choice.function.name!r}, which is not among the tools: "
                    f"{', '.join(offered)}.",
                    "tool_choice",
                )
            offered = {choice.function.name: offered[choice.function.name]}
        self._functions = list(offered.values())
        self._reading = _Reading()

    def changes(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields of the request that differ for the engine."""
        return {
            "messages": self._told(plain_history(messages)),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": self._schema()},
            },
            # llama.cpp takes a null for absent.
            "tools": None,
            "tool_choice": None,
            "parallel_tool_calls": None,
        }

    def _schema(self) -> dict[str, Any]:
        kinds = [
            _object(name={"const": function.name}, arguments=function.parameters or _object())
            for function in self._functions
        ]
        if self._may_talk:
            kinds.append(_object(content={"type": "string"}))
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}

    def _told(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lines = [
            msgspec.json.encode(msgspec.to_builtins(function)).decode()
            for function in self._functions
        ]
        told = "You can call these functions:\n" + "\n".join(lines)
        told += '\nTo call one, reply with {"name": "…", "arguments": {…}}.'
        if self._may_talk:
            told += ' To answer without a call, reply with {"content": "…"}.'
        first = messages[0]
        if first["role"] == "system" and isinstance(first.get("content"), str):
            return [{**first, "content": f"{first['content']}\n\n{told}"}, *messages[1:]]
        return [{"role": "system", "content": told}, *messages]

    def whole(self, document: dict[str, Any]) -> dict[str, Any]:
        """The engine's whole answer with its JSON text as the message it stands for."""
        for choice in document.get("choices", []):
            reading = _Reading()
            deltas = reading.feed(choice["message"].get("content") or "")
            deltas += reading.end(choice.get("finish_reason"))
            message: dict[str, Any] = {"role": "assistant", "content": None}
            text = "".join(delta["content"] for delta in deltas if "content" in delta)
            calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
            if calls:
                function = {
                    "name": calls[0]["function"]["name"],
                    "arguments": "".join(call["function"]["arguments"] for call in calls),
                }
                call = {"id": calls[0]["id"], "type": "function", "function": function}
                message["tool_calls"] = [call]
                if choice.get("finish_reason") == "stop":
                    choice["finish_reason"] = "tool_calls"
            else:
                message["content"] = text
            choice["message"] = message
        return document

    def event(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        """One event of the engine's stream as the events it becomes; none while undecided."""
        if not document.get("choices"):
            return [document]
        choice = document["choices"][0]
        delta = choice.get("delta") or {}
        found = []
        if "role" in delta:
            found.append(_with_delta(document, {"role": "assistant", "content": None}, None))
        found += [
            _with_delta(document, each, None)
            for each in self._reading.feed(delta.get("content") or "")
        ]
        reason = choice.get("finish_reason")
        if reason is not None:
            found += [_with_delta(document, each, None) for each in self._reading.end(reason)]
            if self._reading.called and reason == "stop":
                reason = "tool_calls"
            found.append(_with_delta(document, {}, reason))
        return found


class _Reading:
    """The engine's JSON text, read as it comes: deltas in OpenAI's shape go out."""

    def __init__(self) -> None:
        self.called = False
        self._text = ""  # all that came
        self._sent = -1  # how far the part that goes out is sent; -1: kind not known yet

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas that `text` makes certain."""
        self._text += text
        found: list[dict[str, Any]] = []
        if self._sent < 0:
            call = _CALL.match(self._text)
            talk = _TEXT.match(self._text)
            if call is not None:
                self.called = True
                self._sent = call.end()
                found.append(self._call({"name": _unescape(call[1]), "arguments": ""}, first=True))
            elif talk is not None:
                self._sent = talk.end()
        if self._sent < 0:
            return found
        piece = self._arguments() if self.called else self._content()
        if piece:
            delta = self._call({"arguments": piece}) if self.called else {"content": piece}
            found.append(delta)
        return found

    def end(self, reason: str | None) -> list[dict[str, Any]]:
        """What is left when the engine has stopped for `reason`."""
        if self._sent < 0:
            return [{"content": self._text}] if self._text else []
        if not self.called:
            return []
        rest = self._text[self._sent :]
        if reason == "stop":  # else it was cut off, and every brace there is belongs to it
            rest = _WRAPPER_END.sub("", rest)
        self._sent = len(self._text)
        return [self._call({"arguments": rest})] if rest else []

    def _arguments(self) -> str:
        # The last brace may be the wrapper's own.
        rest = self._text[self._sent :]
        piece = rest.rstrip(" \t\r\n}")
        self._sent += len(piece)
        return piece

    def _content(self) -> str:
        match = _STRING.match(self._text, self._sent)
        assert match is not None  # it matches the empty string
        # At the closing quote it stays: nothing after it belongs to the text.
        self._sent = match.end()
        return _unescape(match[0])

    def _call(self, function: dict[str, str], *, first: bool = False) -> dict[str, Any]:
        opening = {"id": f"call_{secrets.token_hex(12)}", "type": "function"} if first else {}
        return {"tool_calls": [{"index": 0, **opening, "function": function}]}


def plain_history(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with calls and their results as text that any template can print."""
    return [_plain(message) for message in messages]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("tool_calls"):
        calls = [call["function"] for call in message["tool_calls"]]
        lines = [f'{{"name": "{f["name"]}", "arguments": {f["arguments"]}}}' for f in calls]
        return {"role": "assistant", "content": "\n".join(lines)}
    if message["role"] in ("tool", "function"):
        return {"role": "user", "content": f"Result of the call:\n{message.get('content')}"}
    return message


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _with_delta(
    document: dict[str, Any], delta: dict[str, Any], reason: str | None
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {**document, "choices": [choice]}


def _unescape(text: str) -> str:
    value: str = json.loads(f'"{text}"', strict=False)
    # Half a surrogate pair is no character, and can't be sent as one.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
