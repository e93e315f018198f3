"""A timer that rings on time: the event loop's own is a millisecond coarse, and tokens are not.

On Linux it is the kernel's (timerfd); elsewhere the loop's, rounded up.
"""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Final

from tokenworks.units import NS_PER_S

_MONOTONIC: Final = 1
_ABSOLUTE: Final = 1
_NS_PER_MS: Final = 1_000_000
_TimerSpec = ctypes.c_long * 4  # interval and first time, each in seconds and nanoseconds


class Alarm:
    """Calls `ring` at the time it was set to last, on `time.monotonic_ns`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop, self._ring = loop, ring
        self._handle: asyncio.TimerHandle | None = None
        self._at_ns = 0  # 0: it is not set
        self._fd = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd >= 0:
                loop.add_reader(self._fd, self._rang)

    def set(self, at_ns: int | None) -> None:
        """Ring at `at_ns`, in the past: at once; None: never."""
        at_ns = at_ns or 0
        if at_ns == self._at_ns:
            return
        self._at_ns = at_ns
        if self._fd >= 0:
            spec = _TimerSpec(0, 0, *divmod(at_ns, NS_PER_S))
            self._libc.timerfd_settime(self._fd, _ABSOLUTE, spec, None)
            return
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if at_ns:
            wait_ms = -((time.monotonic_ns() - at_ns) // _NS_PER_MS)
            self._handle = self._loop.call_later(max(wait_ms, 0) / 1000, self._rang)

    def _rang(self) -> None:
        if self._fd >= 0:
            try:
                os.read(self._fd, 8)
            except BlockingIOError:  # it was set anew meanwhile
                return
        self._at_ns = 0
        self._ring()

    def close(self) -> None:
        """Never ring again."""
        self.set(None)
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
