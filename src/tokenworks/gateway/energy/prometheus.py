"""A meter behind an address: an exporter's page (DCGM's and the like), or a Prometheus server.

Energy counters are taken as they are, watts are summed over time. Several series are added up.
"""

import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import quote, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from tokenworks.errors import UserError
from tokenworks.gateway.energy.meters import Grade, Integral, MeterSettings, Unit, Voice

_TIMEOUT_S: Final = 2.0
_FRESH_S: Final = 0.5  # replicas on the same machine share a page
_MOST_BYTES: Final = 16 << 20
_SCALES: Final[dict[Unit, float]] = {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "W": 1.0, "mW": 1e-3}
# By a metric's name; the first two are DCGM's, whose counters are in millijoules.
_UNITS: Final[tuple[tuple[str, Unit], ...]] = (
    ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "mJ"),
    ("DCGM_FI_DEV_POWER_USAGE", "W"),
    ("_joules_total", "J"),
    ("_joules", "J"),
    ("_watts", "W"),
)
_SELECTOR: Final = re.compile(r"\s*([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{(.*)\}\s*)?")
_MATCHER: Final = re.compile(r'\s*([a-zA-Z_]\w*)\s*(=~|!=|!~|=)\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_DEVICE_LABELS: Final = ("gpu", "UUID", "gpu_id", "uuid", "device")

Labels = Mapping[str, str]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The token is for the address given only."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())


class Selector:
    """`name{label="value", …}` on an exporter's page, with Prometheus' four ways to match."""

    def __init__(self, text: str) -> None:
        match = _SELECTOR.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no metric's name with labels")
        self.name, inner = match[1], match[2] or ""
        self._tests: list[tuple[str, str, str]] = []
        at = 0
        while inner[at:].strip():
            found = _MATCHER.match(inner, at)
            if found is None:
                raise ValueError(f'{inner[at:]!r} is no label="value"')
            value = json.loads(f'"{found[3]}"')
            if "~" in found[2]:
                re.compile(value)
            self._tests.append((found[1], found[2], value))
            at = found.end()

    def matches(self, labels: Labels) -> bool:
        """Whether a series with such labels is meant."""
        for name, how, value in self._tests:
            there = labels.get(name, "")
            same = re.fullmatch(value, there) is not None if "~" in how else there == value
            if same == how.startswith("!"):
                return False
        return True


class Page:
    """What an address answers, kept for half a second. Used from several threads."""

    def __init__(self, url: str, key: str) -> None:
        self._request = urllib.request.Request(url)  # noqa: S310 - checked to be http or https
        if key:
            self._request.add_header("authorization", f"Bearer {key}")
        self._lock = threading.Lock()
        self._at_s = -math.inf
        self._text, self._error = "", ""

    def text(self) -> str:
        """OSError or ValueError where there is none."""
        with self._lock:
            if time.monotonic() - self._at_s > _FRESH_S:
                self._text = self._error = ""
                try:
                    self._text = self._fetch()
                except urllib.error.HTTPError as error:
                    self._error = f"it answers {error.code} {error.reason}"
                except (OSError, ValueError, http.client.HTTPException) as error:
                    self._error = str(getattr(error, "reason", "") or error) or repr(error)
                self._at_s = time.monotonic()
            if self._error:
                raise ValueError(self._error)
            return self._text

    def _fetch(self) -> str:
        deadline_s = time.monotonic() + _TIMEOUT_S
        pieces, size = [], 0
        with _opener.open(self._request, timeout=_TIMEOUT_S) as answer:
            while piece := answer.read1(1 << 16):
                pieces.append(piece)
                size += len(piece)
                if size > _MOST_BYTES:
                    raise ValueError("its answer is too long")
                if time.monotonic() > deadline_s:
                    raise TimeoutError("timed out")
        return b"".join(pieces).decode()


def _of_page(text: str, name: str) -> Iterator[tuple[Labels, float]]:
    """The series called `name` in an exporter's text."""
    # Only these lines are parsed: such a page has hundreds of others, and we have a second.
    lines = [line for line in text.splitlines() if line.startswith(name)]
    for family in text_string_to_metric_families("\n".join([*lines, ""])):
        for sample in family.samples:
            if sample.name == name:
                yield sample.labels, float(sample.value)


def _of_server(text: str) -> Iterator[tuple[Labels, float]]:
    """What a Prometheus server found."""
    answer = json.loads(text)
    data = answer["data"]
    if data["resultType"] == "scalar":
        yield {}, float(data["result"][1])
        return
    for series in data["result"]:
        yield series["metric"], float(series["value"][1])


class Prometheus:
    """One replica's devices as somebody else reads them; `pages` are shared with other meters."""

    grade: Grade = "measured"

    def __init__(self, settings: MeterSettings, place: str, pages: dict[str, Page]) -> None:
        parts = urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{place}: meter.url {settings.url!r} is no http or https URL",
                "Give an exporter's page, http://HOST:9400/metrics, or a Prometheus server.",
            )
        url, self._selector = settings.url, None
        try:
            if parts.path.endswith("/metrics"):
                self._selector = Selector(settings.query)
            else:
                base = url.rstrip("/").removesuffix("/api/v1/query")
                url = f"{base}/api/v1/query?query={quote(settings.query)}"
            unit = settings.unit or _unit(settings.query)
        except (ValueError, re.error) as error:
            raise UserError(
                f"{place}: meter.query: {error}",
                'Give it as METRIC{label="value"}, with meter.unit if the name doesn\'t say.',
            ) from None
        self._scale, self._devices = _SCALES[unit], [str(each) for each in settings.devices]
        self._integral = Integral() if unit in ("W", "mW") else None
        self._voice = Voice(f"{place}: its meter at {settings.url}")
        self._joules = 0.0
        self._last: dict[tuple[tuple[str, str], ...], float] = {}
        key = _key(settings.key_env, place)
        self._page = pages.setdefault(f"{url} {settings.key_env}", Page(url, key))

    def joules(self) -> float | None:
        """Of all series that are meant, since the first reading."""
        try:
            series = self._series()
        except (OSError, ValueError) as error:
            self._voice.bad(str(error))
            return None
        except (LookupError, TypeError):
            self._voice.bad("its answer is none of Prometheus'")
            return None
        self._voice.good()
        if self._integral is not None:
            return self._integral.add(sum(series.values()))
        last, self._last = self._last, series
        if series == last:
            return None  # nobody has looked since
        if series.keys() == last.keys() and all(series[key] >= last[key] for key in last):
            self._joules += sum(series.values()) - sum(last.values())
        else:
            self._joules -= 1.0  # a count that began anew is known by its being lower
        return self._joules

    def _series(self) -> dict[tuple[tuple[str, str], ...], float]:
        """By their labels; ValueError unless all are there."""
        text = self._page.text()
        if self._selector is not None:
            every = _of_page(text, self._selector.name)
            found = [(labels, v) for labels, v in every if self._selector.matches(labels)]
        else:
            found = list(_of_server(text))
        if self._devices:
            found = [one for one in found if self._is_mine(one[0])]
            if len(found) != len(self._devices):
                raise ValueError(f"it shows {len(found)} of {len(self._devices)} devices")
        if not found:
            raise ValueError("the metric is not there")
        if not all(math.isfinite(value) and value >= 0 for _, value in found):
            raise ValueError("it reads no number")
        return {tuple(sorted(labels.items())): value * self._scale for labels, value in found}

    def _is_mine(self, labels: Labels) -> bool:
        return any(labels.get(name) in self._devices for name in _DEVICE_LABELS)


def _unit(query: str) -> Unit:
    """Of a metric's own values; what PromQL makes of them, nobody knows."""
    name = Selector(query).name
    for ending, unit in _UNITS:
        if name.endswith(ending):
            return unit
    raise ValueError(f"the unit of {name} is not known")


def _key(name: str, place: str) -> str:
    if not name:
        return ""
    key = os.environ.get(name, "")
    if not key:
        raise UserError(f"{place}: the variable {name} is not set", f"Put meter's token in {name}.")
    return key
