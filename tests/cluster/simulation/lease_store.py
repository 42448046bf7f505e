"""The broker's key-value bucket as far as the schedulers' lease needs it: one key that expires."""

from mell_scheduler.lease import (
    Conflicted,
    Held,
    LeaseCommand,
    LeaseEvent,
    LeaseSettings,
    LeaseValue,
    Look,
    Looked,
    Written,
)
from tests.cluster.simulation.clock import EventQueue


class LeaseStore:
    """Holds the lease until it expires `ttl_us` after the last write; compare-and-set by revision."""

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self._value: LeaseValue | None = None
        self._revision = 0
        self._expires_us = 0

    def carry_out(self, command: LeaseCommand, sent_us: int) -> LeaseEvent:
        """Do what a scheduler asks; `sent_us` is its own clock's."""
        held = self._held()
        if isinstance(command, Look):
            return Looked(held)
        if command.revision != (held.revision if held else 0):
            return Conflicted()
        self._revision += 1
        self._value = command.value
        self._expires_us = self._queue.now_us + LeaseSettings().ttl_us
        return Written(command.value, self._revision, sent_us)

    def wipe(self) -> None:
        """Lose the key, as a broker does that comes back without its store."""
        self._value = None

    def _held(self) -> Held | None:
        if self._value is None or self._queue.now_us >= self._expires_us:
            return None
        return Held(self._value, self._revision)
