"""Who may use how much: the tenants of the fleet file, and the limits of single keys.

A key belongs to a tenant, and must keep to its own limits and to the tenant's, which hold for all
keys of the tenant together. Requests in front of a client go through `admit` and `settle`. The
lines of a batch are not limited by rates, since they only take what is idle: they go through
`check` and `spend`.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from tokenworks.gateway.allowance import Allowance, TenantSettings, Used
from tokenworks.gateway.keys import Key
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.ratelimit import Days, Meter, lines, month_of
from tokenworks.sched.config import ServiceClass

DEFAULT: Final = "default"


class _Account:
    """The meters that a key's requests go through; `limited` and `guarded` are some of them."""

    __slots__ = ("guarded", "key", "limited", "meters")

    def __init__(self, key: Key | None, meters: tuple[Meter, ...]) -> None:
        self.key = key
        self.meters = meters
        self.limited = tuple(meter for meter in meters if meter.is_limited)
        self.guarded = tuple(meter for meter in meters if meter.is_guarded)


class Tenancy:
    """All meters. `now_s` are monotonic seconds; `unix_s` is the wall clock, for days and months.

    What is admitted with a key must be settled with the same key object, exactly once.
    """

    def __init__(
        self, tenants: Mapping[str, TenantSettings], unix_s: Callable[[], float] = time.time
    ) -> None:
        self._settings = dict(tenants)
        self._days = Days(unix_s)
        self._tenants: dict[str, Meter] = {}
        self._keys: dict[str, Meter] = {}  # by id
        self._accounts: dict[str, _Account] = {}  # by the key's id

    def settings(self, tenant: str) -> TenantSettings:
        """A tenant's settings, its weight among them."""
        found = self._settings.get(tenant) or self._settings.get(DEFAULT)
        return TenantSettings() if found is None else found

    def check(
        self, key: Key | None, service_class: ServiceClass, model: str, now_s: float
    ) -> Problem | None:
        """Why a request may not be made at all, whenever it comes: class, model or budget."""
        if now_s >= self._days.look_s:
            self._turn(now_s)
        for meter in self._account(key).guarded:
            problem = meter.guard(service_class, model, self._days, now_s)
            if problem is not None:
                return problem
        return None

    def admit(
        self, key: Key | None, service_class: ServiceClass, model: str, tokens: int, now_s: float
    ) -> Problem | None:
        """Count a request that will take up to `tokens`, or say why not and count nothing."""
        if now_s >= self._days.look_s:
            self._turn(now_s)
        account = self._accounts.get("" if key is None else key.id)
        if account is None or account.key is not key:
            account = self._account(key)
        for meter in account.guarded:
            problem = meter.guard(service_class, model, self._days, now_s)
            if problem is not None:
                return problem
        for meter in account.limited:
            if not meter.has_room(tokens, now_s):
                return self._refuse(account, tokens, now_s)
        for meter in account.meters:
            meter.take(tokens)
        return None

    def settle(
        self,
        key: Key | None,
        reserved: int,
        tokens: int,
        usd: float,
        now_s: float,
        energy_j: float = 0.0,
    ) -> None:
        """Count the end of a request that was admitted with `reserved` tokens and took `tokens`."""
        if now_s >= self._days.look_s:
            self._turn(now_s)
        account = self._accounts.get("" if key is None else key.id)
        if account is None or account.key is not key:
            account = self._account(key)
        for meter in account.meters:
            meter.settle(reserved, tokens, now_s)
            if usd or energy_j:
                meter.spend(usd, energy_j)

    def spend(self, key: Key | None, usd: float, energy_j: float, now_s: float) -> None:
        """Count what was used outside of `settle`: by a batch's line, or known only later."""
        if now_s >= self._days.look_s:
            self._turn(now_s)
        for meter in self._account(key).meters:
            meter.spend(usd, energy_j)

    def headers(self, key: Key | None, now_s: float) -> bytes:
        r"""Lines of HTTP (each ends in \r\n) with Groq's x-ratelimit-* headers; b"" without limits.

        Where several limits hold, per minute and day, of key and tenant: the one with least left.
        """
        account = self._accounts.get("" if key is None else key.id)
        if account is None or account.key is not key:
            account = self._account(key)
        if not account.limited:
            return b""
        if now_s >= self._days.look_s:
            self._turn(now_s)
        day_s = self._days.day_ends_s - now_s
        requests, tokens = account.limited[0].left(now_s, day_s)
        for meter in account.limited[1:]:
            of_requests, of_tokens = meter.left(now_s, day_s)
            if of_requests[0] < requests[0]:
                requests = of_requests
            if of_tokens[0] < tokens[0]:
                tokens = of_tokens
        return lines(requests) + lines(tokens)

    def reload(self, tenants: Mapping[str, TenantSettings]) -> None:
        """Go on with other limits; what was used and what runs stays counted."""
        self._settings = dict(tenants)
        for name, meter in self._tenants.items():
            meter.change(self.settings(name))
        self._accounts.clear()

    def restore(self, used: Iterable[Used]) -> None:
        """Take up, after a restart, what was used this month by day; other days are passed over."""
        for one in used:
            own = self._keys.setdefault(one.key, Meter("", Allowance()))
            for meter in (self._tenant(one.tenant), own):
                if one.day == self._days.day:
                    meter.requests_today += one.requests
                    meter.tokens_today += one.tokens
                    meter.usd_today += one.usd
                    meter.energy_j_today += one.energy_j
                if month_of(one.day) == self._days.month:
                    meter.usd_month += one.usd

    def _account(self, key: Key | None) -> _Account:
        name = "" if key is None else key.id
        account = self._accounts.get(name)
        if account is None or account.key is not key:
            meters = [self._tenant(tenant_of(key))]
            if key is not None and key.limits != Allowance():
                meter = self._keys.setdefault(key.id, Meter("", key.limits))
                meter.whose = f"key {key.name}"
                meter.change(key.limits)
                meters.append(meter)
            account = self._accounts[name] = _Account(key, tuple(meters))
        return account

    def _tenant(self, name: str) -> Meter:
        meter = self._tenants.get(name)
        if meter is None:
            meter = self._tenants[name] = Meter(f"tenant {name}", self.settings(name))
        return meter

    def _refuse(self, account: _Account, tokens: int, now_s: float) -> Problem:
        day_s = self._days.day_ends_s - now_s
        full = [meter for meter in account.limited if not meter.has_room(tokens, now_s)]
        found = [meter.refusal(tokens, day_s) for meter in full]
        return max(found, key=lambda one: one[0])[1]

    def _turn(self, now_s: float) -> None:
        is_new_day, is_new_month = self._days.look(now_s)
        if is_new_day or is_new_month:
            for meter in (*self._tenants.values(), *self._keys.values()):
                if is_new_day:
                    meter.new_day()
                if is_new_month:
                    meter.new_month()


def tenant_of(key: Key | None) -> str:
    """The tenant of a request: its key's, called as the key where none is named."""
    return DEFAULT if key is None else key.tenant or key.name
