"""A page as a reader takes it in: its tables, big numbers, bars and charts, read from the HTML."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "br", "img"}
_SCALES = {"p": 1e-12, "n": 1e-9, "µ": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


class Element:
    """One of the tree; `children` are elements and text."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        """All of it, with one space where there is any."""
        whole = "".join(c if isinstance(c, str) else f" {c.text} " for c in self.children)
        return " ".join(whole.split())

    def all(self, tag: str, mark: str = "") -> Iterator["Element"]:
        """Those below with this tag, and class if one is given."""
        for child in self.children:
            if isinstance(child, str):
                continue
            marks = child.attributes.get("class", "").split()
            if child.tag == tag and (not mark or mark in marks):
                yield child
            yield from child.all(tag, mark)

    def one(self, tag: str, mark: str = "") -> "Element":
        """The first of them."""
        return next(self.all(tag, mark))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


class Reading:
    """What the file says."""

    def __init__(self, source: str) -> None:
        reader = _Reader()
        reader.feed(source)
        reader.close()
        assert len(reader.open) == 1, "something is left open"
        self.root = reader.open[0]
        self.main = self.root.one("main")

    @property
    def tiles(self) -> dict[str, str]:
        """Big numbers by what they are."""
        return {
            tile.one("dt").text: tile.one("span", "big").text
            for tile in self.main.one("dl", "tiles").all("div")
        }

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """Cells by row and column; a row's name has its group's before it."""
        found = next(t for t in self.main.all("table") if t.one("caption").text == caption)
        head = [cell.text for cell in found.one("thead").all("th")]
        rows: dict[str, dict[str, str]] = {}
        for body in found.all("tbody"):
            group = next((f"{cell.text}: " for cell in body.all("th", "group")), "")
            for row in body.all("tr"):
                cells = [cell.text for cell in row.all("td")]
                if cells:
                    name = f"{group}{row.one('th').text}"
                    assert name not in rows
                    rows[name] = dict(zip(head[1:], cells, strict=True))
        return rows

    def chart(self, title: str) -> Any:
        """A chart's data and layout."""
        return self.charts[title]

    @property
    def charts(self) -> dict[str, Any]:
        """All of them by title."""
        return {
            figure.one("h3").text: json.loads("".join(map(str, figure.one("script").children)))
            for figure in self.main.all("figure")
            if any(True for _ in figure.all("div", "chart"))
        }

    @property
    def told(self) -> str:
        """What is said in sentences at the top."""
        return self.main.one("div", "lead").text.replace("\u00a0", " ")


def number(text: str) -> float:
    """What a person reads in "221 ms", "95.8 %", "1,597", "$31.69", "2.13/s" or "1 h 5 min"."""
    text = text.replace("\u00a0", " ").replace(",", "").lstrip("▲$ ")
    times = re.findall(r"(?<![\d.])(\d+) (d|h|min|s)\b", text)
    if times:
        return float(sum(int(n) * {"d": 86400, "h": 3600, "min": 60, "s": 1}[u] for n, u in times))
    found = re.match(r"([\d.]+(?:e-?\d+)?)(?: ?([pnµmkMG]?)(s|J|W|%)?)?", text)
    assert found is not None, text
    value, prefix, unit = found.groups()
    return float(value) * (0.01 if unit == "%" else _SCALES[prefix or ""])
