"""A request made fit for a kind of engine: what that can't do, what is left out, what is added.

Pure functions over traits.py's records. No sockets, no clock. A request that names nothing a kind
minds goes through as the bytes it came in (`named`, `minds`), without being parsed again.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

import msgspec

from tokenworks.gateway.intake import ROUTES, Route
from tokenworks.gateway.schema import ChatRequest, Request, StreamOptions
from tokenworks.gateway.traits import KINDS, OPENAI, Priority, Traits

# Fields beyond OpenAI's that no answer depends on. `priority` is the gateway's to give, and not the
# client's to take.
_HINTS: Final = frozenset(
    {"cache_prompt", "priority", "request_id", "stream_reasoning", "timings_per_token"}
)

_KINDS: Final = tuple(KINDS.values())
# What is in messages and stream_options, and may have to go.
_INNER: Final = {path for traits in _KINDS for path in traits.dropped if "." in path}
_OF_MESSAGES: Final = tuple(
    sorted(path.removeprefix("messages[].") for path in _INNER if path.startswith("messages"))
)
_OF_STREAMS: Final = tuple(
    sorted(path.removeprefix("stream_options.") for path in _INNER if path.startswith("stream"))
)
_PLAIN_FORM: Final = {"type": "text"}  # a response_format that asks for nothing

_raw_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def named(request: Request, kinds: tuple[Traits, ...] = _KINDS) -> frozenset[str]:
    """What a decoded request sets of all that one of `kinds` minds, on top and inside."""
    names, values_of, looks_inside = _watched(type(request), kinds)
    values = values_of(request)
    found: list[str] = []
    if values.count(None) < len(values):
        found = [name for name, value in zip(names, values, strict=True) if value is not None]
    if not looks_inside:
        return frozenset(found)
    if isinstance(request, ChatRequest):
        for message in request.messages:
            if message.name or message.role == "assistant":
                found += [name for name in _OF_MESSAGES if getattr(message, name) is not None]
            if isinstance(message.content, list):
                found += [f"content.{part.type}" for part in message.content]
    options = getattr(request, "stream_options", None)
    if isinstance(options, StreamOptions):
        found += [name for name in _OF_STREAMS if getattr(options, name) is not None]
    return frozenset(found)


@lru_cache
def _watched(
    kind: type[Request], kinds: tuple[Traits, ...]
) -> tuple[list[str], Callable[[Request], tuple[Any, ...]], bool]:
    """The fields of a type of request that these kinds of engines mind, their values, and whether
    they mind what is in messages and options.
    """
    minded = {name for each in kinds for route in ROUTES for name in _minded(each, route)}
    names = sorted(minded.intersection(kind.__struct_fields__)) or ["model"]
    names *= 2 if len(names) == 1 else 1  # of one name alone attrgetter makes no tuple
    looks_inside = any(e.parts is not None or "." in "".join(e.dropped) for e in kinds)
    return names, attrgetter(*names), looks_inside


def minds(traits: Traits, route: Route, names: frozenset[str]) -> bool:
    """Whether this kind of engine may have to refuse or change a request with these fields `named`.

    False: `unable` is None and `scrub` takes off nothing but nulls.
    """
    if traits.parts is not None and any(name.startswith("content.") for name in names):
        return True
    return route in traits.absent or not _minded(traits, route).isdisjoint(names)


def unable(traits: Traits, route: Route, document: Mapping[str, Any]) -> str | None:
    """Why this kind of engine can't do what `document` asks for; None if it can.

    What it would ignore counts too, where the answer would be another one.
    """
    reason = traits.absent.get(route)
    if reason is not None:
        return f"/v1/{route} is not available here: {reason}"
    foreign = _foreign(traits)
    for name, value in document.items():
        if not value or value == _PLAIN_FORM:
            continue
        reason = traits.refused.get(name) or traits.refused.get(f"{route}.{name}")
        if reason is not None:
            return f"{name} is not supported here: {reason}"
        most = traits.at_most.get(name)
        if most is not None and _size(value) > most:
            return f"{name} is not supported here: {traits.title} takes at most {most}"
        if name in foreign and name not in _HINTS:
            return f"{name} is not supported here: {traits.title} does not know it"
    if traits.parts is not None:
        return _strange_part(traits.parts, document)
    return None


def scrub(traits: Traits, document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The document without what this kind of engine refuses or ignores, and the names left out.

    Only what changes nothing of the answer goes; for the rest ask `unable` first. `service_tier`
    goes without a word: the gateway itself keeps to it.
    """
    made = dict(document)
    made.pop("service_tier", None)
    names = [path for path in sorted(traits.dropped) if _drop(made, path)]
    foreign = _foreign(traits)
    for name, value in document.items():
        if name in foreign and name in _HINTS:
            del made[name]
            names.append(name)
        elif traits.is_strict and not value and (name in foreign or name in traits.refused):
            made.pop(name, None)  # it says nothing, but would be answered with 400
    return made, names


