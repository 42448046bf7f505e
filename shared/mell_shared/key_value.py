"""The port to a small compare-and-set store whose keys expire: what a lease needs of the broker, and no more."""

from dataclasses import dataclass
from typing import Protocol

from mell_shared.bus import BusError


class KeyValueError(BusError):
    """The store could not be asked, or gave no answer in time; what was asked may have been done."""


class KeyValueConflictError(KeyValueError):
    """The key is not at the revision named; nothing was written."""


class KeyValueUnavailableError(KeyValueError):
    """The broker offers no such store; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value and the revision to name when changing it."""

    value: bytes
    revision: int


class KeyValue(Protocol):
    """Keys of one bucket. A key vanishes when it has not been written for the bucket's time to live.

    Every method raises `KeyValueError` when the store does not answer within `timeout_s`.
    """

    async def read(self, key: str, timeout_s: float) -> Entry | None:
        """Return the key's value, None if it has none (any more)."""
        ...

    async def write(self, key: str, value: bytes, revision: int, timeout_s: float) -> int:
        """Set the key if it still is at `revision` (0: if it has no value); return its new revision.

        Raises `KeyValueConflictError`.
        """
        ...

    async def erase(self, key: str, revision: int, timeout_s: float) -> None:
        """Take the key's value away if it still is at `revision`. Raises `KeyValueConflictError`."""
        ...
