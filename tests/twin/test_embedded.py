"""The real embedded engine, recorded at one load, foretells itself at another.

Bounds are ratios, so they hold on any machine, and wide: others work on it too. Times are without
the engine's waits for a core that another process has; the two loads take turns, so that what
disturbs one mostly disturbs the other; and there are three tries, as a burst of foreign work in one
half only is no fault of the model's. A wrong model fails all three: one with doubled times must be
refused in the very try that passes.
"""

import asyncio

import pytest
from msgspec.structs import replace

from tests.twin.test_calibrate import command
from tokenworks.cost.measured import Constants
from tokenworks.twin.calibrate import calibrated
from tokenworks.twin.validate import errors

# A try takes half a minute, and longer the less of a core the engine gets.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

TRIES = 3
WITHIN = {"TTFT": 2.0, "TPOT": 1.5, "E2E": 1.5}

bench = command()


def doubled(constants: Constants) -> Constants:
    return replace(
        constants,
        decode_ns=tuple(2 * each for each in constants.decode_ns),
        seen_ns=2 * constants.seen_ns,
        chunk_ns=2 * constants.chunk_ns,
        prompt_token_ns=2 * constants.prompt_token_ns,
        pair_ns=2 * constants.pair_ns,
    )


def refused(constants: Constants, recording: object, runs: object) -> list[str]:
    """The metrics whose mean these constants miss by more than is allowed."""
    found = errors(bench.flat(runs), bench.played(constants, recording, runs))
    return [
        f"{e.metric} {e.of_mean:+.0%}"
        for e in found
        if not 1 / WITHIN[e.metric] <= 1 + e.of_mean <= WITHIN[e.metric]
    ]


def test_one_load_foretells_the_other() -> None:
    lengths = bench.Lengths(prompt=(20, 80), output=(8, 32))
    told = []
    for _ in range(TRIES):
        recording = asyncio.run(bench.recorded(2, (6, 8), (0.4, 0.8), lengths, 8))
        limits = recording.limits
        loads = recording.by("own")
        tuned = [calibrated(runs, limits) for runs in loads]
        # What each load's constants say of the other load.
        pairs = list(zip(reversed(tuned), loads, strict=True))
        off = [refused(constants, recording, runs) for constants, runs in pairs]
        slow = [refused(doubled(constants), recording, runs) for constants, runs in pairs]
        if not any(off) and all(any(each.startswith("E2E") for each in s) for s in slow):
            return
        told.append((off, slow, [seen.own.served.e2e_ns for seen in recording.probes]))
    pytest.fail(f"missed {TRIES} times: {told}")
