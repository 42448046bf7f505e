"""Time as an object: cores take `now` as an argument, shells read it here, tests turn it by hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock of this process; its values mean nothing in another."""

    def now_us(self) -> int:
        """Return the time in integer microseconds."""
        ...


class SystemClock:
    """The operating system's monotonic clock."""

    def now_us(self) -> int:
        """Return the time in integer microseconds."""
        return time.monotonic_ns() // 1000


class ManualClock:
    """A clock that stands still until it is told to move."""

    def __init__(self, start_us: int = 0) -> None:
        self._now_us = start_us

    def now_us(self) -> int:
        """Return the time in integer microseconds."""
        return self._now_us

    def advance_us(self, step_us: int) -> None:
        """Move the clock on by `step_us` >= 0."""
        assert step_us >= 0, "time does not run backwards"
        self._now_us += step_us
