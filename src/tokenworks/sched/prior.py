"""What is assumed of an engine whose processor nobody knows. `learned` puts it right."""

import msgspec


class Prior(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Assumptions, each to be overridden by who knows better; by default an 8B model on one GPU.

    A step takes `step_ns`, `sequence_ns` more for each sequence in it and `context_ns` for each
    token of their contexts. A prompt takes `step_ns` and `read_ns_per_token`; a step works on
    `step_tokens` at most. The replica draws `busy_w` at work.
    """

    step_ns: float = 10e6
    sequence_ns: float = 0.1e6
    context_ns: float = 40.0
    read_ns_per_token: float = 50e3
    step_tokens: int = 2048
    busy_w: float = 500.0
