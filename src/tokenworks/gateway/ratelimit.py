"""What a tenant or a key may use, and how much of it is used. No clock: times are arguments.

Per minute there are token buckets (GCRA): a bucket holds a minute's limit L, is empty at first and
drains by L/60 each second; what doesn't fit is refused. So any window of w seconds admits at most
L * (1 + w / 60) requests, and as many tokens: reserved ones, less those given back in the window.
Per day there are fixed UTC days: at most the limit in each. A request's tokens are reserved when it
is admitted and corrected when it ends; in the day's sum they belong to the day it ends in.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, TypeAlias

from tokenworks.gateway.allowance import Allowance
from tokenworks.gateway.problem import Problem
from tokenworks.sched.config import ServiceClass
from tokenworks.units import show

# How much is left (infinite without a limit), the headers' form, seconds until all of it is back.
Left: TypeAlias = tuple[float, bytes, float]

_DAY_S: Final = 86_400
_NONE: Final = math.inf
# Sums of floats may be off by this much; no whole request or token fits into it.
_SLACK: Final = 1e-6
_SECONDS: Final = tuple(b"%gs" % (hundredths / 100) for hundredths in range(6000))


class Days:
    """Which UTC day and month it is, by a wall clock (`unix_s`) that may step.

    Only a later day opens a new window; a clock that is put back goes on with the one there is. So
    a step gives or takes at most one window. `*_ends_s` are in the monotonic seconds of `look`.
    """

    def __init__(self, unix_s: Callable[[], float]) -> None:
        self._unix_s = unix_s
        self.day = int(unix_s() // _DAY_S)
        self.month = month_of(self.day)
        self.day_ends_s = self.month_ends_s = self.look_s = -_NONE

    def look(self, now_s: float) -> tuple[bool, bool]:
        """Look at the wall clock, and again at `look_s`: (is it a new day, a new month)."""
        unix_s = self._unix_s()
        day = int(unix_s // _DAY_S)
        month = month_of(day)
        is_new = day > self.day, month > self.month
        self.day, self.month = day, month
        self.day_ends_s = now_s + (day + 1) * _DAY_S - unix_s
        year, index = divmod(month + 1, 12)
        self.month_ends_s = now_s + datetime(year, index + 1, 1, tzinfo=UTC).timestamp() - unix_s
        self.look_s = min(now_s + 1.0, self.day_ends_s)
        return is_new


def month_of(day: int) -> int:
    """The month (12 to a year) of a day since 1970."""
    date = datetime.fromtimestamp(day * _DAY_S, UTC)
    return date.year * 12 + date.month - 1


class Meter:
    """What one tenant or key has used of its allowance. `whose` is for messages ("tenant acme")."""

    __slots__ = (
        "_at_s",
        "_concurrent",
        "_forms",
        "_request_rate",
        "_requests",
        "_requests_per_day",
        "_requests_per_minute",
        "_token_rate",
        "_tokens",
        "_tokens_per_day",
        "_tokens_per_minute",
        "allowance",
        "energy_j_today",
        "is_guarded",
        "is_limited",
        "requests_today",
        "reserved",
        "running",
        "tokens_today",
        "usd_month",
        "usd_today",
        "whose",
    )

    def __init__(self, whose: str, allowance: Allowance) -> None:
        self.whose = whose
        self.running = 0
        self.reserved = 0  # tokens of what runs
        self.requests_today = 0
        self.tokens_today = 0  # of what has ended
        self.usd_today = self.usd_month = self.energy_j_today = 0.0
        self._requests = self._tokens = 0.0  # in the minute's buckets, as of _at_s
        self._at_s = -_NONE
        self.change(allowance)

    def change(self, allowance: Allowance) -> None:
        """Go on with other limits and what was used so far; a new bucket starts empty."""
        rates = (
            allowance.requests_per_minute,
            allowance.tokens_per_minute,
            allowance.requests_per_day,
            allowance.tokens_per_day,
            allowance.concurrent,
        )
        self.allowance = allowance
        self.is_limited = any(rates)
        # Asked on every request: whether there is anything at all for `guard` to look at.
        self.is_guarded = allowance.classes is not None or allowance.models is not None
        self.is_guarded |= any(
            (
                allowance.budget_usd_per_day,
                allowance.budget_usd_per_month,
                allowance.budget_j_per_day,
            )
        )
        (
            self._requests_per_minute,
            self._tokens_per_minute,
            self._requests_per_day,
            self._tokens_per_day,
            self._concurrent,
        ) = (rate or _NONE for rate in rates)
        self._request_rate = self._requests_per_minute / 60
        self._token_rate = self._tokens_per_minute / 60
        self._forms = (
            _form("requests", allowance.requests_per_day),
            _form("requests", allowance.requests_per_minute),
            _form("tokens", allowance.tokens_per_day),
            _form("tokens", allowance.tokens_per_minute),
        )

    def new_day(self) -> None:
        """A UTC day has begun."""
        self.requests_today = self.tokens_today = 0
        self.usd_today = self.energy_j_today = 0.0

    def new_month(self) -> None:
        """A UTC month has begun."""
        self.usd_month = 0.0

    def has_room(self, tokens: int, now_s: float) -> bool:
        """Whether a request of so many tokens fits into all limits now."""
        self._drain(now_s)
        return (
            self.running < self._concurrent
            and self._requests + 1 <= self._requests_per_minute + _SLACK
            and self._tokens + tokens <= self._tokens_per_minute + _SLACK
            and self.requests_today < self._requests_per_day
            and self.tokens_today + self.reserved + tokens <= self._tokens_per_day
        )

    def take(self, tokens: int) -> None:
        """Count a request that was found room for."""
        self.running += 1
        self.reserved += tokens
        self.requests_today += 1
        if self.is_limited:
            self._requests += 1
            self._tokens += tokens

    def settle(self, reserved: int, tokens: int, now_s: float) -> None:
        """Count a request's end: `tokens` take the place of what was `reserved` for it."""
        self.running -= 1
        self.reserved -= reserved
        self.tokens_today += tokens
        if self.is_limited and tokens != reserved:
            if tokens > reserved:  # what is given back drains to the same, before or after
                self._drain(now_s)
            level = self._tokens + tokens - reserved
            self._tokens = level if level > 0.0 else 0.0  # noqa: FURB136

    def spend(self, usd: float, energy_j: float) -> None:
        """Count dollars and joules."""
        self.usd_today += usd
        self.usd_month += usd
        self.energy_j_today += energy_j

    def left(self, now_s: float, day_s: float) -> tuple[Left, Left]:
        """Of the limits on requests the one with least left, and of those on tokens.

        `day_s` are the seconds until the day ends.
        """
        self._drain(now_s)
        minute = self._requests_per_minute - self._requests
        day: float = self._requests_per_day - self.requests_today
        if day < minute:
            requests = (day, self._forms[0], day_s)
        else:
            requests = (minute, self._forms[1], self._requests / self._request_rate)
        minute = self._tokens_per_minute - self._tokens
        day = self._tokens_per_day - self.tokens_today - self.reserved
        if day < minute:
            return requests, (day, self._forms[2], day_s)
        return requests, (minute, self._forms[3], self._tokens / self._token_rate)

    def guard(
        self, service_class: ServiceClass, model: str, days: Days, now_s: float
    ) -> Problem | None:
        """Why a request may not be made at all: its class, its model, or no money left."""
        allowed = self.allowance
        if allowed.classes is not None and service_class not in allowed.classes:
            return self._forbidden("class", service_class, allowed.classes)
        if allowed.models is not None and model not in allowed.models:
            return self._forbidden("model", model, allowed.models)
        for used, budget, unit, period, ends_s in (
            (self.usd_month, allowed.budget_usd_per_month, "$", "month", days.month_ends_s),
            (self.usd_today, allowed.budget_usd_per_day, "$", "day", days.day_ends_s),
            (self.energy_j_today, allowed.budget_j_per_day, "J", "day", days.day_ends_s),
        ):
            if budget is not None and used >= budget:
                spent, whole = (
                    (f"${used:,.2f}", f"${budget:,.2f}")
                    if unit == "$"
                    else (show(used, unit), show(budget, unit))
                )
                wait_s = whole_s(ends_s - now_s)
                return Problem(
                    429,
                    f"The budget of {self.whose} is used up: {spent} of {whole} per {period}. The "
                    f"next {period} (UTC) begins in {span(wait_s).decode()}.",
                    code="insufficient_quota",
                    retry_after_s=wait_s,
                )
        return None

    def refusal(self, tokens: int, day_s: float) -> tuple[float, Problem]:
        """Why there is no room, after `has_room` has said so: (seconds to wait, what to tell).

        Of several limits the one with the longest wait: after it all of them let the request in,
        if nothing else comes. Infinite where the request is larger than a limit.
        """
        for what, limit in (("minute", self._tokens_per_minute), ("day", self._tokens_per_day)):
            if tokens > limit:
                return _NONE, Problem(  # 413 as Groq does: to send it again would not help
                    413,
                    f"This request needs up to {tokens:,} tokens, and {self.whose} has a limit of "
                    f"{limit:,} tokens per {what}. Shorten it, or ask for fewer tokens.",
                    code="rate_limit_exceeded",
                )
        used, today = math.ceil(self._tokens - _SLACK), self.tokens_today + self.reserved
        found: list[tuple[float, str]] = []

        def tell(
            over: float, wait_s: float, limit: float, what: str, used: int, asked: int
        ) -> None:
            if over > 0:
                told = f"{limit:,} {what}, {used:,} used, {asked:,} asked for"
                found.append((wait_s, told))

        limit, over = self._requests_per_minute, self._requests + 1 - self._requests_per_minute
        requests = math.ceil(self._requests - _SLACK)
        tell(over - _SLACK, over / self._request_rate, limit, "requests per minute", requests, 1)
        limit, over = self._tokens_per_minute, self._tokens + tokens - self._tokens_per_minute
        tell(over - _SLACK, over / self._token_rate, limit, "tokens per minute", used, tokens)
        limit, over = self._requests_per_day, self.requests_today + 1 - self._requests_per_day
        tell(over, day_s, limit, "requests per day", self.requests_today, 1)
        limit, over = self._tokens_per_day, today + tokens - self._tokens_per_day
        tell(over, day_s, limit, "tokens per day", today, tokens)
        # When one of them ends is not known, so a client is let in soon after it might have.
        limit, over = self._concurrent, self.running + 1 - self._concurrent
        tell(over, 1.0, limit, "requests at once", self.running, 1)
        seconds, told = max(found)
        wait_s = whole_s(seconds)
        return seconds, Problem(
            429,
            f"Rate limit of {self.whose} reached: {told}. Try again in {span(wait_s).decode()}.",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )

    def _drain(self, now_s: float) -> None:
        # Here and in `settle` no call of max(): it takes longer than all the rest.
        elapsed_s = now_s - self._at_s
        if elapsed_s > 0.0:
            self._at_s = now_s
            level = self._requests - elapsed_s * self._request_rate
            self._requests = level if level > 0.0 else 0.0  # noqa: FURB136
            level = self._tokens - elapsed_s * self._token_rate
            self._tokens = level if level > 0.0 else 0.0  # noqa: FURB136

    def _forbidden(self, kind: str, asked: str, allowed: tuple[str, ...]) -> Problem:
        return Problem(
            403,
            f"The {kind} {asked!r} is not open to {self.whose}. Open are: {', '.join(allowed)}.",
            param="service_tier" if kind == "class" else kind,
            code=f"{kind}_not_allowed",
        )


