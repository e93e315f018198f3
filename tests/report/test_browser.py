"""The pages in a real browser, opened as files, without a network."""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec.structs import replace
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    ViewportSize,
    expect,
)

from tokenworks.report.page import comparison, page

from . import made
from .made import bare, busy_outcomes, busy_run, fleet, outcomes_of
from .test_comparison import seeds
from .test_names import EVIL, evil_run

pytestmark = pytest.mark.browser

Show = Callable[..., Page]
WIDE: ViewportSize = {"width": 1280, "height": 900}
NARROW: ViewportSize = {"width": 375, "height": 800}
# Of each: how many charts it has, and how it is made.
PAGES: Mapping[str, tuple[int, Callable[[], str]]] = {
    "run": (6, lambda: page(busy_run())),
    "many": (6, lambda: page(busy_run(summary=made.summary(busy_outcomes(1500), fleet(50))))),
    "nothing": (0, lambda: page(bare(outcomes_of()))),
    "evil": (6, lambda: page(evil_run())),
    "comparison": (5, lambda: comparison([*seeds(EVIL, 1.0), *seeds("slow", 2.0)], EVIL)),
    "over load": (
        5,
        lambda: comparison(
            [replace(run, load=load) for load in (1.0, 3.0) for run in seeds(EVIL, load, 2)], "t"
        ),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With each page as a file."""
    place = tmp_path_factory.mktemp("pages")
    for name, (_, make) in PAGES.items():
        (place / f"{name}.html").write_text(make(), "utf-8")
    return place


@pytest.fixture
def show(chromium: Browser, folder: Path) -> Iterator[Show]:
    """Open a page; in the end, hold that it was silent and asked for nothing but itself."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(name: str, **options: Any) -> Page:
        url = (folder / f"{name}.html").as_uri()

        def heard(message: ConsoleMessage) -> None:
            said.append(f"{message.type}: {message.text}")

        def requested(request: Request) -> None:
            if request.url not in {url, "data:,"}:
                asked.append(request.url)

        context = chromium.new_context(offline=True, **({"viewport": WIDE} | options))
        contexts.append(context)
        context.on("request", requested)
        shown = context.new_page()
        shown.on("console", heard)
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.goto(url)
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert asked == []


def lines(shown: Page, title: str) -> Locator:
    """What is drawn of the traces in a chart."""
    return shown.get_by_role("img", name=title).locator(".scatterlayer .trace")


def readable(shown: Page, name: str) -> None:
    """Hold that every chart is drawn, within its card and the window, and its axis can be read."""
    charts = shown.locator(".chart")
    assert charts.count() == PAGES[name][0]
    assert shown.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    for chart in charts.all():
        expect(chart.locator(".scatterlayer .trace, .heatmaplayer image").first).to_be_attached()
        card, drawn = chart.locator("xpath=..").bounding_box(), chart.locator("svg").first
        box = drawn.bounding_box()
        assert card is not None
        assert box is not None
        assert card["x"] <= box["x"]
        assert box["x"] + box["width"] <= card["x"] + card["width"] + 0.5
        assert not re.search(r"NaN|undefined|@c\d|@ink", chart.inner_html())
        labels = sorted(
            chart.locator(".xaxislayer-above .xtick text").evaluate_all(
                "found => found.filter(e => getComputedStyle(e).opacity > 0 && e.textContent)"
                ".map(e => e.getBoundingClientRect()).map(b => [b.left, b.right, b.height])"
            )
        )
        assert len(labels) >= 2
        assert all(height < 25 for *_, height in labels), "turned"
        assert all(right < left for (_, right, _), (left, *_) in pairwise(labels)), "overlap"


# A page takes seconds to open, so tests that can share one do: more of them are in those below.
@pytest.mark.parametrize(
    ("name", "width"), [("comparison", NARROW), ("many", NARROW), ("over load", WIDE)]
)
def test_charts_are_drawn_and_can_be_read(name: str, width: ViewportSize, show: Show) -> None:
    readable(show(name, viewport=width), name)


def test_a_table_scrolls_in_itself_and_its_first_column_stays(show: Show) -> None:
    shown = show("run", viewport=NARROW)
    readable(shown, "run")
    table = shown.get_by_role("region", name="Measures of each service class")
    name = table.get_by_role("rowheader", name="tokens read")
    before = name.bounding_box()
    assert table.evaluate("e => { e.scrollLeft = 1e4; return e.scrollLeft }") > 50
    assert name.bounding_box() == before


def test_a_name_is_shown_and_never_run(show: Show) -> None:
    shown = show("evil", viewport=NARROW)
    readable(shown, "evil")
    shown.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert shown.title() == EVIL
    assert shown.locator("img").count() == 0
    expect(shown.get_by_role("heading", level=1)).to_have_text(EVIL)
    expect(shown.locator(".legend button").filter(has_text=EVIL).first).to_be_visible()
    for title in ("Goodput", "Power"):
        chart = shown.get_by_role("img", name=title)
        chart.evaluate(
            """(e) => {
                const known = (t) => [t.name, t.hovertemplate].join().includes("script");
                const curveNumber = e.data.findIndex(known);
                Plotly.Fx.hover(e, [{curveNumber, pointNumber: 3}]);
            }"""
        )
        expect(chart.locator(".hoverlayer")).to_contain_text("</script><script>document.title='x'")
        assert chart.locator(".hoverlayer a").count() == 0


def test_the_legend_turns_a_class_on_and_off(show: Show) -> None:
    shown = show("run")
    readable(shown, "run")
    drawn = lines(shown, "Time to first token")
    button = shown.locator("figure", has_text="Time to first token").get_by_role(
        "button", name="realtime"
    )
    expect(drawn).to_have_count(6)  # four classes, two bounds
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(drawn).to_have_count(4)
    shown.emulate_media(color_scheme="dark")  # drawn anew, the choice stays
    expect(drawn).to_have_count(4)
    button.click()
    expect(drawn).to_have_count(6)


def colour(shown: Page, variable: str) -> tuple[int, ...]:
    """A variable of the style sheet as red, green and blue."""
    text = shown.evaluate(
        "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()",
        f"--{variable}",
    )
    return tuple(bytes.fromhex(text.removeprefix("#")))


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """As WCAG 2 defines it."""

    def light(part: int) -> float:
        share = part / 255
        return share / 12.92 if share <= 0.04045 else float(((share + 0.055) / 1.055) ** 2.4)

    low, high = sorted(
        sum(w * light(p) for w, p in zip((0.2126, 0.7152, 0.0722), c, strict=True))
        for c in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark", "light")


def test_day_and_night_can_both_be_read_and_charts_follow(show: Show) -> None:
    shown = show("run", color_scheme="dark")
    line = lines(shown, "Time to first token").locator(".js-line").first
    papers = []
    for scheme in SCHEMES:
        shown.emulate_media(color_scheme=scheme)
        expect(line).to_have_css("stroke", f"rgb{colour(shown, 'c0')}")
        expect(shown.locator("body")).to_have_css(
            "background-color", f"rgb{colour(shown, 'paper')}"
        )
        papers.append(colour(shown, "paper"))
        for text in ("ink", "muted", "bad", "accent"):
            for surface in ("paper", "card"):
                assert contrast(colour(shown, text), colour(shown, surface)) >= 4.5, (text, surface)
        for drawn in (*(f"c{n}" for n in range(8)), "idle", "bad", "edge", "heat1"):
            assert contrast(colour(shown, drawn), colour(shown, "card")) >= 3, (drawn, scheme)
    assert min(papers[0]) > 192
    assert max(papers[1]) < 64
    assert papers[2] == papers[0]


def test_the_browser_itself_refuses_what_the_file_does_not_hold(
    chromium: Browser, folder: Path
) -> None:
    shown = chromium.new_page()
    shown.goto((folder / "nothing.html").as_uri())
    readable(shown, "nothing")
    refused = shown.evaluate(
        """async () => {
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) => {
                refused.push(event.effectiveDirective);
            });
            await fetch("http://127.0.0.1:9/").catch(() => 0);
            for (const [tag, name] of [["img", "src"], ["script", "src"], ["iframe", "src"]]) {
                const element = document.createElement(tag);
                element[name] = "http://127.0.0.1:9/";
                document.body.append(element);
            }
            await new Promise((done) => setTimeout(done, 300));
            return refused.sort();
        }"""
    )
    assert refused == ["connect-src", "frame-src", "img-src", "script-src-elem"]
    shown.close()
