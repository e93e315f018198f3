"""Pieces of HTML. All take plain text and escape it, but for what is called `html`."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import msgspec


class Cell(msgspec.Struct, frozen=True):
    """A table's cell. `mark`: a style sheet's class; `said`: for those who can't see the mark;
    `aside`: what stands below in small.
    """

    text: str
    mark: str = ""
    said: str = ""
    aside: str = ""

    def html(self) -> str:
        """As a `td`."""
        said = f'<span class="unseen"> {escape(self.said)}</span>' if self.said else ""
        aside = f'<span class="aside">{escape(self.aside)}</span>' if self.aside else ""
        return f"<td{_mark(self.mark)}>{escape(self.text)}{said}{aside}</td>"


Row = Sequence[str | Cell]  # the first is the row's name


class Bar(msgspec.Struct, frozen=True):
    """A row of `bars`: its length is a share of the longest possible, its colour a variable's."""

    label: str
    length: float
    values: tuple[str, ...]
    colour: str = "accent"


def section(title: str, *html: str, ident: str = "") -> str:
    """A part of the page; nothing if it is empty."""
    body = "".join(html)
    name = f' id="{escape(ident)}"' if ident else ""
    return f"<section{name}><h2>{escape(title)}</h2>{body}</section>" if body else ""


def paragraph(text: str, mark: str = "") -> str:
    """A paragraph."""
    return f"<p{_mark(mark)}>{escape(text)}</p>"


def paragraphs(texts: Iterable[str]) -> str:
    """Some, side by side where there is room for them."""
    return f'<div class="lead">{"".join(map(paragraph, texts))}</div>'


def points(items: Iterable[str]) -> str:
    """A list; nothing if it is empty."""
    found = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="notes">{found}</ul>' if found else ""


def tiles(numbers: Sequence[tuple[str, str, str]]) -> str:
    """A row of big numbers: what it is, the number, and what to know of it."""
    found = "".join(
        f'<div><dt>{escape(label)}</dt><dd><span class="big">{escape(value)}</span>'
        f'<span class="aside">{escape(aside)}</span></dd></div>'
        for label, value, aside in numbers
    )
    return f'<dl class="tiles">{found}</dl>'


def table(
    caption: str, head: Sequence[str], groups: Mapping[str, Sequence[Row]], mark: str = ""
) -> str:
    """A table of rows in named groups; "" names none. It scrolls in itself where it is too wide."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    bodies = []
    for name, rows in groups.items():
        title = (
            f'<tr><th class="group" scope="rowgroup" colspan="{len(head)}">{escape(name)}</th></tr>'
            if name
            else ""
        )
        bodies.append(f"<tbody>{title}{''.join(map(_row, rows))}</tbody>")
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f'<table{_mark(mark)}><caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead>{''.join(bodies)}</table></div>"
    )


def bars(title: str, head: Sequence[str], rows: Sequence[Bar], about: str = "") -> str:
    """A table whose rows are bars too; nothing if it is empty."""
    if not rows:
        return ""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    bodies = "".join(
        f'<tr><th scope="row">{escape(row.label)}'
        f'<span class="bar"><span style="width:{_width(row.length)};'
        f'background:var(--{escape(row.colour)})"></span></span></th>'
        f"{''.join(f'<td>{escape(value)}</td>' for value in row.values)}</tr>"
        for row in rows
    )
    return figure(
        title,
        f'<table class="bars"><caption class="unseen">{escape(title)}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{bodies}</tbody></table>",
        about,
    )


def figure(title: str, html: str, about: str = "") -> str:
    """A card with a title and what to know of it."""
    told = paragraph(about, "about") if about else ""
    return f"<figure><figcaption><h3>{escape(title)}</h3>{told}</figcaption>{html}</figure>"


def grid(*html: str) -> str:
    """Figures side by side, two or three where there is room for them; nothing of none."""
    found = list(filter(None, html))
    mark = "grid thirds" if len(found) == 3 else "grid"
    return f'<div class="{mark}">{"".join(found)}</div>' if found else ""


def details(title: str, html: str) -> str:
    """Folded away until asked for."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>" if html else ""


def _row(row: Row) -> str:
    name, *values = row
    text = name.text if isinstance(name, Cell) else name
    cells = "".join((Cell(v) if isinstance(v, str) else v).html() for v in values)
    return f'<tr><th scope="row">{escape(text)}</th>{cells}</tr>'


def _width(length: float) -> str:
    """What there is little of is seen too."""
    return f"max({100 * min(length, 1.0):.2f}%, 2px)" if length > 0 else "0"


def _mark(mark: str) -> str:
    return f' class="{escape(mark)}"' if mark else ""
