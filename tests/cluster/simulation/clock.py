"""The one queue of all that will happen, and each machine's own idea of the time."""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

Action = Callable[[], None]
SECOND_US = 1_000_000


class EventQueue:
    """What is due next happens next; what is due at the same time happens in the order it was put here."""

    def __init__(self) -> None:
        self.now_us = 0
        self._heap: list[tuple[int, int, Action]] = []
        self._count = 0

    def after(self, delay_us: int, action: Action) -> None:
        """Let `action` happen in `delay_us`."""
        self.at(self.now_us + max(0, delay_us), action)

    def at(self, due_us: int, action: Action) -> None:
        """Let `action` happen at `due_us`, or now if that is over."""
        self._count += 1
        heappush(self._heap, (max(due_us, self.now_us), self._count, action))

    def step(self) -> bool:
        """Let the next thing happen; False if nothing ever will."""
        if not self._heap:
            return False
        self.now_us, _, action = heappop(self._heap)
        action()
        return True


@dataclass(frozen=True, slots=True)
class LocalClock:
    """A machine's monotonic clock: starts anywhere, runs a little fast or slow."""

    queue: EventQueue
    offset_us: int
    drift_ppm: int

    def now_us(self) -> int:
        """Return the local time."""
        now_us = self.queue.now_us
        return self.offset_us + now_us + now_us * self.drift_ppm // 1_000_000

    def real_us(self, local_us: int) -> int:
        """Return how long a local span takes, rounded up so that a timer never fires before it is due."""
        return -(-local_us * 1_000_000 // (1_000_000 + self.drift_ppm)) + 1
