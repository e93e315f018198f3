"""A leg's part in a hand-over: it reads for another, is held in mid-answer, or goes on."""

from tokenworks.gateway.intake import Call
from tokenworks.gateway.resume import Said
from tokenworks.sched.messages import SendKv


class Passage:
    """`base`: the leg's call as it would be without one. `reads`: it is to say one token and to
    keep its cache, which `keeps` says as long as it does; `first` is what it said and `before` what
    was said before it, `ends` whether that is all; `params` are for who goes on, `cached_tokens`
    what it need not read. `command` is not answered yet, and was given at `since_ns`.
    """

    __slots__ = (
        "base", "before", "cached_tokens", "command", "ends", "first", "keeps", "params", "reads",
        "since_ns",
    )  # fmt: skip

    def __init__(self, base: Call, *, reads: bool = False, keeps: bool = False) -> None:
        self.base, self.reads, self.keeps = base, reads, keeps
        self.ends = False
        self.first = Said()
        self.before: Said | None = None
        self.params: object = None
        self.cached_tokens = 0
        self.command: SendKv | None = None
        self.since_ns = 0
