"""Works off batches: the one with the nearest deadline first, a window of lines at a time.

Each live batch has one task that takes it from status to status (store.AFTER) and reads the status
again after each step, so a restart, an error and a cancellation need no code of their own: whatever
happened, the task goes on from what is written. Lines are sent by `_fill` and their ends written by
one more task, many in one transaction.
"""

import asyncio
import bisect
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from tokenworks.gateway.batch import answers, lines, store
from tokenworks.gateway.batch.inside import Inside, mistake
from tokenworks.gateway.batch.job import Flight, Job, request_id
from tokenworks.gateway.batch.lines import Damaged, Fault, Input
from tokenworks.gateway.batch.settings import BatchSettings
from tokenworks.gateway.batch.store import Batch, End
from tokenworks.gateway.ledger.books import Books
from tokenworks.gateway.ledger.row import Row

_log = logging.getLogger(__name__)

# Answers that are about the moment and not about the line.
_NOT_NOW: Final = frozenset({429, 498, 499, 503})
_BURST: Final = 16  # lines sent in one turn of the loop
_EXPIRED_AT_ONCE: Final = 256
_TICK_S: Final = 1.0
_AGAIN_S: Final = 5.0


class Runner:
    """The live batches. All methods are for the loop's thread."""

    def __init__(
        self,
        books: Books,
        inside: Inside,
        settings: BatchSettings,
        *,
        path_of: Callable[[str], Path],
        now_s: Callable[[], float],
    ) -> None:
        self._books = books
        self._inside = inside
        self._settings = settings
        self._path_of = path_of
        self._now_s = now_s  # wall clock, s
        self._jobs: list[Job] = []  # the nearest deadline first
        self._tasks: set[asyncio.Task[None]] = set()
        self._checking = asyncio.Semaphore(1)  # files are checked one after another
        self._ended: list[tuple[Flight, End]] = []
        self._has_ended = asyncio.Event()
        self._writing = asyncio.Lock()
        self._writer: asyncio.Task[None] | None = None
        self._is_filling = False
        self._unsettled = 0
        self._unsettled_bytes = 0
        self.running = 0  # lines at work

    async def start(self) -> None:
        """Take up every live batch where it was left."""
        for batch in await self._books.ask(store.live):
            self.add(batch.id)
        self._spawn(self._tick())
        self._writer = asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Stop what runs. Lines at work are run again after the next start."""
        await _cancel(self._tasks)
        if self._writer is not None:
            async with self._writing:
                await self._flush()
            await _cancel({self._writer})

    def add(self, id: str) -> None:  # noqa: A002
        """Look after a live batch from now on."""
        self._spawn(self._keep(id))

    def cancel(self, id: str) -> None:  # noqa: A002
        """Stop a batch that is cancelling."""
        for job in self._jobs:
            if job.batch.id == id:
                job.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # A batch's life

    async def _keep(self, id: str) -> None:  # noqa: A002
        """See a batch to its end, whatever happens on the way."""
        while True:
            try:
                batch = await self._books.ask(partial(store.by_id, id=id))
                await self._live(batch)
                return
            except Exception:
                _log.exception("%s is taken up again in %g s", id, _AGAIN_S)
            await asyncio.sleep(_AGAIN_S)

    async def _live(self, batch: Batch) -> None:
        job = Job(batch, self._settings.window)
        bisect.insort(self._jobs, job, key=lambda job: (job.deadline_s, job.batch.number))
        try:
            while True:
                # Read when the job is known: a cancellation either is in it, or closes the job.
                job.batch = await self._books.ask(partial(store.by_id, id=batch.id))
                if not job.batch.is_live:
                    return
                try:
                    await self._step(job)
                except (FileNotFoundError, Damaged):
                    _log.error("the input file of %s is gone", batch.id)
                    told = "The input file is gone from the gateway's disk."
                    await self._end(job, "failed", [Fault("file_not_found", told)])
                    continue
                if isinstance(job.error, Damaged):
                    told = "The input file was changed on the gateway's disk."
                    await self._end(job, "failed", [Fault("file_not_found", told)])
                elif job.error is not None:
                    raise job.error
        finally:
            job.close()
            self._jobs.remove(job)
            job.land()
            if job.input is not None:
                job.input.close()
            self._wake()

    async def _step(self, job: Job) -> None:
        """One step of a batch's life."""
        match job.batch.status:
            case "validating":
                await self._validate(job)
            case "in_progress":
                await self._run(job)
            case "finalizing":
                await self._finalize(job)
            case "cancelling":
                await self._end(job, "cancelled")
            case _:
                raise ValueError(f"{job.batch.id} is {job.batch.status}")

    async def _validate(self, job: Job) -> None:
        batch = job.batch
        async with self._checking:
            path = self._path_of(batch.input_file_id)
            found = await asyncio.to_thread(lines.check, path, batch.endpoint, self._settings)
        if found.faults:
            await self._end(job, "failed", found.faults)
            return
        await self._books.ask(
            partial(
                store.enter,
                id=batch.id,
                status="in_progress",
                now_s=self._unix_s(),
                total=found.lines,
                model=found.model,
            )
        )

    async def _run(self, job: Job) -> None:
        """Until every line has its end, or no time is left, or it was cancelled."""
        self._wake()
        self._look_at_deadline(job)
        await _either(job.wanted, job.over)
        if not job.over.is_set():
            await self._open(job)
            job.is_open = True
            if not job.undone:
                job.close()
            self._wake()
            await job.over.wait()
        job.close()
        if not job.undone or job.is_late:
            await self._books.ask(partial(store.finalize, id=job.batch.id, now_s=self._unix_s()))
        job.is_landing = job.error is None
        job.land()
        await job.settled.wait()

    async def _open(self, job: Job) -> None:
        """Find its lines, and which of them are still to be done."""
        batch = job.batch
        done = await self._books.ask(partial(store.done_lines, batch=batch.number))
        job.input = await asyncio.to_thread(Input, self._path_of(batch.input_file_id), batch.total)
        job.waiting.extend(number for number in range(1, batch.total + 1) if number not in done)
        job.undone = len(job.waiting)

    async def _finalize(self, job: Job) -> None:
        """Give the lines that were not reached their end, and the batch its own."""
        batch = job.batch
        if batch.completed + batch.failed < batch.total:
            if job.input is not None:
                job.input.close()
            job.waiting.clear()
            await self._open(job)
            while job.waiting:
                count = min(len(job.waiting), _EXPIRED_AT_ONCE)
                numbers = [job.waiting.popleft() for _ in range(count)]
                ends = await asyncio.to_thread(_expired, job, numbers)
                await self._books.ask(partial(store.end_lines, ends=ends))
        await self._end(job, "completed" if batch.expired_at is None else "expired")

    async def _end(self, job: Job, status: store.Status, faults: Sequence[Fault] = ()) -> None:
        now_s = self._unix_s()
        await self._books.ask(
            partial(store.end, id=job.batch.id, status=status, now_s=now_s, faults=faults)
        )

    def _unix_s(self) -> int:
        return int(self._now_s())

    async def _tick(self) -> None:
        """Look at the deadlines, by a clock that may be set, once a second."""
        while True:
            await asyncio.sleep(_TICK_S)
            for job in self._jobs:
                self._look_at_deadline(job)

    def _look_at_deadline(self, job: Job) -> None:
        if self._now_s() >= job.deadline_s:
            job.is_late = True
            job.close()

    # Lines

    def _wake(self) -> None:
        """Send lines in the loop's next turn."""
        if not self._is_filling:
            self._is_filling = True
            asyncio.get_running_loop().call_soon(self._fill)

    def _fill(self) -> None:
        """Send lines while there is room for them, some in each turn."""
        self._is_filling = False
        sent = 0
        for job in self._jobs:
            if job.batch.status != "in_progress" or job.over.is_set():
                continue
            is_new = not job.wanted.is_set()
            job.wanted.set()
            while job.waiting and job.may_send and self._has_room(job):
                if sent == _BURST:
                    self._wake()
                    return
                sent += 1
                self._send(job, job.waiting.popleft())
            # Without room, no more than the next is made ready.
            if self._unsettled >= self._settings.window and (is_new or job.waiting):
                return

    def _has_room(self, job: Job) -> bool:
        assert job.input is not None
        try:
            held = self._unsettled_bytes + job.input.size(job.waiting[0])
        except Damaged as error:
            job.fail(error)
            return False
        return self._unsettled < self._settings.window and (
            not self._unsettled or held <= self._settings.window_bytes
        )

    def _send(self, job: Job, number: int) -> None:
        assert job.input is not None
        try:
            line = job.input.line(number)
        except (OSError, Damaged) as error:
            job.fail(error)
            return
        flight = Flight(job, number, line.custom_id, job.input.size(number))
        job.depart(flight)
        self._unsettled += 1
        self._unsettled_bytes += flight.size
        self.running += 1
        batch = job.batch
        try:
            flight.cancel = self._inside.run(
                id=flight.id,
                route=lines.ENDPOINTS[batch.endpoint],
                body=line.body,
                tenant=batch.tenant,
                key=batch.key,
                batch=batch.id,
                deadline_unix_s=float(batch.expires_at),
                on_done=partial(self._done, flight),
            )
        except Exception:
            _log.exception("line %d of %s could not be run", number, batch.id)
            self._done(flight, *mistake(flight))

    def _done(self, flight: Flight, status: int, body: bytes, row: Row) -> None:
        """A line's request has ended: for good, for now, or because its batch has."""
        if flight.is_over:
            return
        flight.is_over = True
        self.running -= 1
        job, number = flight.job, flight.number
        del job.flights[number]
        if status < 400:
            job.accepted()
        elif status in _NOT_NOW or status >= 500:
            if job.is_landing:
                # Cut short: no end of the line, but what it took is charged.
                self._put(flight, None, row if row.outcome != "rejected" else None)
                return
            if status in _NOT_NOW or self._may_try_again(job, number):
                job.waiting.appendleft(number)
                self._settle(flight)
                rest_s = job.refused()
                if rest_s is not None:
                    asyncio.get_running_loop().call_later(rest_s, self._rested, job)
                return
        text = answers.answer(flight.id, flight.custom_id, status, body)
        self._put(flight, text, row, is_error=status >= 400)

    def _rested(self, job: Job) -> None:
        job.is_resting = False
        self._wake()

    def _may_try_again(self, job: Job, number: int) -> bool:
        job.tries[number] = job.tries.get(number, 0) + 1
        return job.tries[number] < self._settings.tries

    def _put(
        self, flight: Flight, text: bytes | None, row: Row | None, *, is_error: bool = False
    ) -> None:
        end = End(flight.job.batch.number, flight.number, is_error, text, row)
        self._ended.append((flight, end))
        self._has_ended.set()

    async def _write(self) -> None:
        """Write the ends of lines, all that have come while the last were written."""
        while True:
            await self._has_ended.wait()
            async with self._writing:
                await self._flush()

    async def _flush(self) -> None:
        self._has_ended.clear()
        ended, self._ended = self._ended, []
        error: Exception | None = None
        try:
            await self._books.ask(partial(store.end_lines, ends=[end for _, end in ended]))
        except Exception as raised:  # its batches begin again from what is written
            error = raised
        for flight, end in ended:
            job = flight.job
            if error is not None:
                job.fail(error)
            elif end.text is not None:
                job.undone -= 1
                if not job.undone:
                    job.close()
            self._settle(flight)

    def _settle(self, flight: Flight) -> None:
        self._unsettled -= 1
        self._unsettled_bytes -= flight.size
        flight.job.settle()
        self._wake()


def _expired(job: Job, numbers: list[int]) -> list[End]:
    """The ends of lines that were not reached in time. Reads the input file: not for the loop."""
    batch, file = job.batch, job.input
    assert file is not None
    return [
        End(
            batch.number,
            number,
            is_error=True,
            text=answers.expired(request_id(batch, number), file.line(number).custom_id),
            row=None,
        )
        for number in numbers
    ]


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for their end."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


async def _either(*events: asyncio.Event) -> None:
    """Wait for one of them."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
