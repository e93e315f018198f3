"""The factory's SQLite file: one writer in a thread of its own, whose works share commits."""

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, TypeVar

from tokenworks.errors import UserError

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

_log = logging.getLogger(__name__)

# FULL: a commit survives power loss. It is asked for some times a second, by no one who waits.
_WRITER: Final = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA journal_size_limit = 67108864",
)
_MOST_WORKS: Final = 1000  # in one commit


class _Job(NamedTuple):
    """A work, and what is told (its result, its error) after the commit."""

    work: Work[Any]
    settled: Callable[[Any, Exception | None], object]


class _Repeat:
    """A job that is done every `interval_s`."""

    def __init__(self, interval_s: float, job: _Job) -> None:
        self.interval_s = interval_s
        self.job = job
        self.due_s = time.monotonic()


class Books:
    """One SQLite file in WAL mode. `trouble` says what is wrong with it; "" if nothing is.

    Works run one after another, many in one transaction; one that fails undoes only itself. They
    should be short: all others wait. UserError if the file can't be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in _WRITER:
                self._connection.execute(pragma)
        except sqlite3.Error as error:
            raise unusable(path, error) from error
        self._reader: sqlite3.Connection | None = None
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._repeats: list[_Repeat] = []
        self._thread = threading.Thread(target=self._run, name="books", daemon=True)
        self._thread.start()

    def write(self, work: Work[object]) -> None:
        """Do it in the writer's thread, in order; an error is logged and kept in `trouble`."""
        self._queue.put(_Job(work, _heard))

    async def ask(self, work: Work[T]) -> T:
        """Do it in the writer's thread, in order; returns after its commit, raises its error.

        One whose caller has gone before its turn is not done.
        """
        return await asyncio.wrap_future(self._submit(work))

    def wait(self, work: Work[T]) -> T:
        """The same for a caller who may block: before the loop runs, or in a thread."""
        return self._submit(work).result()

    def read(self, work: Work[T]) -> T:
        """Do it here and now on a connection that only reads: for short queries of the loop."""
        if self._reader is None:
            self._reader = sqlite3.connect(self.path, isolation_level=None)
            self._reader.execute("PRAGMA query_only = 1")
        return work(self._reader)

    def repeat(
        self,
        interval_s: float,
        work: Work[T],
        settled: Callable[[T, Exception | None], object] | None = None,
    ) -> None:
        """Do it now, every `interval_s` and once more at the end; `settled` hears of each commit.

        Both run in the writer's thread.
        """
        job = _Job(work, _heard if settled is None else settled)
        self._repeats.append(_Repeat(interval_s, job))
        self.write(lambda _: None)  # wakes the thread up

    def close(self) -> None:
        """Do what is queued, and end."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._connection.close()
        if self._reader is not None:
            self._reader.close()

    def _submit(self, work: Work[T]) -> "Future[T]":
        future: Future[T] = Future()

        def begun(connection: sqlite3.Connection) -> T | None:
            return work(connection) if future.set_running_or_notify_cancel() else None

        def settled(result: T, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._queue.put(_Job(begun, settled))
        return future

    def _run(self) -> None:
        is_open = True
        while is_open:
            jobs: list[_Job] = []
            try:
                job = self._queue.get(timeout=self._rest_s())
                while job is not None and len(jobs) < _MOST_WORKS:
                    jobs.append(job)
                    job = self._queue.get_nowait()
                if job is not None:
                    jobs.append(job)
                is_open = job is not None
            except Empty:
                pass
            now_s = time.monotonic()
            for repeat in self._repeats:
                if repeat.due_s <= now_s or not is_open:
                    repeat.due_s = now_s + repeat.interval_s
                    jobs.append(repeat.job)
            if jobs:
                self._do(jobs)

    def _rest_s(self) -> float | None:
        """How long until something is due; None if nothing is."""
        if not self._repeats:
            return None
        return max(0.0, min(repeat.due_s for repeat in self._repeats) - time.monotonic())

    def _do(self, jobs: list[_Job]) -> None:
        """All of them in one transaction."""
        done: list[tuple[Any, Exception | None]] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            done.extend(self._one(job.work) for job in jobs)
            self._connection.execute("COMMIT")
        except Exception as error:
            # A full disk, say: what was done of it is undone, and all hear of it.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            done = [(None, error)] * len(jobs)
        errors = [error for _, error in done if error is not None]
        trouble = f"{self.path}: {errors[0]}" if errors else ""
        if trouble != self.trouble and errors:
            _log.error("cannot write to %s", trouble, exc_info=errors[0])
        self.trouble = trouble
        for job, (result, error_of_it) in zip(jobs, done, strict=True):
            try:
                job.settled(result, error_of_it)
            except Exception:
                _log.exception("what follows a commit failed")

    def _one(self, work: Work[Any]) -> tuple[Any, Exception | None]:
        """Its result or its error. Raises it if the whole transaction is lost."""
        execute = self._connection.execute
        execute("SAVEPOINT work")
        try:
            result = work(self._connection)
        except Exception as error:  # whatever it is, it is its caller's
            if not self._connection.in_transaction:
                raise
            execute("ROLLBACK TO work")
            execute("RELEASE work")
            return None, error
        execute("RELEASE work")
        return result, None


def unusable(path: Path, error: Exception) -> UserError:
    """What a person reads whose ledger can't be written or read there."""
    why = error.strerror if isinstance(error, OSError) else None
    return UserError(
        f"cannot use the ledger in {path}: {why or error}",
        "Give it a folder that can be written (TOKENWORKS_STATE); if the file is damaged, move it "
        "away.",
    )


def _heard(_result: object, _error: Exception | None) -> None:
    """Nobody waits; `trouble` and the log tell of an error."""
