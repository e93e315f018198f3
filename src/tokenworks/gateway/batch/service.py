"""Files and batches of all tenants: what the routes ask for, over store and runner."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from tokenworks.errors import UserError
from tokenworks.gateway.batch import files, store, upload
from tokenworks.gateway.batch.files import File, Page
from tokenworks.gateway.batch.inside import Inside
from tokenworks.gateway.batch.runner import Runner
from tokenworks.gateway.batch.settings import BatchSettings
from tokenworks.gateway.batch.store import Batch
from tokenworks.gateway.ledger.books import Books
from tokenworks.gateway.problem import Problem, invalid

T = TypeVar("T")

_log = logging.getLogger(__name__)

_UPLOAD: Final = re.compile(r"file-[0-9a-f]{24}")
_DAY_S: Final = 86_400
_TIDY_S: Final = 60.0
_PURGED_AT_ONCE: Final = 500
_PIECE_BYTES: Final = 256 * 1024


class Summary(msgspec.Struct, frozen=True):
    """How batches stand: how many in each status, and the lines of them all."""

    batches: dict[str, int]
    waiting: int
    running: int
    done: int


class BatchService:
    """The batch API of one gateway. Uploads go to `folder`/files, all else into `books`.

    `now_s` is the wall clock. All methods are for the loop's thread.
    """

    def __init__(
        self,
        books: Books,
        folder: Path,
        inside: Inside,
        settings: BatchSettings | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings or BatchSettings()
        self._books = books
        self._folder = folder / "files"
        self._now_s = now_s
        self._receiving: set[str] = set()  # uploads that have no row yet
        self._tidying: asyncio.Task[None] | None = None
        self._is_untidy = asyncio.Event()
        self._runner = Runner(books, inside, self.settings, path_of=self.path_of, now_s=now_s)

    async def start(self) -> None:
        """Take up what was left. UserError if the folder can't be used."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot use {self._folder} for the files of batches: {error.strerror}",
                "Give the ledger a folder that can be written.",
            ) from error
        await self._books.ask(store.create_tables)
        await self._runner.start()
        self._tidying = asyncio.create_task(self._tidy())

    async def stop(self) -> None:
        """Stop what runs; it is taken up at the next start."""
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)
        await self._runner.stop()

    def summary(self) -> Summary:
        """For metrics and `top`: a short query."""
        batches: dict[str, int] = {}
        waiting = done = 0
        for status, count, lines, ended in self._books.read(store.totals):
            batches[status] = count
            done += ended
            if status in store.LIVE:
                waiting += lines - ended
        running = self._runner.running
        return Summary(batches, max(0, waiting - running), running, done)

    # Files

    async def upload(self, tenant: str, stream: AsyncIterator[bytes], content_type: str) -> File:
        """Take a multipart body in; Problem where it is not a batch's input file."""
        id = files.new_id()  # noqa: A001
        path = self.path_of(id)
        self._receiving.add(id)
        try:
            form = await upload.receive(stream, content_type, path, self.settings.file_bytes)
            now_s = int(self._now_s())
            facts = {
                "id": id,
                "tenant": tenant,
                "filename": _filename(form),
                "purpose": _purpose(form),
                "bytes": form.bytes,
                "created_at": now_s,
                "expires_at": now_s + self._upload_s(form.fields),
            }
            return await self._books.ask(partial(files.add, facts=facts))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            self._receiving.discard(id)

    def _upload_s(self, fields: dict[str, str]) -> int:
        """How long an upload is kept."""
        seconds = fields.get("expires_after[seconds]")
        if seconds is None:
            return self._kept_s
        if fields.get("expires_after[anchor]", "created_at") != "created_at":
            place = "expires_after[anchor]"
            raise invalid("A file expires after its creation: created_at.", place, "invalid_value")
        if not seconds.isdecimal() or not 3600 <= int(seconds) <= 30 * _DAY_S:
            told = "A file expires after 3600 to 2592000 seconds."
            raise invalid(told, "expires_after[seconds]", "invalid_value")
        return int(seconds)

    @property
    def _kept_s(self) -> int:
        return int(self.settings.file_days * _DAY_S)

    def files(self, tenant: str, page: Page) -> list[File]:
        """Some of a tenant's files."""
        found = self._books.read(
            partial(files.page, tenant=tenant, now_s=int(self._now_s()), page=page)
        )
        return _known(found, page)

    def file(self, tenant: str, id: str) -> File:  # noqa: A002
        """A tenant's file; Problem (404) if there is none."""
        found = self._books.read(
            partial(files.find, id=id, tenant=tenant, now_s=int(self._now_s()))
        )
        if found is None:
            raise Problem(404, f"No such File object: {id}", param="id", code="file_not_found")
        return found

    async def delete(self, tenant: str, id: str) -> None:  # noqa: A002
        """Forget a file, and what it holds; Problem where it can't be."""
        self.file(tenant, id)
        user = await self._books.ask(partial(store.remove_file, id=id, tenant=tenant))
        if user is not None:
            told = f"The file is the input of {user}, which has not ended. Cancel that first."
            raise Problem(409, told, param="id", code="file_in_use")
        self._is_untidy.set()

    def path_of(self, id: str) -> Path:  # noqa: A002
        """Where an upload is."""
        return self._folder / id

    async def output(self, file: File) -> AsyncIterator[bytes]:
        """The lines of an output or error file, some at a time."""
        after = 0
        while True:
            after, texts = self._books.read(
                partial(store.output, file=file, after=after, limit_bytes=_PIECE_BYTES)
            )
            if not texts:
                return
            yield b"".join(texts)

    # Batches

    async def create(
        self,
        tenant: str,
        key: str,
        window_s: int,
        output_s: int | None,
        facts: dict[str, str | None],
    ) -> Batch:
        """Begin a batch with these columns; Problem where its input file won't do."""
        now_s = int(self._now_s())
        whole = facts | {
            "tenant": tenant,
            "key": key,
            "created_at": now_s,
            "expires_at": now_s + window_s,
            "output_s": output_s or self._kept_s,
        }
        batch = await self._books.ask(partial(store.add_batch, facts=whole, now_s=now_s))
        if batch is None:
            missing = facts["input_file_id"]
            told = f"No such File object: {missing}. Upload it first, with purpose batch."
            raise invalid(told, "input_file_id", "file_not_found")
        self._runner.add(batch.id)
        return batch

    def batches(self, tenant: str, page: Page) -> list[Batch]:
        """Some of a tenant's batches, the newest first."""
        return _known(self._books.read(partial(store.page, tenant=tenant, page=page)), page)

    def batch(self, tenant: str, id: str) -> Batch:  # noqa: A002
        """A tenant's batch; Problem (404) if there is none."""
        found = self._books.read(partial(store.find, id=id, tenant=tenant))
        if found is None:
            raise Problem(
                404, f"No batch found with id '{id}'.", param="id", code="batch_not_found"
            )
        return found

    async def cancel(self, tenant: str, id: str) -> Batch:  # noqa: A002
        """Stop a batch; Problem (409) if it is past that."""
        self.batch(tenant, id)
        enter = partial(store.enter, id=id, status="cancelling", now_s=int(self._now_s()))
        is_new = await self._books.ask(enter)
        batch = self.batch(tenant, id)
        if not is_new and batch.status not in ("cancelling", "cancelled"):
            told = f"Cannot cancel a batch with status '{batch.status}'."
            raise Problem(409, told, code="batch_not_cancellable")
        self._runner.cancel(id)
        return batch

    # What is past its time

    async def _tidy(self) -> None:
        """Drop what is expired or was deleted, bit by bit."""
        while True:
            try:
                await self._tidy_once()
            except Exception:
                _log.exception("files of batches could not be tidied up")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_untidy.wait(), _TIDY_S)

    async def _tidy_once(self) -> None:
        self._is_untidy.clear()
        await self._books.ask(partial(store.expire_files, now_s=int(self._now_s())))
        while await self._books.ask(partial(store.purge, limit=_PURGED_AT_ONCE)):
            pass
        names = await asyncio.to_thread(lambda: {path.name for path in self._folder.iterdir()})
        there = {name for name in names if _UPLOAD.fullmatch(name)} - self._receiving
        # Asked for after the look at the disk, so that what has come since is no stranger.
        for name in there - await self._books.ask(files.upload_ids):
            self.path_of(name).unlink(missing_ok=True)


def _filename(form: upload.Form) -> str:
    if form.filename is None:
        raise invalid("The form has no part named file.", "file", "missing_field")
    return form.filename


def _purpose(form: upload.Form) -> str:
    purpose = form.fields.get("purpose")
    if purpose != "batch":
        told = "The purpose must be batch: files are for batches here."
        raise invalid(told, "purpose", "missing_field" if purpose is None else "invalid_value")
    return purpose


def _known(found: list[T] | None, page: Page) -> list[T]:
    if found is None:
        raise invalid(f"There is no {page.after!r} to list after.", "after", "invalid_value")
    return found
