"""Where does an LPU pool beside GPUs save joules, and where is it ten times as many?

    python bench/lpu_question.py            # all of it
    python bench/lpu_question.py --quick    # fewer draws, one site, two bounds, two loads

First from the cost model (lpu_frontier.py): joules per token at each speed for a user, as a range
over assumptions that have names. Then in the twin (lpu_fleets.py): the same traffic on fleets
within the same peak power. A ratio is the GPUs' joules over the LPUs': above 1 the LPU saves.
docs/lpu-question.md has the answer. Ctrl-C ends it and leaves what is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from random import Random
from time import perf_counter

import lpu_fleets as fleets
import lpu_frontier as frontier
from lpu_fleets import Cell, Study
from lpu_frontier import LP30, V1, Option, Pair, Values
from tokenworks.catalog.book import Catalog, catalog

SPEEDS = (20, 50, 100, 150, 200, 300, 400, 500, 1000)
LOADS = (1, 4, 16, 64, 256, 1024, 4096)
# Each with the speed at which its assumptions are turned: near the GPU's end, not at it.
PAIRS = (
    (Pair("llama-3.1-8b", "b200", LP30), 200),
    (Pair("llama-3.1-70b", "b200", LP30), 100),
    (Pair("gpt-oss-120b", "b200", LP30), 200),
    (Pair("llama-3.1-8b", "h100", V1), 200),
    (Pair("llama-3.1-70b", "h100", V1), 70),
)
DRAWS, QUICK_DRAWS = 100, 20
SMALL, LARGE = fleets.SMALL, fleets.LARGE
STUDIES = (
    Study(SMALL, "azure-conversation"),
    Study(LARGE, "azure-conversation"),
    Study(SMALL, "azure-code", (50, 5), (20, 80)),
    Study(SMALL, "mooncake-conversation", (50, 5), (20, 80)),
)
QUICK_STUDIES = (Study(SMALL, "azure-conversation", (50, 3), (20, 80)),)
# Where both sides are near each other, with what the frontier's tornado says matters most.
TIGHT = Study(SMALL, "azure-conversation", (5, 3), (80, 320))
TURNED: tuple[Values, ...] = (
    {"LP30 watts": 300},
    {"LP30 watts": 300, "LP30 install rate / SRAM's": 0.5},
    {"GPU engine's overheads, x": 0.3},
)
NEVER, NO_GPU, NO_LPU = "-", "no GPU", "no LPU"  # that is so fast
say = partial(print, file=sys.stderr, flush=True)


def row(label: str, cells: Iterable[str], width: int = 12) -> None:
    print((f"  {label:34}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip())


def saved(gpu: Option | None, lpu: Option | None) -> float | None:
    """The GPU's joules over the LPU's; infinite where only the LPU is fast enough."""
    if lpu is None:
        return None if gpu is None else 0.0
    return float("inf") if gpu is None else gpu.joules / lpu.joules


def told(ratio: float | None) -> str:
    if ratio is None:
        return NEVER
    if ratio == float("inf"):
        return NO_GPU
    if not ratio:
        return NO_LPU
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}"


def joules(option: Option | None) -> str:
    return NEVER if option is None else f"{option.joules:.3f} J"


def both(pair: Pair, values: Values) -> tuple[list[Option], list[Option]]:
    return frontier.gpu_options(pair, values), frontier.lpu_options(pair, values)


def ratio(pair: Pair, values: Values, speed: float) -> float | None:
    users = int(frontier.value(frontier.USERS, values))
    gpu, lpu = both(pair, values)
    return saved(frontier.best(gpu, users, speed), frontier.best(lpu, users, speed))


# Tables of the cost model


def speeds(pair: Pair, draws: int) -> None:
    """What each takes at a speed, and the range of the ratio over the draws."""
    gpu, lpu = both(pair, {})
    split = frontier.joined_options(pair, {})
    drawn: dict[int, list[float]] = {speed: [] for speed in SPEEDS}
    chance = Random(f"{pair}")
    for _ in range(draws):
        options = both(pair, frontier.drawn(pair, chance))
        for speed, found in drawn.items():
            each = saved(*(frontier.best(o, frontier.MOST_USERS, speed) for o in options))
            found.append(0.0 if each is None else each)
    print(f"\n{pair.model}, {pair.gpu} and {pair.lpu}: joules/token; devices @ users")
    print("  tokens/s/user          GPU                       LPU                "
          "GPU + LPU split       ratio   in 90 % of draws      >= 10")  # fmt: skip
    for speed, found in drawn.items():
        row_of = [frontier.best(o, frontier.MOST_USERS, speed) for o in (gpu, lpu, split)]
        cells = [
            f"{joules(option)} {option.name if option else '':13}".rjust(24) for option in row_of
        ]
        found.sort()
        low, high = (told(found[round(share * (draws - 1))]) for share in (0.05, 0.95))
        tenfold = sum(each >= 10 for each in found if each != float("inf")) / draws
        print(f"  {speed:>6} {''.join(cells)}{told(saved(*row_of[:2])):>9}"
              f"{low + ' to ' + high:>20}{tenfold:>12.0%}".rstrip())  # fmt: skip
    fast = [frontier.fastest(options) for options in (gpu, lpu, split)]
    print(f"  the fastest: GPU {fast[0]:.0f}, LPU {fast[1]:.0f}, split {fast[2]:.0f} tokens/s/user")


def loads(pair: Pair) -> None:
    """The ratio over the load and the speed, all assumptions at their base."""
    gpu, lpu = both(pair, {})
    print(f"\n{pair.model}, {pair.gpu} over {pair.lpu}: ratio by users at once and tokens/s/user")
    row("users", [str(speed) for speed in SPEEDS], 8)
    for users in LOADS:
        cells = [
            told(saved(frontier.best(gpu, users, speed), frontier.best(lpu, users, speed)))
            for speed in SPEEDS
        ]
        row(f"{users}", cells, 8)
    for goal in (1, 10):
        row(f"users from which it is {goal}", [_from(gpu, lpu, s, goal) for s in SPEEDS], 8)
    own = {k.name: k.favouring for k in frontier.FACTS if k.name.startswith(("LP", "v1"))}
    quick = {"GPU engine's overheads, x": 0.3}
    for name, values in (
        ("all of the LPU's facts for it", own),
        ("GPU engine's overheads x 0.3", quick),
        ("both", own | quick),
    ):
        row(name, [told(ratio(pair, values, speed)) for speed in SPEEDS], 8)


def splits(pair: Pair) -> None:
    """GPUs alone over the split of each layer, where the cache stays with the GPUs."""
    print(f"\n{pair.model}, {pair.gpu} over {pair.gpu} + {pair.lpu} split: ratio by context")
    row("tokens of context", [str(speed) for speed in SPEEDS], 8)
    for context in (1024, 8192, 32768):
        values = {"tokens of context": context}
        gpu, split = frontier.gpu_options(pair, values), frontier.joined_options(pair, values)
        each = [[frontier.best(o, frontier.MOST_USERS, s) for o in (gpu, split)] for s in SPEEDS]
        row(str(context), [told(saved(*two)) for two in each], 8)


def _from(gpu: Sequence[Option], lpu: Sequence[Option], speed: float, goal: float) -> str:
    for users in frontier.BATCHES:
        found = saved(frontier.best(gpu, users, speed), frontier.best(lpu, users, speed))
        if found is not None and found >= goal:
            return NO_GPU if found == float("inf") else str(users)
    return NEVER


def compared(pair: Pair) -> None:
    """The same LPU beside GPUs that are used ever worse: where large ratios come from."""
    gpu, lpu = both(pair, {})
    ours = frontier.best(lpu, frontier.MOST_USERS, 0)
    one = frontier.best(lpu, 1, 0)
    assert ours
    assert one
    print(f"\n{pair.model}: {pair.lpu} with all places filled takes {joules(ours)} ({ours.name}), "
          f"for one user {joules(one)}; {pair.gpu}")  # fmt: skip
    for users in (1, 8, 64, frontier.MOST_USERS):
        found = frontier.best(gpu, users, 0)
        assert found
        row(
            f"{users} users at most",
            [joules(found), told(saved(found, ours)), f"{found.speed:.0f}/s"],
        )


def tornado(pair: Pair, speed: float) -> None:
    """Each assumption alone at its ends, the widest first."""
    base = ratio(pair, {}, speed)
    print(f"\n{pair.model}, {pair.gpu} over {pair.lpu} at {speed} tokens/s/user: {told(base)}")
    row("", ["against", "taken", "for", "ratio", "to"], 9)
    rows = []
    for knob, against, favouring in frontier.turned(pair):
        ends = [ratio(pair, values, speed) for values in (against, favouring)]
        low, high = (0.001 if end is None else max(end, 0.001) for end in ends)
        rows.append((high / low, knob, ends))
    for _, knob, ends in sorted(rows, key=lambda each: -each[0]):
        values = [f"{v:g}" for v in (knob.against, knob.base, knob.favouring)]
        row(knob.name, [*values, *map(told, ends)], 9)


def analytic(pairs: Sequence[tuple[Pair, float]], draws: int) -> None:
    for pair, speed in pairs:
        say(f"{pair.model} on {pair.gpu} and {pair.lpu} …")
        speeds(pair, draws)
        loads(pair)
        if pair.lpu == LP30:
            splits(pair)
        compared(pair)
        tornado(pair, speed)


# Tables of the twin


def measure(studies: Sequence[Study], book: Catalog, found: list[Cell]) -> bool:
    """All runs into `found`, a point's at once; False if that was interrupted."""
    total = sum(len(study.points()) * len(study.site.fleets) for study in studies)
    begin_s = perf_counter()
    for study in studies:
        for bound_ms, rate_per_s in study.points():
            beside = []
            for fleet in study.site.fleets:
                cell, is_whole = fleets.run(study, fleet, bound_ms, rate_per_s, book)
                if not is_whole:
                    return False
                beside.append(cell)
            found += beside
            point = f"{study.site.model}, {study.workload}, {bound_ms:g} ms, {rate_per_s:g}/s"
            say(f"{len(found)}/{total} runs, {perf_counter() - begin_s:.0f} s: {point}")
    return True


