"""Wakes a loop at a nanosecond: uvloop's own timers count milliseconds and may ring early."""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from tokenworks.units import NS_PER_S

_MONOTONIC: Final = 1
_ABSOLUTE: Final = 1
_FLAGS: Final = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)


class _Spec(ctypes.Structure):
    """C's itimerspec."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns")]


class Alarm:
    """Calls `ring` once for each `at`. On Linux by timerfd, elsewhere to the millisecond."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop, self._ring = loop, ring
        self._fd = -1
        self._late: asyncio.TimerHandle | None = None
        if sys.platform == "linux":
            self._c: Any = ctypes.CDLL(None, use_errno=True)
            self._fd = self._c.timerfd_create(_MONOTONIC, _FLAGS)
        if self._fd >= 0:
            loop.add_reader(self._fd, self._rang)

    def at(self, when_ns: int) -> None:
        """Ring at this time of `time.monotonic_ns`; at once if that is over."""
        if self._fd < 0:
            ahead_s = max(when_ns - time.monotonic_ns(), 0) / NS_PER_S
            self._late = self._loop.call_later(ahead_s, self._ring)
            return
        spec = _Spec(0, 0, *divmod(max(when_ns, 1), NS_PER_S))
        self._c.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None)

    def close(self) -> None:
        """Ring no more."""
        if self._late is not None:
            self._late.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _rang(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._ring()
