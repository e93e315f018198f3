"""A compiled schedule as a picture: units against cycles, as one HTML file and for Perfetto.

The JSON is Chrome's trace format (one complete event per instruction), which Perfetto and
chrome://tracing open. Both show each segment once: a layer's stamps are all alike.
"""

from collections.abc import Iterator
from html import escape
from itertools import count
from typing import Any, Final

import msgspec

from tokenworks.lpu.isa import OPS, Instruction
from tokenworks.lpu.program import Program, Segment
from tokenworks.lpu.timing import segment_cycles

_ROW: Final = 9
_LEFT: Final = 120
_BESIDE: Final = 16  # threads a row may have
_SCALE: Final = 0.4  # pixels of a cycle, at first
# Twelve operators, distinguishable in order around the circle and by lightness.
_HUES: Final = (210, 30, 130, 340, 265, 60, 180, 0, 235, 95, 300, 15)
_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
_STYLE: Final = """
body{font:14px/1.5 system-ui,sans-serif;margin:1.5rem;color-scheme:light dark}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:2rem}
.scroll{overflow-x:auto;border:1px solid color-mix(in srgb,currentColor 25%,transparent)}
svg{display:block}text{font:9px system-ui,sans-serif;fill:currentColor}
.key span{display:inline-block;margin-right:1rem}.key i{display:inline-block;width:.8em;height:.8em;
margin-right:.3em}label{display:block;margin:.6rem 0}
"""
_SCRIPT: Final = """
const zoom=document.getElementById('zoom');
zoom.addEventListener('input',()=>{const z=Number(zoom.value);
for(const svg of document.querySelectorAll('svg')){
svg.setAttribute('width',Number(svg.dataset.cycles)*z+120);
svg.querySelector('g').setAttribute('transform',`translate(120,0) scale(${z},1)`)}});
"""


def rows_of(program: Program, each: Instruction) -> Iterator[tuple[str, int]]:
    """The rows of the picture an instruction is drawn in, with their order."""
    unit = OPS[each.op].unit
    if unit == "MEM":
        side = program.chip.side
        step = program.chip.slices_per_hop
        seen = set()
        for index in range(each.unit, each.unit + each.gang):
            east, depth = divmod(index, side)
            group = depth // step
            if (east, group) not in seen:
                seen.add((east, group))
                yield f"MEM {'east' if east else 'west'} {group}", 100 + group * 2 + east
    elif unit == "MXM":
        order = {"LW": 0, "IW": 0, "ABC": 1, "ACC": 2}[each.op]
        name = ("load", "feed", "emit")[order]
        yield f"MXM {each.unit} {name}", 10 + each.unit * 3 + order
    elif unit == "VXM":
        yield f"VXM {each.unit}", 40 + each.unit
    elif unit == "SXM":
        yield f"SXM {'east' if each.unit else 'west'}", 70 + each.unit
    else:
        yield f"C2C {each.unit}", 80 + each.unit


def page(program: Program, bucket: int) -> str:
    """One HTML file that shows every segment of every chip once."""
    title = f"{program.model} on {len(program.parts)} x {program.chip.name}"
    if program.group > 1:
        title += f", {program.group} to a layer"
    parts = []
    for index, part in enumerate(program.parts):
        for segment in part.buckets[bucket].segments:
            cycles = segment_cycles(program.chip, segment)
            parts.append(
                f"<h2>Chip {index}: {segment.name}, {segment.stamps} x {segment.length:,} cycles"
                f" ({cycles:,} in all)</h2>{_picture(program, segment)}"
            )
    tokens = program.parts[0].buckets[bucket].tokens
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>Every instruction of one token, contexts of up to {tokens}"
        " tokens: a row for each unit, from left to right the cycles. Point at a bar for the"
        " instruction.</p>"
        '<label>Width of a cycle <input id="zoom" type="range" min="0.1" max="4" step="0.1"'
        f' value="{_SCALE}"></label>{"".join(parts)}<script>{_SCRIPT}</script></body></html>'
    )


