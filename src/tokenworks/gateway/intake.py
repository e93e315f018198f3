"""From the bytes of a request to a Call: decoded once, checked, ready to be handed to an engine."""

import difflib
import re
from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from tokenworks.gateway.problem import Problem, invalid
from tokenworks.gateway.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Request,
    ResponsesRequest,
    StreamOptions,
)
from tokenworks.gateway.tools import Emulation, plain_history
from tokenworks.gateway.traits import Traits
from tokenworks.sched.config import ServiceClass

Route = Literal["chat/completions", "completions", "embeddings", "responses"]

_TYPES: Final[dict[Route, type[Request]]] = {
    "chat/completions": ChatRequest,
    "completions": CompletionRequest,
    "embeddings": EmbeddingRequest,
    "responses": ResponsesRequest,
}
ROUTES: Final[tuple[Route, ...]] = tuple(_TYPES)

_PLACE: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_ESCAPED: Final = re.compile(rb"\\u00[2-7]")
# What a service tier asks for: OpenAI's words and Groq's.
_CLASSES: Final[dict[str, ServiceClass]] = {
    "auto": "standard",
    "default": "standard",
    "on_demand": "standard",
    "scale": "standard",
    "flex": "flex",
    "performance": "realtime",
    "priority": "realtime",
}
# The field with a comma of its own; inside a string its quotes would be escaped.
_TIER: Final = re.compile(rb'"service_tier"\s*:\s*(?:"[a-z_]*"|null)\s*(?:,\s*)?')
_FIELD: Final = re.compile(r"(?P<kind>unknown|missing required) field `(?P<name>.*)`", re.DOTALL)


class Call(msgspec.Struct, gc=False):
    """A request that may run: what the relay needs to know of it, and the body for the engine."""

    route: Route
    model: str
    body: bytes
    stream: bool = False
    raw: bytes = b""  # as its client sent it
    traits: Traits | None = None  # of the kind of engine it was read for
    request: Request | None = None  # as it was decoded
    service_class: ServiceClass = "standard"  # that it asks for
    max_tokens: int | None = None
    # Whether the client asked to see usage in its stream.
    wants_usage: bool = True
    # And in every event of it (vLLM's continuous_usage_stats).
    wants_each_usage: bool = False
    # Choices the engine works on at once: what the call takes of the engine's slots.
    width: int = 1
    # Usage comes in parts that add up; for several prompts their prompt tokens too.
    sum_usage: bool = False
    several_prompts: bool = False
    choices: int = 1  # of each prompt
    # The engine is asked for a stream though the client wants the whole.
    assemble: bool = False
    # The engine tells how far it has read the prompt, in events that are not for the client.
    shows_progress: bool = False
    chat_logprobs: bool = False
    tools: Emulation | None = None