def prepare(
    traits: Traits,
    route: Route,
    body: bytes,
    names: frozenset[str],
    *,
    model: str | None = None,
    service_class: str | None = None,
    urgency: int | None = None,
) -> tuple[bytes, list[str]]:
    """The body for an engine of this kind, and the names of what was left out.

    `body` is the client's, or as intake.py changed it; `names` is what the client's has `named`.
    `model` is the engine's name for it where that is another one than the client's;
    `service_class` is given where the pool asks for the kind's tiers; `urgency`, where the pool has
    turned the engine's priorities on: lower goes first, as in the scheduler's Dispatch.
    """
    added: dict[str, Any] = {}
    if model is not None:
        added["model"] = model
    if service_class is not None and service_class in traits.tiers:
        added["service_tier"] = traits.tiers[service_class]
    left_out: list[str] = []
    document: dict[str, Any] | None = None
    if minds(traits, route, names) or (traits.is_strict and b"null" in body):
        document, left_out = scrub(traits, msgspec.json.decode(body))
    if urgency is not None and traits.priority is not None:
        place, value = traits.priority.field, rank(traits.priority, urgency)
        if "." in place:
            document = msgspec.json.decode(body) if document is None else document
            _set(document, place, value)
        else:
            added[place] = value
    if document is not None:
        return msgspec.json.encode({**document, **added}), left_out
    if added:
        # What is not changed is copied, and not parsed.
        raw = _raw_decoder.decode(body)
        raw.update({name: msgspec.Raw(msgspec.json.encode(value)) for name, value in added.items()})
        return msgspec.json.encode(raw), left_out
    return body, left_out


def rank(priority: Priority, urgency: int) -> float:
    """`urgency` (lower goes first, 0 is the middle) as this kind of engine counts."""
    if priority.is_share:
        # The middle is 0.5, which is what such an engine takes a request without one for.
        return 0.5 - urgency / (2 * (1 + abs(urgency)))
    return urgency if priority.low_first else -urgency


def warning(names: Iterable[str]) -> bytes:
    """The header line that tells the client what was left out; empty if nothing was."""
    told = ", ".join(names)
    return f"x-tokenworks-warning: ignored by the engine: {told}\r\n".encode() if told else b""


@lru_cache
def _foreign(traits: Traits) -> frozenset[str]:
    """Fields beyond OpenAI's that it does not take. Those that no kind has, the operator has let
    in: they pass."""
    return (OPENAI.extra_fields - traits.extra_fields) | {"priority"}


@lru_cache
def _minded(traits: Traits, route: Route) -> frozenset[str]:
    names = {path.rpartition(".")[2] for path in traits.dropped}
    names |= {path.removeprefix(f"{route}.") for path in traits.refused}
    return _foreign(traits) | names | set(traits.at_most) | {"service_tier"}


def _size(value: Any) -> float:
    if isinstance(value, int | float):
        return value
    return len(value) if isinstance(value, list) else 1


def _strange_part(parts: frozenset[str], document: Mapping[str, Any]) -> str | None:
    for message in document.get("messages") or ():
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") not in parts:
                return (
                    f"content of type {part.get('type')!r} is not supported here: "
                    f"this engine takes {', '.join(sorted(parts))}"
                )
    return None