def _picture(program: Program, segment: Segment) -> str:
    stages = list(dict.fromkeys(segment.stages))
    colours = {stage: _colour(i) for i, stage in enumerate(stages)}
    order: dict[str, int] = {}
    for each in segment.instructions:
        order.update(dict(rows_of(program, each)))
    names = sorted(order, key=lambda name: order[name])
    at = {name: i for i, name in enumerate(names)}
    bars = []
    for each, stage in zip(segment.instructions, segment.stages, strict=True):
        length = max((each.n - 1) * each.gap + 1, 1)
        hint = escape(f"{stage}: {each.op} x{each.n} at {each.at}")
        bars += [
            f'<rect x="{each.at}" y="{at[row] * _ROW}" width="{length}" height="{_ROW - 1}"'
            f' fill="{colours[stage]}"><title>{hint}</title></rect>'
            for row, _ in rows_of(program, each)
        ]
    labels = "".join(
        f'<text x="2" y="{i * _ROW + 8}">{escape(name)}</text>' for i, name in enumerate(names)
    )
    height = len(names) * _ROW
    key = "".join(
        f'<span><i style="background:{colours[stage]}"></i>{escape(stage)}</span>'
        for stage in stages
    )
    width = int(segment.length * _SCALE) + _LEFT
    return (
        f'<p class="key">{key}</p><div class="scroll"><svg data-cycles="{segment.length}"'
        f' width="{width}" height="{height}" role="img" aria-label="{escape(segment.name)}">'
        f'{labels}<g transform="translate({_LEFT},0) scale({_SCALE},1)">'
        f"{''.join(bars)}</g></svg></div>"
    )


def _colour(index: int) -> str:
    return f"hsl({_HUES[index % len(_HUES)]} 60% {45 + 15 * (index // len(_HUES))}%)"


def chrome(program: Program, bucket: int) -> bytes:
    """The schedule in Chrome's trace format; a cycle is a microsecond of the picture, exactly.

    A process is a chip, a thread a row. The format wants what is on one thread nested or apart, so
    instructions of a row that overlap (of slices that share a row) go to a thread beside it.
    """
    events: list[dict[str, Any]] = []
    begun = start = 0
    for index, part in enumerate(program.parts):
        # Chips of a group run at the same time, groups one after the other.
        begun = start = begun if index % program.group else start
        bars: list[tuple[int, int, str, dict[str, Any]]] = []
        for segment in part.buckets[bucket].segments:
            for each, stage in zip(segment.instructions, segment.stages, strict=True):
                at = start + each.at
                bar = {"ph": "X", "pid": index, "name": each.op, "cat": stage, "ts": at,
                       "dur": (each.n - 1) * each.gap + 1,
                       "args": {"stage": stage, "count": each.n}}  # fmt: skip
                bars += [(order, at, row, bar) for row, order in rows_of(program, each)]
            start += segment_cycles(program.chip, segment)
            start += program.chip.link_cycles * (segment.name == "send")
        events.append(_named(index, 0, "process_name", f"chip {index} (1 µs is a cycle)"))
        events += _threads(index, bars)
    return msgspec.json.encode({"traceEvents": events})


def _threads(chip: int, bars: list[tuple[int, int, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Bars (row's order, start, row's name, event) on as many threads as keep them apart."""
    found: list[dict[str, Any]] = []
    ends: dict[tuple[str, int], int] = {}
    for order, at, row, bar in sorted(bars, key=lambda each: each[:3]):
        beside = next(n for n in count() if ends.get((row, n), 0) <= at)
        tid = order * _BESIDE + beside
        if (row, beside) not in ends:
            name = row if not beside else f"{row}, too"
            found.append(_named(chip, tid, "thread_name", name))
            found.append({"ph": "M", "pid": chip, "tid": tid, "name": "thread_sort_index",
                          "args": {"sort_index": tid}})  # fmt: skip
        ends[row, beside] = at + bar["dur"]
        found.append({**bar, "tid": tid})
    return found


def _named(chip: int, tid: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": chip, "tid": tid, "name": what, "args": {"name": name}}
