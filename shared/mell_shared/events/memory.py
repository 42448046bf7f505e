"""A stream inside one process, for tests."""

from collections.abc import Sequence

from mell_shared.events.store import EventRecord, EventStoreError, EventTooLargeError, StoredEvent


class MemoryEventStore:
    """Keeps everything; `reachable` plays the loss of the broker, `room` a loss in the midst of a batch."""

    def __init__(self) -> None:
        self.events: list[StoredEvent] = []
        self.reachable = True
        self.room: int | None = None
        """So many more are written; None: all."""
        self.most_bytes = 1 << 20
        self._known: set[str] = set()

    async def append(self, records: Sequence[EventRecord]) -> int:
        """Write in order, each id once."""
        self._check()
        for count, record in enumerate(records):
            if len(record.body) > self.most_bytes:
                if not count:
                    raise EventTooLargeError(f"{len(record.body)} bytes are more than {self.most_bytes}")
                return count
            if self.room is not None:
                if self.room == 0:
                    return count
                self.room -= 1
            if record.message_id not in self._known:
                self._known.add(record.message_id)
                self.events.append(StoredEvent(len(self.events) + 1, record.type, record.body))
        return len(records)

    async def read(self, after: int, limit: int) -> list[StoredEvent]:
        """Return what follows."""
        self._check()
        return self.events[after : after + limit]

    async def last_position(self) -> int:
        """Return the position of the last event."""
        self._check()
        return len(self.events)

    def _check(self) -> None:
        if not self.reachable:
            raise EventStoreError("the stream gives no answer")
