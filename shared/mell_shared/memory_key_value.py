"""A compare-and-set store inside one process, for tests and simulation."""

from mell_shared.clock import Clock
from mell_shared.key_value import Entry, KeyValueConflictError, KeyValueError


class MemoryBucket:
    """The bucket that several `MemoryKeyValue`s share; keys expire `ttl_us` after their last write."""

    def __init__(self, clock: Clock, ttl_us: int) -> None:
        self._clock = clock
        self._ttl_us = ttl_us
        self._entries: dict[str, tuple[Entry, int]] = {}
        self._revision = 0

    def read(self, key: str) -> Entry | None:
        """Return the key's value unless it has expired."""
        entry, written_us = self._entries.get(key, (None, 0))
        return None if self._clock.now_us() >= written_us + self._ttl_us else entry

    def replace(self, key: str, value: bytes | None, revision: int) -> int:
        """Set (or, with None, take away) the key's value if it is at `revision`; return its new revision."""
        current = self.read(key)
        if (0 if current is None else current.revision) != revision:
            raise KeyValueConflictError(f"{key} is not at revision {revision}")
        self._revision += 1
        self._entries.pop(key, None)
        if value is not None:
            self._entries[key] = (Entry(value, self._revision), self._clock.now_us())
        return self._revision


class MemoryKeyValue:
    """One process's access to a bucket; `reachable` plays the loss of its connection."""

    def __init__(self, bucket: MemoryBucket) -> None:
        self._bucket = bucket
        self.reachable = True

    async def read(self, key: str, timeout_s: float) -> Entry | None:
        """Return the key's value, None if it has none."""
        self._check(timeout_s)
        return self._bucket.read(key)

    async def write(self, key: str, value: bytes, revision: int, timeout_s: float) -> int:
        """Set the key if it still is at `revision`."""
        self._check(timeout_s)
        return self._bucket.replace(key, value, revision)

    async def erase(self, key: str, revision: int, timeout_s: float) -> None:
        """Take the key's value away if it still is at `revision`."""
        self._check(timeout_s)
        self._bucket.replace(key, None, revision)

    def _check(self, timeout_s: float) -> None:
        assert timeout_s > 0, "an answer needs time"
        if not self.reachable:
            raise KeyValueError("the store gives no answer")