def _drop(made: dict[str, Any], path: str) -> bool:
    """Take a field off; whether it said anything. Records inside are replaced, not changed."""
    outer, _, name = path.rpartition(".")
    if not outer:
        return bool(made.pop(name, None))
    is_list = outer.endswith("[]")
    outer = outer.removesuffix("[]")
    inside = made.get(outer)
    records = inside if is_list and isinstance(inside, list) else [inside]
    fresh = [_without(record, name) for record in records]
    if fresh != records:
        made[outer] = fresh if is_list else fresh[0]
    return any(isinstance(record, dict) and record.get(name) for record in records)


def _without(record: Any, name: str) -> Any:
    if not isinstance(record, dict):
        return record
    return {key: value for key, value in record.items() if key != name}


def _set(document: dict[str, Any], path: str, value: Any) -> None:
    """Set a field inside objects, which are made where there are none."""
    *outer, name = path.split(".")
    for key in outer:
        inside = document.get(key)
        document[key] = document = dict(inside) if isinstance(inside, dict) else {}
    document[name] = value


def tables() -> str:
    """What docs/adapters.md says of each kind, as Markdown."""
    rows = list(KINDS.values())
    shared = frozenset.intersection(*[frozenset(t.refused) for t in rows if t.refused])
    labels = frozenset.intersection(*[t.dropped for t in rows if t.dropped])
    return "\n".join(
        [
            f"Refused by all but `openai`: {_ticked(shared)}.\n",
            f"Left out by all but `openai`: {_ticked(labels)}.\n",
            "| kind | engine | refuses further | leaves out further | unknown fields |",
            "|---|---|---|---|---|",
            *[_fields_row(traits, shared, labels) for traits in rows],
            "",
            "| kind | health | telemetry | running, waiting, share of the KV cache |",
            "|---|---|---|---|",
            *[_health_row(traits) for traits in rows],
            "",
            "| kind | priority | needs | a chat answer goes on | KV cache moves |",
            "|---|---|---|---|---|",
            *[_order_row(traits) for traits in rows],
        ]
    )


def _ticked(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"


def _fields_row(traits: Traits, shared: frozenset[str], labels: frozenset[str]) -> str:
    refused = _ticked((traits.refused.keys() - shared) | {f"/v1/{name}" for name in traits.absent})
    bounds = "".join(f"; `{name}` over {most}" for name, most in traits.at_most.items())
    unknown = "400" if traits.is_strict else "passed on" if traits is OPENAI else "ignored"
    left_out = _ticked(traits.dropped - labels)
    return f"| `{traits.kind}` | {traits.title} | {refused}{bounds} | {left_out} | {unknown} |"


def _health_row(traits: Traits) -> str:
    gauges = traits.gauges
    paths = ", ".join(f"`{path}`" for path in gauges.paths) or "none"
    names = [*gauges.running, *gauges.waiting, *gauges.kv] if gauges.paths else []
    told = ", ".join(f"`{name}`" for name in names) or "none"
    if gauges.slots:
        told += f"; else `{gauges.slots}`"
    health = ", ".join(f"`{path}`" for path in traits.health)
    return f"| `{traits.kind}` | {health} | {paths} | {told} |"


def _order_row(traits: Traits) -> str:
    first = traits.priority
    field, needs = "none", "nothing"
    if first is not None:
        sign = "lower" if first.low_first else "higher"
        field = f"`{first.field}`, {sign} first{', 0 to 1' if first.is_share else ''}"
        needs = first.needs
    way = traits.continuation
    goes_on = "no"
    if way is not None:
        ways = ["by `continue_final_message`"] if way.by_flag else []
        ways += ["any assistant's message at the end"] if way.always else []
        goes_on = "; ".join(ways)
    moves = f"`{traits.kv_handover}`" if traits.kv_handover else "no"
    return f"| `{traits.kind}` | {field} | {needs} | {goes_on} | {moves} |"