class Intake:
    """The decoders of one kind of engine. `allow` names further fields to let through."""

    def __init__(self, traits: Traits, allow: Iterable[str] = ()) -> None:
        extra = sorted(traits.extra_fields | set(allow))
        self.traits = traits
        self._decoders = {route: msgspec.json.Decoder(kind) for route, kind in _TYPES.items()}
        # For requests with fields beyond OpenAI's: a record of so many is slower to fill.
        self._wide = {
            route: msgspec.json.Decoder(_with_fields(kind, extra)) for route, kind in _TYPES.items()
        }

    def call(self, route: Route, body: bytes, *, slots: int | None = None) -> Call:
        """Decode and check `body`; raises Problem (400) with the field and the remedy."""
        request = self._decode(route, body)
        if self.traits.absent or self.traits.refused:
            self._refuse(route, request)
        call = self._read(route, request, body, slots)
        call.raw, call.traits, call.request = body, self.traits, request
        return call

    def _read(self, route: Route, request: Request, body: bytes, slots: int | None) -> Call:
        tier = None if isinstance(request, EmbeddingRequest) else request.service_tier
        if tier is not None or b'"service_tier"' in body:  # ours, not the engine's
            body = _without_tier(body)
        call = self._of(route, request, body, slots)
        if tier is not None:
            call.service_class = _CLASSES[tier]
        return call

    def _of(self, route: Route, request: Request, body: bytes, slots: int | None) -> Call:
        if isinstance(request, ChatRequest):
            return self._chat(request, body, slots)
        if isinstance(request, CompletionRequest):
            return self._completion(request, body, slots)
        if isinstance(request, ResponsesRequest):
            return self._responses(request, body)
        return Call(route, request.model, body, max_tokens=1)

    def _decode(self, route: Route, body: bytes) -> Request:
        if not body:
            raise invalid("The request has no body. Send a JSON object.", code="empty_body")
        try:
            try:
                return self._decoders[route].decode(body)
            except msgspec.ValidationError:
                return self._wide[route].decode(body)
        except msgspec.ValidationError as error:
            raise _explain(str(error), self._wide[route].type) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise invalid(
                f"The body is not valid JSON: {error}. Send a JSON object in UTF-8.",
                code="invalid_json",
            ) from None
        except RecursionError:
            raise invalid("The body is nested too deeply.", code="invalid_json") from None

    def _refuse(self, route: Route, request: Request) -> None:
        """Raise where the engine lacks the route, or would ignore a field."""
        reason = self.traits.absent.get(route)
        if reason is not None:
            raise invalid(f"/v1/{route} is not available here: {reason}", code="unsupported_route")
        for place, reason in self.traits.refused.items():
            where, _, name = place.rpartition(".")
            if where in ("", route) and getattr(request, name, None):
                raise invalid(f"{name} is not supported here: {reason}.", name, "unsupported_field")

    def _chat(self, request: ChatRequest, body: bytes, slots: int | None) -> Call:
        traits = self.traits
        _check_messages(request, traits)
        _check_formats(request)
        call = self._text_call("chat/completions", request, body, slots)
        changes: dict[str, Any] = {}
        if traits.developer_is_system and any(m.role == "developer" for m in request.messages):
            changes["messages"] = [_as_system(message) for message in _raw(body)["messages"]]
        if not traits.native_tools:
            if request.tools and request.tool_choice != "none":
                call.tools = Emulation(request)
                messages = changes.get("messages") or _raw(body)["messages"]
                changes.update(call.tools.changes(messages))
            elif any(m.tool_calls for m in request.messages):
                told = plain_history(changes.get("messages") or _raw(body)["messages"])
                changes["messages"] = told
        return _finish(call, request.stream_options, changes)

    def _completion(self, request: CompletionRequest, body: bytes, slots: int | None) -> Call:
        prompts = _prompts(request.prompt)
        call = self._text_call("completions", request, body, slots, prompts)
        call.several_prompts = prompts > 1
        call.chat_logprobs = self.traits.chat_logprobs and request.logprobs is not None
        return _finish(call, request.stream_options, {})

    def _text_call(
        self,
        route: Route,
        request: ChatRequest | CompletionRequest,
        body: bytes,
        slots: int | None,
        prompts: int = 1,
    ) -> Call:
        """What chat and completions have in common: the stream, usage, the number of choices."""
        call = Call(route, request.model, body, bool(request.stream))
        call.max_tokens = request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            call.max_tokens = request.max_completion_tokens
        options = request.stream_options
        if options is not None:
            if not call.stream:
                raise invalid("stream_options needs `stream: true`.", "stream_options")
            call.wants_usage = bool(options.include_usage)
            call.wants_each_usage = bool(options.continuous_usage_stats)
        elif call.stream:
            call.wants_usage = False
        choices = (request.n or 1) * prompts
        if choices > 1:
            call.choices = request.n or 1
            if slots is not None and request.n is not None and request.n > slots:
                told = f"n is {request.n}; this engine makes at most {slots} choices at once."
                raise invalid(told, "n")
            call.width = min(choices, slots or choices)
            call.sum_usage = self.traits.usage_per_choice
        self._as_stream(call)
        return call

    def _as_stream(self, call: Call) -> None:
        """Ask for a stream where only that can be stopped in the middle."""
        if self.traits.stops_streams_only:
            call.assemble = not call.stream
            call.shows_progress = True

    def _responses(self, request: ResponsesRequest, body: bytes) -> Call:
        if request.tools and not self.traits.native_tools:
            raise invalid(
                "tools are not supported on /v1/responses by this model. "
                "Use /v1/chat/completions, where they are.",
                "tools",
                "unsupported_field",
            )
        call = Call("responses", request.model, body, bool(request.stream))
        call.max_tokens = request.max_output_tokens
        self._as_stream(call)
        return _finish(call, None, {})


def _with_fields(kind: type[Request], names: Iterable[str]) -> type[Request]:
    """`kind` with further optional fields of any type."""
    fields = [(name, Any, None) for name in names if name not in kind.__struct_fields__]
    if kind not in (ChatRequest, CompletionRequest) or not fields:
        return kind
    return msgspec.defstruct(  # type: ignore[return-value]
        kind.__name__, fields, bases=(kind,), forbid_unknown_fields=True, kw_only=True
    )


