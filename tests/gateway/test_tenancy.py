"""Limits of tenants and keys: exactly what fits is let in, in any order of events and clocks."""

from datetime import UTC, datetime
from fractions import Fraction
from typing import ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenworks.gateway.allowance import Allowance, TenantSettings, Used
from tokenworks.gateway.keys import Key
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.ratelimit import span
from tokenworks.gateway.tenancy import Tenancy, tenant_of
from tokenworks.sched.config import ServiceClass

NOON = datetime(2026, 11, 3, 12, tzinfo=UTC).timestamp()
DAY_S = 86_400
TODAY = int(NOON // DAY_S)


class Clocks:
    """A monotonic clock and a wall clock that steps."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.step_s = 0.0

    def unix_s(self) -> float:
        return NOON + self.now_s - 1000 + self.step_s


class Tenants:
    """A tenancy whose clocks a test turns."""

    def __init__(self, **tenants: TenantSettings) -> None:
        self.clocks = Clocks()
        self.tenancy = Tenancy(tenants, self.clocks.unix_s)

    def wait(self, seconds: float) -> None:
        self.clocks.now_s += seconds

    def admit(
        self,
        key: Key | None,
        tokens: int = 1,
        service_class: ServiceClass = "standard",
        model: str = "m",
    ) -> Problem | None:
        return self.tenancy.admit(key, service_class, model, tokens, self.clocks.now_s)

    def settle(self, key: Key | None, reserved: int = 1, tokens: int = 1, usd: float = 0) -> None:
        self.tenancy.settle(key, reserved, tokens, usd, self.clocks.now_s)

    def refused(self, key: Key | None, tokens: int = 1) -> Problem:
        problem = self.admit(key, tokens)
        assert problem is not None
        return problem

    def headers(self, key: Key | None) -> dict[str, str]:
        lines = self.tenancy.headers(key, self.clocks.now_s).decode()
        assert not lines or lines.endswith("\r\n")
        return dict(line.split(": ") for line in lines.split("\r\n")[:-1])


def key(name: str, tenant: str = "", **limits: object) -> Key:
    return Key(name, "", "", f"id-{name}", tenant, limits=msgspec.convert(limits, Allowance))


def limited(**limits: object) -> TenantSettings:
    return msgspec.convert(limits, TenantSettings)


ALICE, BOB = key("alice", "acme"), key("bob", "acme")


# What is let in


def test_a_minutes_requests_at_once_then_one_by_one() -> None:
    tenants = Tenants(acme=limited(requests_per_minute=60))
    assert [tenants.admit(ALICE) for _ in range(60)] == [None] * 60
    problem = tenants.refused(ALICE)
    assert (problem.status, problem.code) == (429, "rate_limit_exceeded")
    assert problem.retry_after_s == 1
    for told in ("tenant acme", "60 requests per minute", "60 used", "Try again in 1s"):
        assert told in problem.message
    tenants.wait(0.99)
    tenants.refused(ALICE)
    tenants.wait(0.01)
    assert tenants.admit(BOB) is None
    tenants.refused(ALICE)


def test_tokens_are_reserved_and_what_was_too_much_comes_back() -> None:
    tenants = Tenants(acme=limited(tokens_per_minute=600, tokens_per_day=1000))
    assert tenants.admit(ALICE, 500) is None
    problem = tenants.refused(ALICE, 200)
    assert "600 tokens per minute, 500 used, 200 asked for" in problem.message
    assert problem.retry_after_s == 10
    tenants.settle(ALICE, 500, 100)
    assert tenants.admit(ALICE, 500) is None
    tenants.settle(ALICE, 500, 700)  # more than was thought: a debt
    assert tenants.refused(ALICE, 100).retry_after_s == 30
    tenants.wait(30)
    assert tenants.admit(ALICE, 100) is None
    tenants.wait(60)
    assert "1,000 tokens per day, 900 used" in tenants.refused(ALICE, 101).message


def test_what_is_settled_late_counts_from_then_on() -> None:
    tenants = Tenants(acme=limited(tokens_per_minute=600))
    left = "x-ratelimit-remaining-tokens"
    assert tenants.admit(ALICE, 100) is None
    tenants.wait(60)
    tenants.settle(ALICE, 100, 400)
    assert tenants.headers(ALICE)[left] == "300"
    tenants.wait(60)
    assert tenants.admit(ALICE, 100) is None
    tenants.wait(5)
    assert tenants.headers(ALICE)[left] == "550"
    tenants.settle(ALICE, 100, 0)  # half of it had come back by itself
    assert tenants.headers(ALICE)[left] == "600"


def test_what_can_never_fit_says_so_without_a_time() -> None:
    for name, per in (("tokens_per_minute", "minute"), ("tokens_per_day", "day")):
        tenants = Tenants(acme=limited(**{name: 600}))
        problem = tenants.refused(ALICE, 601)
        assert (problem.status, problem.code) == (413, "rate_limit_exceeded")
        assert problem.retry_after_s is None
        assert f"600 tokens per {per}" in problem.message
        assert tenants.admit(ALICE, 600) is None


def test_at_once() -> None:
    tenants = Tenants(acme=limited(concurrent=2))
    assert tenants.admit(ALICE) is None
    assert tenants.admit(BOB) is None
    assert "2 requests at once" in tenants.refused(ALICE).message
    tenants.settle(BOB)
    assert tenants.admit(ALICE) is None


def test_a_day_is_a_utc_day() -> None:
    tenants = Tenants(acme=limited(requests_per_day=1))
    assert tenants.admit(ALICE) is None
    problem = tenants.refused(ALICE)
    assert problem.retry_after_s == DAY_S // 2
    assert "1 requests per day, 1 used, 1 asked for. Try again in 12h0m0s" in problem.message
    tenants.wait(DAY_S // 2 - 0.001)
    tenants.refused(ALICE)
    tenants.wait(0.001)
    assert tenants.admit(ALICE) is None


def test_over_midnight_tokens_belong_to_the_day_they_end_in() -> None:
    tenants = Tenants(acme=limited(tokens_per_day=100))
    assert tenants.admit(ALICE, 100) is None
    tenants.wait(DAY_S)
    tenants.refused(ALICE, 1)
    tenants.settle(ALICE, 100, 40)
    assert tenants.admit(ALICE, 60) is None
    tenants.refused(ALICE, 1)


def test_of_several_limits_the_longest_wait_is_told() -> None:
    tenants = Tenants(acme=limited(requests_per_minute=1))
    slow = key("slow", "acme", requests_per_minute=60, tokens_per_minute=60)
    assert tenants.admit(slow, 60) is None
    tenants.wait(29)
    problem = tenants.refused(slow, 30)
    assert "tenant acme" in problem.message
    assert problem.retry_after_s == 31
    tenants.wait(31)
    assert tenants.admit(slow, 60) is None
    once = key("once", "other", requests_per_minute=1, requests_per_day=1, concurrent=1)
    assert tenants.admit(once) is None
    assert "requests per day" in tenants.refused(once).message


def test_nothing_is_counted_where_any_limit_refuses() -> None:
    tenants = Tenants(acme=limited(requests_per_minute=10, tokens_per_minute=10, concurrent=10))
    strict = key("strict", "acme", requests_per_day=1)
    assert tenants.admit(strict) is None
    before = tenants.headers(ALICE)
    for _ in range(20):
        tenants.refused(strict)
        tenants.refused(ALICE, 11)
    assert tenants.headers(ALICE) == before
    assert [tenants.admit(ALICE) for _ in range(9)] == [None] * 9


def test_keys_keep_to_their_own_limits_and_share_their_tenants() -> None:
    tenants = Tenants(acme=limited(requests_per_day=3))
    small = key("small", "acme", requests_per_day=1)
    assert tenants.admit(small) is None
    assert "key small" in tenants.refused(small).message
    assert [tenants.admit(ALICE) for _ in range(2)] == [None] * 2
    assert "tenant acme" in tenants.refused(BOB).message


def test_each_tenant_that_is_not_listed_has_the_defaults_to_itself() -> None:
    tenants = Tenants(default=limited(requests_per_day=1, weight=0.5), acme=limited(weight=2))
    for caller in (key("carol"), key("dave"), key("erin", "other"), None):
        assert tenants.admit(caller) is None
        tenants.refused(caller)
    assert [tenant_of(one) for one in (key("carol"), ALICE, None)] == ["carol", "acme", "default"]
    assert tenants.tenancy.settings("acme").weight == 2
    assert tenants.tenancy.settings("carol").weight == 0.5
    assert Tenants().tenancy.settings("carol") == TenantSettings()


def test_classes_and_models() -> None:
    tenants = Tenants(acme=limited(classes=["standard", "flex"], requests_per_day=1))
    small = key("small", "acme", models=["m"])
    problem = tenants.admit(ALICE, service_class="realtime")
    assert problem is not None
    assert (problem.status, problem.code) == (403, "class_not_allowed")
    assert problem.param == "service_tier"
    assert "standard, flex" in problem.message
    problem = tenants.admit(small, model="other")
    assert problem is not None
    assert (problem.status, problem.code, problem.param) == (403, "model_not_allowed", "model")
    assert tenants.admit(small, service_class="flex") is None


def test_without_limits_everything_goes() -> None:
    tenants = Tenants()
    for caller in (ALICE, None):
        assert [tenants.admit(caller, 10**9) for _ in range(1000)] == [None] * 1000
        assert tenants.headers(caller) == {}


# Money


def test_budgets() -> None:
    tenants = Tenants(acme=limited(budget_usd_per_day=5, budget_usd_per_month=8))
    assert tenants.admit(ALICE) is None
    tenants.settle(ALICE, usd=5.25)
    problem = tenants.refused(BOB)
    assert (problem.status, problem.code) == (429, "insufficient_quota")
    assert "tenant acme is used up: $5.25 of $5.00 per day" in problem.message
    assert problem.retry_after_s == DAY_S // 2
    tenants.wait(DAY_S // 2)
    assert tenants.admit(BOB) is None
    tenants.settle(BOB, usd=2.75)
    problem = tenants.refused(ALICE)
    assert "$8.00 of $8.00 per month" in problem.message
    december = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
    assert problem.retry_after_s == december - tenants.clocks.unix_s()
    tenants.wait(problem.retry_after_s)
    assert tenants.admit(ALICE) is None


def test_joules_and_batches_count_towards_budgets_alone() -> None:
    tenants = Tenants(acme=limited(budget_j_per_day=1000, requests_per_day=1, concurrent=1))
    for _ in range(10):
        now_s = tenants.clocks.now_s
        assert tenants.tenancy.check(ALICE, "batch", "m", now_s) is None
        tenants.tenancy.spend(ALICE, 0, 100, now_s)
    problem = tenants.tenancy.check(ALICE, "batch", "m", tenants.clocks.now_s)
    assert problem is not None
    assert "1 kJ of 1 kJ per day" in problem.message
    tenants.wait(DAY_S)
    assert tenants.admit(ALICE) is None


# Headers


def test_headers_in_groqs_form() -> None:
    tenants = Tenants(acme=limited(requests_per_minute=60, tokens_per_minute=6000))
    assert tenants.admit(ALICE, 766) is None
    assert tenants.headers(BOB) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5234",
        "x-ratelimit-reset-tokens": "7.66s",
    }
    tenants.wait(7.66)
    assert tenants.headers(BOB)["x-ratelimit-remaining-tokens"] == "6000"
    assert tenants.headers(BOB)["x-ratelimit-reset-tokens"] == "0s"


def test_headers_tell_the_limit_with_least_left() -> None:
    tenants = Tenants(acme=limited(requests_per_day=100))
    small = key("small", "acme", requests_per_minute=5)
    assert tenants.admit(small) is None
    told = tenants.headers(small)
    assert told["x-ratelimit-limit-requests"] == "5"
    assert told["x-ratelimit-remaining-requests"] == "4"
    assert "x-ratelimit-limit-tokens" not in told
    for _ in range(96):
        assert tenants.admit(ALICE) is None
    told = tenants.headers(small)
    assert told["x-ratelimit-limit-requests"] == "100"
    assert told["x-ratelimit-remaining-requests"] == "3"
    assert told["x-ratelimit-reset-requests"] == "12h0m0s"


def test_headers_of_a_refusal() -> None:
    tenants = Tenants(acme=limited(tokens_per_day=10))
    assert tenants.admit(ALICE, 10) is None
    tenants.refused(ALICE)
    assert tenants.headers(ALICE)["x-ratelimit-remaining-tokens"] == "0"
    tenants.settle(ALICE, 10, 15)
    assert tenants.headers(ALICE)["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.001, "0.01s"),
        (7.66, "7.66s"),
        (59.999, "1m0s"),
        (179.56, "2m59.56s"),
        (3600, "1h0m0s"),
        (86399.5, "23h59m59.5s"),
    ],
)
def test_times_as_groq_writes_them(seconds: float, text: str) -> None:
    assert span(seconds) == text.encode()


# Reload and restart


def test_a_reload_keeps_what_was_used_and_what_runs() -> None:
    tenants = Tenants()
    assert [tenants.admit(ALICE, 10) for _ in range(3)] == [None] * 3
    tenants.settle(ALICE, 10, 10, usd=2)
    tenants.tenancy.reload({"acme": limited(concurrent=2)})
    assert "requests at once" in tenants.refused(ALICE).message
    tenants.tenancy.reload({"acme": limited(requests_per_day=3)})
    assert "requests per day, 3 used" in tenants.refused(ALICE).message
    tenants.tenancy.reload({"acme": limited(tokens_per_minute=100)})
    assert tenants.admit(ALICE, 80) is None
    tenants.tenancy.reload({"acme": limited(tokens_per_minute=60)})
    assert "60 tokens per minute, 80 used, 1 asked" in tenants.refused(ALICE, 1).message
    tenants.tenancy.reload({"acme": limited(budget_usd_per_month=2)})
    assert tenants.refused(ALICE).code == "insufficient_quota"
    tenants.tenancy.reload({})
    for reserved in (10, 10, 80):
        tenants.settle(ALICE, reserved, 0)
    tenants.tenancy.reload({"acme": limited(concurrent=1)})
    assert tenants.admit(ALICE) is None
    assert tenants.admit(ALICE) is not None


def test_after_a_restart_the_day_and_the_money_go_on() -> None:
    tenants = Tenants(acme=limited(tokens_per_day=1000, budget_usd_per_month=10))
    small = key("small", "acme", requests_per_day=5)
    tenants.tenancy.restore(
        [
            Used("acme", "id-alice", TODAY, 7, 300, 1.0),
            Used("acme", "id-small", TODAY, 4, 500, 1.0),
            Used("acme", "id-small", TODAY - 1, 900, 900, 6.0),
            Used("acme", "id-small", TODAY - 40, 900, 900, 100.0),
        ]
    )
    assert tenants.admit(ALICE, 201) is not None
    assert tenants.admit(small) is None
    assert "5 requests per day, 5 used" in tenants.refused(small).message
    tenants.settle(small, usd=2)
    assert "$10.00 of $10.00 per month" in tenants.refused(ALICE).message


def test_a_key_that_changes_meanwhile_leaks_nothing() -> None:
    tenants = Tenants(acme=limited(concurrent=1), other=limited(concurrent=1))
    before, after = key("alice", "acme", concurrent=1), key("alice", "other")
    assert tenants.admit(before) is None
    assert tenants.admit(after) is None
    tenants.settle(before)
    tenants.settle(after)
    for one in (before, after):
        assert tenants.admit(one) is None
        tenants.settle(one)


# Clocks


@pytest.mark.parametrize("step_s", [3600.0, -3600.0, 40 * DAY_S, -40 * DAY_S, 86_400 * 4000])
def test_a_step_of_the_clock_gives_or_takes_one_window(step_s: float) -> None:
    tenants = Tenants(acme=limited(requests_per_day=10, requests_per_minute=1000))
    plain, days = 0, 5
    for hour in range(24 * days):
        if hour == 30:
            tenants.clocks.step_s = step_s
        while tenants.admit(ALICE) is None:
            plain += 1
        tenants.wait(3600)
    # Noon to noon touches one day more than there are.
    assert days * 10 <= plain <= (days + 2) * 10


def test_a_clock_that_swings_over_midnight_gives_one_window() -> None:
    tenants = Tenants(acme=limited(requests_per_day=1))
    tenants.wait(DAY_S // 2)
    let_in = 0
    for step_s in (0, -10, 0):
        tenants.clocks.step_s = step_s
        for _ in range(3):
            let_in += tenants.admit(ALICE) is None
            tenants.wait(1)
    assert let_in == 2


# Settings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("weight = 0", "weight is 0"),
        ("requests_per_minute = -1", "requests_per_minute is -1"),
        ("requests_per_minute = 1.5", "Expected `int | null`, got `float`"),
        ("budget_usd_per_day = inf", "budget_usd_per_day is inf"),
        ("classes = []", "classes is empty"),
        ("classes = ['gold']", "gold"),
        ("request_per_minute = 1", "unknown field `request_per_minute`"),
    ],
)
def test_a_tenant_that_is_wrong_is_told(text: str, told: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=told.replace("|", r"\|")):
        msgspec.toml.decode(text, type=TenantSettings)


# Laws


@given(
    limit=st.integers(1, 50),
    calls=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 50)), max_size=60),
    of=st.sampled_from(["requests", "tokens"]),
)
def test_all_that_fits_and_no_more(limit: int, calls: list[tuple[int, int]], of: str) -> None:
    """Beside a bucket in exact fractions; and the bound on every window that GCRA gives."""
    tenants = Tenants(acme=limited(**{f"{of}_per_minute": limit}))
    level, at_ms, begun_s = Fraction(0), 0, tenants.clocks.now_s
    taken: list[tuple[int, int]] = []
    for wait_ms, tokens in calls:
        amount = tokens if of == "tokens" else 1
        at_ms += wait_ms
        tenants.clocks.now_s = begun_s + at_ms / 1000
        level = max(Fraction(0), level - Fraction(wait_ms * limit, 60_000))
        problem = tenants.admit(ALICE, tokens)
        assert (problem is None) == (level + amount <= limit)
        if problem is None:
            level += amount
            taken.append((at_ms, amount))
        elif amount <= limit:
            assert problem.retry_after_s is not None
            wait = (level + amount - limit) * 60 / limit  # not a second too long
            assert wait <= problem.retry_after_s < 1 + max(Fraction(1), wait)
    for i, (first_ms, _) in enumerate(taken):
        total = 0
        for last_ms, amount in taken[i:]:
            total += int(amount)
            assert 60_000 * total <= limit * (60_000 + last_ms - first_ms)


class Traffic(RuleBasedStateMachine):
    """Two keys of a tenant, one with limits of its own, in virtual time over some days."""

    LIMITS: ClassVar = {
        "requests_per_minute": 12,
        "requests_per_day": 30,
        "tokens_per_minute": 1000,
        "tokens_per_day": 3000,
        "concurrent": 5,
    }
    OWN: ClassVar = {"requests_per_minute": 6, "tokens_per_day": 900, "concurrent": 2}

    def __init__(self) -> None:
        super().__init__()
        self.tenants = Tenants(acme=limited(**self.LIMITS))
        self.own = key("own", "acme", **self.OWN)
        self.running: list[tuple[Key, int]] = []
        self.begun: dict[int, int] = {}  # requests by day
        self.ended: dict[int, int] = {}  # tokens by day

    @property
    def day(self) -> int:
        return int(self.tenants.clocks.unix_s() // DAY_S)

    @rule(is_own=st.booleans(), tokens=st.integers(0, 400))
    def arrive(self, is_own: bool, tokens: int) -> None:
        caller = self.own if is_own else ALICE
        problem = self.tenants.admit(caller, tokens)
        if problem is None:
            self.running.append((caller, tokens))
            self.begun[self.day] = self.begun.get(self.day, 0) + 1
        elif problem.retry_after_s is not None and not self.running:
            # Alone, and after the time it was told, it is let in.
            self.tenants.wait(problem.retry_after_s + 1e-6)
            assert self.tenants.admit(caller, tokens) is None
            self.running.append((caller, tokens))
            self.begun[self.day] = self.begun.get(self.day, 0) + 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), part=st.floats(0, 1))
    def end(self, data: st.DataObject, part: float) -> None:
        caller, reserved = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        tokens = int(reserved * part)
        self.tenants.settle(caller, reserved, tokens)
        self.ended[self.day] = self.ended.get(self.day, 0) + tokens

    @rule(seconds=st.sampled_from([0.001, 1, 5, 30, 60, 7 * 3600]))
    def wait(self, seconds: float) -> None:
        self.tenants.wait(seconds)

    @rule()
    def reload(self) -> None:
        self.tenants.tenancy.reload({"acme": limited(**self.LIMITS)})

    @invariant()
    def limits_are_kept(self) -> None:
        assert len(self.running) <= 5
        assert sum(caller is self.own for caller, _ in self.running) <= 2
        assert all(count <= 30 for count in self.begun.values())
        assert all(count <= 3000 for count in self.ended.values())

    def teardown(self) -> None:
        """What has ended leaves nothing behind: a day later all of it is there again."""
        for caller, reserved in self.running:
            self.tenants.settle(caller, reserved, 0)
        self.tenants.wait(DAY_S)
        told = self.tenants.headers(self.own)
        assert told["x-ratelimit-remaining-requests"] == "6"
        assert told["x-ratelimit-remaining-tokens"] == "900"
        assert [self.tenants.admit(self.own) for _ in range(2)] == [None] * 2
        assert [self.tenants.admit(ALICE) for _ in range(3)] == [None] * 3
        assert "requests at once" in self.tenants.refused(ALICE).message


TestTraffic = Traffic.TestCase


@given(
    reserved=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 150)), max_size=8),
    later=st.integers(0, 60),
)
def test_settling_leaves_what_was_really_used(reserved: list[tuple[int, int]], later: int) -> None:
    """Reserved and settled at once, it is as if the real number had been known before."""
    guessed, known = (Tenants(acme=limited(tokens_per_minute=1200)) for _ in range(2))
    for tokens, really in reserved:
        assert guessed.admit(ALICE, tokens) is None
        guessed.settle(ALICE, tokens, really)
        if known.admit(ALICE, really) is not None:
            return
    for tenants in (guessed, known):
        tenants.wait(later)
    assert guessed.headers(ALICE) == known.headers(ALICE)
