"""`tokenworks keys`: the API keys that let others use this gateway."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import cyclopts
import msgspec
from cyclopts import Parameter
from rich.table import Table

from tokenworks.cli.console import ERR, OUT
from tokenworks.errors import UserError
from tokenworks.gateway.allowance import Allowance
from tokenworks.gateway.keys import Key, Keys, default_path

keys = cyclopts.App(
    name="keys",
    help="Make and revoke the API keys that let others use this gateway.\n\n"
    "Example: tokenworks keys add alice",
)

_SPAN: Final = re.compile(r"^([1-9][0-9]{0,5})([hdw])$")
_HOURS: Final = {"h": 1, "d": 24, "w": 168}
# A limit in a table: its setting, and how its number is told.
_TOLD: Final = {
    "requests_per_minute": "{:,} requests/min",
    "requests_per_day": "{:,} requests/day",
    "tokens_per_minute": "{:,} tokens/min",
    "tokens_per_day": "{:,} tokens/day",
    "concurrent": "{:,} at once",
    "budget_usd_per_day": "${:,.2f}/day",
    "budget_usd_per_month": "${:,.2f}/month",
    "budget_j_per_day": "{:,.0f} J/day",
}


@keys.command
def add(  # noqa: PLR0913 - one argument a flag
    name: str,
    *,
    tenant: str = "",
    expires: str | None = None,
    admin: Annotated[bool, Parameter(negative=())] = False,
    requests_per_minute: int | None = None,
    requests_per_day: int | None = None,
    tokens_per_minute: int | None = None,
    tokens_per_day: int | None = None,
    concurrent: int | None = None,
    classes: str | None = None,
    models: str | None = None,
    budget_usd_per_day: float | None = None,
    budget_usd_per_month: float | None = None,
    budget_j_per_day: float | None = None,
) -> None:
    """Make an API key and show it, this once.

    Its limits hold beside those of its tenant in the fleet file.

    Example: tokenworks keys add alice --tenant acme --expires 30d --requests-per-minute 60

    Parameters
    ----------
    name
        Whom or what the key is for.
    tenant
        Whose limits and share of the fleet it uses; a tenant of its own name if left out.
    expires
        When it ends: after 12h, 30d or 4w, or at the start of a day (2027-01-31, UTC).
    admin
        Let it also change how the gateway runs.
    requests_per_minute
        Requests in a minute.
    requests_per_day
        Requests in a UTC day.
    tokens_per_minute
        Tokens read and written in a minute.
    tokens_per_day
        Tokens read and written in a UTC day.
    concurrent
        Requests at once.
    classes
        Service classes it may ask for, as in realtime,standard.
    models
        Models it may ask for, separated by commas.
    budget_usd_per_day
        Dollars in a UTC day.
    budget_usd_per_month
        Dollars in a month.
    budget_j_per_day
        Joules in a UTC day.
    """
    given = {
        "requests_per_minute": requests_per_minute,
        "requests_per_day": requests_per_day,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "concurrent": concurrent,
        "classes": _split(classes),
        "models": _split(models),
        "budget_usd_per_day": budget_usd_per_day,
        "budget_usd_per_month": budget_usd_per_month,
        "budget_j_per_day": budget_j_per_day,
    }
    try:
        limits = msgspec.convert(given, Allowance)
    except msgspec.ValidationError as error:
        raise UserError(str(error), "`tokenworks keys add --help` lists the limits.") from None
    secret = Keys(default_path()).add(
        name, tenant=tenant, expires=_end(expires), is_admin=admin, limits=limits
    )
    ERR.print(f"The key for {name}, which can't be shown again:")
    OUT.print(secret, soft_wrap=True)


@keys.command(name="list")
def show() -> None:
    """Show the keys there are, without their secrets.

    Example: tokenworks keys list
    """
    known = Keys(default_path()).by_id
    if not known:
        OUT.print("There are no keys. Make one: tokenworks keys add NAME")
        return
    table = Table("id", "name", "tenant", "created", "expires", "limits", box=None)
    for key in known.values():
        table.add_row(
            key.id, key.name, key.tenant or key.name, key.created, _expiry(key), _limits(key)
        )
    OUT.print(table)


@keys.command
def revoke(name: str) -> None:
    """Forget a key. A running gateway refuses it within a second.

    Example: tokenworks keys revoke alice

    Parameters
    ----------
    name
        The key's name or id.
    """
    Keys(default_path()).revoke(name)
    ERR.print(f"Revoked {name}.")


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part for part in re.split(r"[,\s]+", text) if part]


def _end(text: str | None) -> datetime | None:
    """The time that `--expires` means."""
    if text is None:
        return None
    match = _SPAN.match(text)
    try:
        if match is not None:
            return datetime.now(UTC) + timedelta(hours=int(match[1]) * _HOURS[match[2]])
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise UserError(
            f"--expires {text!r} is no time", "Give hours, days or weeks (12h, 30d, 4w), or a date."
        ) from None


def _expiry(key: Key) -> str:
    if key.expires is None:
        return "never"
    when = key.expires.astimezone(UTC).isoformat(timespec="seconds")
    return f"{when} (past)" if key.expires <= datetime.now(UTC) else when


def _limits(key: Key) -> str:
    """What a key may do, in a few words."""
    allowed = key.limits
    told = ["admin"] if key.is_admin else []
    for name, text in _TOLD.items():
        if (value := getattr(allowed, name)) is not None:
            told.append(text.format(value))
    told += [f"only {', '.join(names)}" for names in (allowed.classes, allowed.models) if names]
    return "; ".join(told) or "none"