def twin(found: Sequence[Cell]) -> None:
    """Of each side the best fleet, for each bound and load."""
    for (model, workload), group in groupby(found, lambda cell: (cell.model, cell.workload)):
        print(f"\n{model}, {workload}: joules for each token in time, of fleets that serve "
              f"{fleets.ENOUGH:.0%} in time")  # fmt: skip
        print("    ms/token  requests/s   GPUs only" + " " * 35 + "with LPUs" + " " * 38 + "ratio")
        for (bound_ms, rate), cells in groupby(group, lambda c: (c.bound_ms, c.rate_per_s)):
            own = list(cells)
            gpu, lpu = (fleets.best(own, has_lpu=has_lpu) for has_lpu in (False, True))
            texts = [_side(own, best, has_lpu) for best, has_lpu in ((gpu, False), (lpu, True))]
            gain = (
                NEVER if lpu is None else NO_GPU if gpu is None else told(gpu.joules / lpu.joules)
            )
            print(f"  {bound_ms:>10g}{rate:>12g}   {texts[0]:44}{texts[1]:46}{gain:>6}")


def _side(cells: Sequence[Cell], best: Cell | None, has_lpu: bool) -> str:
    if best is not None:
        return f"{best.joules:.3f} J  {best.fleet}"
    most = max((c.attainment for c in cells if c.has_lpu == has_lpu), default=None)
    return NEVER if most is None else f"none; {most:.1%} in time at most"


def turned(study: Study, values: Values) -> None:
    """A part of the twin again, with an assumption at another value."""
    name = ", ".join(f"{knob} {number:g}" for knob, number in values.items())
    say(f"{study.site.model}, {study.workload}, with {name} …")
    own: list[Cell] = []
    book = frontier.book(Pair(study.site.model, "b200", LP30), values)
    is_whole = measure([study], book, own)
    print(f"\nwith {name}:", end="")
    twin(own)
    if not is_whole:
        raise KeyboardInterrupt


def replayed(*, is_quick: bool) -> None:
    found: list[Cell] = []
    is_whole = measure(QUICK_STUDIES if is_quick else STUDIES, catalog(), found)
    twin(found)
    if not is_whole:
        raise KeyboardInterrupt
    for values in () if is_quick else TURNED:
        turned(TIGHT, values)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small part of it")
    parser.add_argument("--only", choices=("frontier", "twin"), help="one of the two parts")
    args = parser.parse_args()
    try:
        if args.only != "twin":
            analytic(PAIRS[:2] if args.quick else PAIRS, QUICK_DRAWS if args.quick else DRAWS)
        if args.only != "frontier":
            replayed(is_quick=args.quick)
    except KeyboardInterrupt:
        say("stopped; what was done is above")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
