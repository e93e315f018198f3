"""`tokenworks top`: a running factory in the terminal, live."""

import time
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenworks.cli.ask import KEY, URL, KeyEnv, Url, ask
from tokenworks.cli.book import AsJson, print_json
from tokenworks.cli.console import OUT
from tokenworks.cli.operate import told
from tokenworks.errors import UserError
from tokenworks.units import show

_LINES: Final = 8  # of the log
_COLOURS: Final = {"ready": "green", "down": "red", "draining": "yellow", "starting": "yellow"}
State = dict[str, Any]


def top(
    *,
    url: Url = URL,
    key_env: KeyEnv = KEY,
    every: float = 1.0,
    once: Annotated[bool, Parameter(negative=())] = False,
    json: AsJson = False,
) -> None:
    """Watch a running factory: its engines, classes and promises, power, batches, and its log.

    Example: tokenworks top

    Ctrl-C ends it. Into a file or a pipe it shows one frame.

    Parameters
    ----------
    every
        Seconds between two looks.
    once
        Show one frame and end.
    """
    if not every > 0:
        raise UserError(f"--every is {every:g}", "Give seconds above zero.")
    state = ask(url, "/admin/state", key_env)
    if json:
        print_json(state)
    elif once or not OUT.is_terminal:
        OUT.print(frame(url, state))
    else:
        try:
            _watch(url, key_env, every, state)
        except KeyboardInterrupt:
            return


def _watch(url: str, key_env: str, every_s: float, state: State) -> None:
    """Show it until Ctrl-C. A gateway that is away for a while is waited for."""
    seen_s = time.monotonic()
    with Live(frame(url, state), console=OUT, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            try:
                now, now_s = ask(url, "/admin/state", key_env), time.monotonic()
            except UserError as error:
                live.update(frame(url, state, trouble=str(error)), refresh=True)
                continue
            rates = rates_of(state, now, now_s - seen_s)
            state, seen_s = now, now_s
            live.update(frame(url, state, rates), refresh=True)


def rates_of(before: State, now: State, over_s: float) -> dict[str, float]:
    """Tokens a second of each engine since the last look."""
    had = {engine["name"]: engine["tokens"] for engine in before["engines"]}
    return {
        engine["name"]: max(engine["tokens"] - had[engine["name"]], 0) / over_s
        for engine in now["engines"]
        if engine["name"] in had and over_s > 0
    }


def frame(
    url: str, state: State, rates: dict[str, float] | None = None, trouble: str = ""
) -> RenderableType:
    """What is on the screen."""
    parts: list[RenderableType] = [_head(url, state)]
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    parts += [Text(), _engines(state["engines"], rates or {})]
    if state["classes"]:
        parts += [Text(), _classes(state["classes"])]
    if state["log"]:
        parts += [Text(), *(Text(line, style="dim") for line in state["log"][-_LINES:])]
    return Group(*parts)


def _head(url: str, state: State) -> RenderableType:
    ended = state["requests"]
    line = f"{url}  up {_span(state['up_s'])}  {state['waiting']} waiting"
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(ended.items())) or "none yet"
    batches = state["batches"]
    lines = [line, f"power: {told(state['power'])}", f"requests: {counts}"]
    if batches["batches"]:
        statuses = ", ".join(f"{count} {name}" for name, count in batches["batches"].items())
        done = f"{batches['running']:,} running, {batches['waiting']:,} waiting"
        lines.append(f"batches: {statuses}; lines: {batches['done']:,} done, {done}")
    text = Text("\n".join(lines))
    if state["draining"]:
        text.append("\nshutting down: nothing new is taken", style="bold yellow")
    if state["ledger"] != "ok":
        text.append("\nthe ledger can't be written: nothing is served", style="bold red")
    return text


def _engines(engines: list[State], rates: dict[str, float]) -> RenderableType:
    table = Table("engine", "model", "processor", "state", box=None, pad_edge=False)
    for heading in ("running", "queue", "cache", "tokens/s", "W", "energy"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for engine in engines:
        name, state, seen = engine["name"], engine["state"], engine.get("telemetry") or {}
        slots = "" if engine["slots"] is None else f"/{engine['slots']}"
        rate = rates.get(name)
        joules = engine.get("joules")
        table.add_row(
            name,
            engine["model"],
            engine["processor"],
            Text(state, style=_COLOURS.get(state, "")),
            f"{engine['running']}{slots}",
            _known(seen.get("waiting"), "{:,.0f}"),
            _known(seen.get("kv_fraction"), "{:.0%}"),
            "" if rate is None else f"{rate:,.0f}",
            _known(engine.get("watts"), "{:,.0f}"),
            "" if joules is None else show(joules["meter"], "J"),
            Text(engine.get("detail", ""), style="dim"),
        )
    return table


def _classes(classes: list[State]) -> RenderableType:
    table = Table("class", "model", box=None, pad_edge=False)
    for heading in ("finished", "TTFT p50", "p99", "TPOT p50", "p99", "promises kept"):
        table.add_column(heading, justify="right")
    for one in classes:
        judged = one["kept"] + one["broken"]
        table.add_row(
            one["service_class"],
            one["model"],
            f"{one['finished']:,}",
            *(_ms(one[what][share]) for what in ("ttft_s", "tpot_s") for share in ("p50", "p99")),
            f"{one['kept'] / judged:.1%} of {judged:,}" if judged else "-",
        )
    return table


def _known(value: float | None, form: str) -> str:
    """A number of telemetry's, where it is told."""
    return "" if value is None or value < 0 else form.format(value)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.3g} ms"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