def _form(kind: str, limit: int | None) -> bytes:
    """The headers of one limit, with places for what is left and when all of it is there."""
    if limit is None:
        return b""
    return (
        f"x-ratelimit-limit-{kind}: {limit}\r\nx-ratelimit-remaining-{kind}: %d\r\n"
        f"x-ratelimit-reset-{kind}: %b\r\n"
    ).encode()


def lines(left: Left) -> bytes:
    """Headers that tell what is left, each with its end of line; b"" of what has no limit."""
    amount, form, reset_s = left
    if not form:
        return b""
    # A hair above, so that 58.9999999 of a bucket that drains is 59.
    return form % (int(amount + _SLACK) if amount > 0.0 else 0, span(reset_s))


def whole_s(seconds: float) -> int:
    """Seconds to wait, as Retry-After has them: whole, rounded up, at least one."""
    return max(1, math.ceil(seconds))


def span(seconds: float) -> bytes:
    """A time as Groq writes it, to a hundredth of a second and never too short: b"2m59.56s"."""
    hundredths = int(seconds * 100 + 0.999999)
    if hundredths < 6000:
        return _SECONDS[hundredths]
    minutes, hundredths = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    text = b"%dm%b" % (minutes, _SECONDS[hundredths])
    return b"%dh%b" % (hours, text) if hours else text
