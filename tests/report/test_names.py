"""Names are a user's own: whatever is in them, they are read and never obeyed."""

from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from tokenworks.report.page import comparison, page
from tokenworks.report.run import Run

from . import made
from .made import busy_outcomes, busy_run, outcomes_of, replica
from .reading import Reading

EVIL = "</script><script>document.title='x'</script><img src=x onerror=alert(1)>\"'&amp; %{x}"


def evil_run(name: str = EVIL, **changed: Any) -> Run:
    """A run with the name wherever one can be."""
    outcomes = outcomes_of(
        *(
            replace(
                one,
                service_class=name if one.service_class == "standard" else one.service_class,
                reason=one.reason and name,
                tenant=name,
            )
            for one in busy_outcomes(300)
        )
    )
    them = [replica(name, name, name), replica("r", "p", name)]
    told: dict[str, Any] = {
        "title": name,
        "summary": made.summary(outcomes, them),
        "scenario": {name: name, "deep": [{name: [name]}]},
        "assumptions": {name: name},
        "notes": (name,),
        "latencies": {},
        "variant": name,
    }
    return busy_run(**(told | changed))


def pages(name: str) -> Mapping[str, str]:
    """Of all kinds."""
    runs = [evil_run(name, seed=seed, variant=v) for seed in (1, 2) for v in (name, "other")]
    return {
        "run": page(evil_run(name)),
        "many replicas": page(
            evil_run(name, summary=made.summary(busy_outcomes(50), [replica(name, name, "")] * 9))
        ),
        "comparison": comparison(runs, name),
        "over load": comparison([replace(run, load=2.0) for run in runs], name),
    }


def shape(source: str) -> list[tuple[str, list[str]]]:
    """Every element with its attributes' names."""
    return [
        (child.tag, list(child.attributes))
        for tag in ("script", "img", "style", "link", "iframe", "svg", "a", "span", "td", "li")
        for child in Reading(source).root.all(tag)
    ]


@pytest.fixture(scope="module")
def evil() -> Mapping[str, str]:
    return pages(EVIL)


@pytest.fixture(scope="module")
def tame() -> Mapping[str, str]:
    return pages("a rather long but quite harmless name")


@pytest.mark.parametrize("kind", ["run", "many replicas", "comparison", "over load"])
def test_a_name_adds_no_element(
    kind: str, evil: Mapping[str, str], tame: Mapping[str, str]
) -> None:
    assert shape(evil[kind]) == shape(tame[kind])
    assert "document.title='x'</script>" not in evil[kind]


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_name_is_read_as_it_is(kind: str, evil: Mapping[str, str]) -> None:
    read = Reading(evil[kind])
    assert read.root.one("h1").text == read.root.one("title").text == EVIL
    assert any(cell.text == EVIL for cell in read.main.all("td"))
    assert any(item.text == EVIL for item in read.main.all("li"))


@pytest.mark.parametrize("kind", ["run", "many replicas", "comparison", "over load"])
def test_charts_get_no_tags_where_plotly_reads_them(kind: str, evil: Mapping[str, str]) -> None:
    seen = 0

    def look(value: Any, key: str = "") -> None:
        nonlocal seen
        if isinstance(value, dict):
            for name, part in value.items():
                look(part, name)
        elif isinstance(value, list):
            for part in value:
                look(part, key)
        elif isinstance(value, str) and key in {"name", "text", "ticktext", "hovertemplate"}:
            seen += 1
            bare = value.replace("<extra>", "").replace("</extra>", "")
            assert "<" not in bare, (key, value)

    for chart in Reading(evil[kind]).charts.values():
        look(chart["data"])
        look(chart["layout"])
    assert seen
