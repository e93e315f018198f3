"""How fast the cost model answers: the twin asks it for every step of every replica.

    python bench/cost.py

Goals: 100,000 `step` calls, with batches that change each time, take at most twice as long as 100
million turns of an empty loop in the same run (1 s or 2 on today's machines); 10,000 decode steps
taken at once are at least 100 times as fast as one by one.
"""

from __future__ import annotations

import random
import time

from tokenworks.catalog.book import catalog
from tokenworks.cost import Batch, Chunk, place, prepare
from tokenworks.model import library

CALLS = 100_000


def seconds(work: object) -> float:
    begin = time.perf_counter()
    assert callable(work)
    work()
    return time.perf_counter() - begin


def yardstick() -> None:
    for _ in range(100_000_000):
        pass


def main() -> None:
    book, rng = catalog(), random.Random(1)
    unit = min(seconds(yardstick) for _ in range(3))
    print(f"yardstick: {unit:.2f} s")
    for model, processor, devices in (
        ("llama-3.1-70b", "h100", 4),
        ("gpt-oss-120b", "h100", 1),
        ("deepseek-v3", "b200", 8),
        ("llama-2-70b", "groq-lpu-v1", 576),
    ):
        shape = library.shape(model)
        prepared = prepare(shape, place(book, shape, processor, devices), book)
        batches = []
        contexts = [rng.randrange(4000) for _ in range(256)]
        for _ in range(1000):
            chunks = (Chunk(rng.randrange(1, 512)),) if rng.random() < 0.3 else ()
            batches.append(Batch(contexts[: rng.randrange(1, 128)], chunks))

        def steps(prepared=prepared, batches=batches) -> None:  # type: ignore[no-untyped-def]
            for _ in range(CALLS // len(batches)):
                for batch in batches:
                    prepared.step(batch)

        took = min(seconds(steps) for _ in range(3))
        verdict = "reached" if took <= 2 * unit else "NOT reached"
        print(f"{model} on {processor}: {CALLS:,} steps {took / unit:.2f} (goal 2) {verdict}")

        def one_by_one(prepared=prepared) -> None:  # type: ignore[no-untyped-def]
            for index in range(10_000):
                prepared.step(Batch([1000 + index] * 16))

        def at_once(prepared=prepared) -> None:  # type: ignore[no-untyped-def]
            prepared.run([1000] * 16, 10_000).total()

        ratio = seconds(one_by_one) / min(seconds(at_once) for _ in range(5))
        verdict = "reached" if ratio >= 100 else "NOT reached"
        print(f"{model} on {processor}: 10,000 at once {ratio:,.0f} x (goal 100) {verdict}")


if __name__ == "__main__":
    main()
