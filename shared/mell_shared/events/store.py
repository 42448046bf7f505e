"""The port to the stream that keeps events: what writers and readers ask of JetStream, and no more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mell_shared.bus import BusError


class EventStoreError(BusError):
    """The stream could not be asked or does not answer; what was written may be there all the same."""


class EventTooLargeError(EventStoreError):
    """The first event is larger than the broker takes: it can never be written."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long events are kept: until they are older, or all together larger."""

    max_age_s: float
    max_bytes: int


@dataclass(frozen=True, slots=True)
class EventRecord:
    """An event to be written; one with an id that was written in the last two minutes is not written again."""

    type: str
    message_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as it lies in the stream, at this position; positions rise, and may have holes."""

    position: int
    type: str
    body: bytes


class EventStore(Protocol):
    """One process's access to the stream."""

    async def append(self, records: Sequence[EventRecord]) -> int:
        """Write in order; return how many of the first are surely written. Raises `EventStoreError` if none can be.

        `EventTooLargeError`: for ever.
        """
        ...

    async def read(self, after: int, limit: int) -> list[StoredEvent]:
        """Return the first `limit` events with a position over `after`, in order. Raises `EventStoreError`."""
        ...

    async def last_position(self) -> int:
        """Return the position of the last event, 0 if there is none. Raises `EventStoreError`."""
        ...
