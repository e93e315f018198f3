"""A gateway's ledger in a process of its own, for tests that kill it or fill its disk.

Each line on stdout tells what is journalled by then.
"""

import resource
import sys
import time
from collections import deque
from pathlib import Path

from tokenworks.gateway.ledger import Ledger, LedgerError, Row

SMALL = 1 << 15  # bytes of a segment, so that there are many


def say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def admit(ledger: Ledger, identity: str) -> None:
    now_ns = time.time_ns()
    ledger.admit(identity, now_ns, "acme", "k1", "m", "/v1/completions", "standard")


def row(identity: str, tokens: int, **more: object) -> Row:
    return Row(identity, time.time_ns(), tenant="acme", output_tokens=tokens, **more)  # type: ignore[arg-type]


def serve(folder: Path, name: str) -> None:
    """Admit, end, amend and refuse for as long as one is let; 30 requests are under way."""
    ledger = Ledger(folder, keep_days=1, segment_bytes=SMALL)
    ledger.open()
    running: deque[int] = deque()
    say("open")
    for number in range(10**9):
        admit(ledger, f"{name}-{number}")
        running.append(number)
        if number % 5:
            continue
        ended = [running.popleft() for _ in range(len(running) - 30)]
        for one in ended:
            if one % 1000:  # the others go on for ever
                ledger.end(row(f"{name}-{one}", one))
        ledger.end(row(f"{name}-{number}-refused", 0, outcome="rejected", status=429))
        ledger.flush()
        say(" ".join([str(number), *(str(one) for one in ended if one % 1000)]))


def fill(folder: Path) -> None:
    """Run into a limit that is as hard as a full disk, go on refusing, and get over it."""
    ledger = Ledger(folder, keep_days=1, segment_bytes=1 << 30)
    ledger.open()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most))
    number = 0
    try:
        for number in range(10**6):
            admit(ledger, f"{number}")
            if number > 9:
                ledger.end(row(f"{number - 10}", number - 10))
            ledger.flush()
    except LedgerError as error:
        say(str(error))
    say(f"{number} {ledger.is_broken}")
    # The last one was never journalled, so it is refused; those before it end as ever.
    for one in range(number - 9, number):
        ledger.end(row(f"{one}", one))
    ledger.end(row(f"{number}", 0, outcome="rejected", status=503, reason="ledger"))
    time.sleep(0.5)  # long enough for another try, and for SQLite to hit the limit as well
    try:
        ledger.flush()
    except LedgerError:
        say("still full")
    size = sum(p.stat().st_size for p in folder.glob("journal-*"))
    say(f"{size} {ledger._journal.head.end}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    time.sleep(0.3)
    ledger.flush()
    say(f"{ledger.is_broken} {ledger.lost}")
    admit(ledger, "after")
    ledger.flush()
    ledger.end(row("after", 1))
    ledger.close()
    say(f"trouble: {ledger.books.trouble}")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]), sys.argv[3])
    else:
        fill(Path(sys.argv[2]))