def _explain(said: str, kind: type[Request]) -> Problem:
    """msgspec's sentence as a Problem with the field's path."""
    match = _PLACE.match(said)
    what, path = (match["what"], match["path"] or "") if match else (said, "")
    field = _FIELD.search(what)
    if field is None:
        where = f"{path}: " if path else "The body: "
        return invalid(f"{where}{what[:1].lower()}{what[1:]}.", path or None, "invalid_value")
    name = field["name"]
    param = f"{path}.{name}" if path else name
    if field["kind"] == "unknown":
        near = difflib.get_close_matches(name, kind.__struct_fields__, n=1) if not path else []
        hint = f" Did you mean {near[0]!r}?" if near else " Leave it out."
        return invalid(f"Unknown field {param!r}.{hint}", param, "unknown_field")
    return invalid(f"The field {param!r} is missing.", param, "missing_field")


def _check_messages(request: ChatRequest, traits: Traits) -> None:
    for index, message in enumerate(request.messages):
        if message.content is None and message.role != "assistant":
            where = f"messages[{index}].content"
            raise invalid(f"{where} is missing: only an assistant may say nothing.", where)
        if traits.parts is None or not isinstance(message.content, list):
            continue
        for place, part in enumerate(message.content):
            where = f"messages[{index}].content[{place}]"
            if part.type not in traits.parts:
                raise invalid(
                    f"{where} is of type {part.type!r}; this engine takes "
                    f"{', '.join(sorted(traits.parts))}.",
                    f"{where}.type",
                    "unsupported_content",
                )
            if part.type == "text" and part.text is None:
                raise invalid(f"{where}.text is missing.", f"{where}.text", "missing_field")


def _check_formats(request: ChatRequest) -> None:
    wanted = request.response_format
    if (
        wanted is not None
        and wanted.type == "json_schema"
        and (wanted.json_schema is None or wanted.json_schema.schema_ is None)
    ):
        where = "response_format.json_schema.schema"
        raise invalid(f"{where} is missing: give the JSON schema to keep.", where)
    if request.tool_choice is not None and request.tool_choice != "none" and not request.tools:
        raise invalid("tool_choice needs tools: list them in `tools`.", "tool_choice")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs `logprobs: true`.", "top_logprobs")
    unheard = request.modalities and set(request.modalities) - {"text"}
    if unheard:
        raise invalid(f"modalities {sorted(unheard)} are not supported: use text.", "modalities")


def _prompts(prompt: object) -> int:
    """How many prompts there are: a list of numbers is one prompt in token ids."""
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _without_tier(body: bytes) -> bytes:
    """The body without its service tier, which is for the gateway."""
    if _ESCAPED.search(body):
        document = _raw(body)
        document.pop("service_tier", None)
        return msgspec.json.encode(document)
    cut = _TIER.sub(b"", body, 1)
    end = cut.rstrip()
    if end.endswith(b"}") and end[:-1].rstrip().endswith(b","):  # it was the last one
        return end[:-1].rstrip()[:-1] + b"}"
    return cut


def _raw(body: bytes) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.json.decode(body)
    return document


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _finish(call: Call, options: StreamOptions | None, changes: dict[str, Any]) -> Call:
    """Set the body for the engine: always with usage in a stream, and otherwise as it came."""
    added: dict[str, Any] = {}
    if call.stream or call.assemble:
        if call.route != "responses" and (options is None or not options.include_usage):
            given = msgspec.to_builtins(options) if options is not None else {}
            wanted = {key: value for key, value in given.items() if value is not None}
            added["stream_options"] = {**wanted, "include_usage": True}
        if call.assemble:
            added["stream"] = True
        if call.shows_progress:
            added["return_progress"] = True
    if changes or (added and _names_any(call.body, added)):
        call.body = msgspec.json.encode({**_raw(call.body), **changes, **added})
    elif added:
        # The usual case: before the first field, without parsing the document again.
        start = call.body.index(b"{") + 1
        call.body = msgspec.json.encode(added)[:-1] + b"," + call.body[start:]
    return call


def _names_any(body: bytes, names: Iterable[str]) -> bool:
    """Whether one of the fields may be in the document, if only under a name with escapes in it."""
    return any(f'"{name}"'.encode() in body for name in names) or bool(_ESCAPED.search(body))
