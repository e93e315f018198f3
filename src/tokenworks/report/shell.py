"""The file around a page: style, charts and plotly are in it, so it asks nothing of a network."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

import msgspec

from tokenworks.report import markup
from tokenworks.report.charts import Chart

# What the file holds is all there is: the browser itself refuses the rest.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def chart(title: str, drawn: Chart | None, about: str) -> str:
    """A chart in a card, or nothing."""
    if drawn is None:
        return ""
    # "<" would let a name end the script.
    source = msgspec.json.encode(drawn).decode().replace("<", "\\u003c")
    return markup.figure(
        title,
        f'<div class="chart" role="img" aria-label="{escape(f"{title}. {about}")}"></div>'
        f'<script type="application/json">{source}</script>',
        about,
    )


def document(title: str, meta: Sequence[str], html: str) -> str:
    """The whole file. `meta` is told below the title; `html` is what stands in it."""
    # Only who makes a page pays for the import.
    from plotly.offline import get_plotlyjs  # noqa: PLC0415

    folder = files("tokenworks.report") / "static"
    style, script = ((folder / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{markup.paragraph(" · ".join(filter(None, meta)), "meta")}</header>
<main>
{html}
<noscript><p class="notes">A script draws the charts, and it is off.</p></noscript>
</main>
<footer><p>Made by Tokenworks. This file holds everything it shows.</p></footer>
<script>{get_plotlyjs()}</script>
<script>{script}</script>
</body>
</html>
"""
