"""The compare-and-set store on a JetStream key-value bucket; beside `nats_bus` the only user of nats-py."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.errors import Error
from nats.js import JetStreamContext
from nats.js.api import KeyValueConfig, StorageType
from nats.js.errors import (
    BucketNotFoundError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    NoStreamResponseError,
    ServiceUnavailableError,
)
from nats.js.kv import KeyValue as NatsBucket

from mell_shared.key_value import Entry, KeyValueConflictError, KeyValueError, KeyValueUnavailableError
from mell_shared.nats_bus import NatsBus

_ASK_TIMEOUT_S = 5.0


class NatsKeyValue:
    """A `KeyValue` over the connection of a `NatsBus`, so that whoever loses the one loses the other.

    The bucket is made on first use. It lies in a file, because keys must outlive the server: in memory a quick
    restart would hand a lease to a second holder while the first still trusts it.
    """

    def __init__(self, bus: NatsBus, bucket: str, ttl_s: float) -> None:
        self._bus = bus
        self._name = bucket
        self._ttl_s = ttl_s
        self._opened: NatsBucket | None = None

    async def read(self, key: str, timeout_s: float) -> Entry | None:
        """Return the key's value, None if it has none."""
        async with self._asking(timeout_s) as bucket:
            try:
                found = await bucket.get(key)
            except KeyNotFoundError:
                return None
        assert found.value is not None
        assert found.revision is not None
        return Entry(found.value, found.revision)

    async def write(self, key: str, value: bytes, revision: int, timeout_s: float) -> int:
        """Set the key if it still is at `revision`."""
        async with self._asking(timeout_s) as bucket:
            if revision == 0:
                # Unlike an update from revision 0, this also takes a key that was erased.
                return await bucket.create(key, value)
            return await bucket.update(key, value, last=revision)

    async def erase(self, key: str, revision: int, timeout_s: float) -> None:
        """Take the key's value away if it still is at `revision`."""
        async with self._asking(timeout_s) as bucket:
            await bucket.delete(key, last=revision)

    @asynccontextmanager
    async def _asking(self, timeout_s: float) -> AsyncIterator[NatsBucket]:
        if not self._bus.connected:
            raise KeyValueError("the connection to the broker is down")
        try:
            async with asyncio.timeout(timeout_s):
                yield await self._bucket()
        except (TimeoutError, OSError, Error) as error:
            raise self._translated(error) from error

    async def _bucket(self) -> NatsBucket:
        if self._opened is None:
            stream = JetStreamContext(self._bus.client, timeout=_ASK_TIMEOUT_S)
            try:
                bucket = await stream.key_value(self._name)
            except BucketNotFoundError:
                config = KeyValueConfig(bucket=self._name, ttl=self._ttl_s, history=1, storage=StorageType.FILE)
                bucket = await stream.create_key_value(config)
            await self._check_ttl(bucket)
            self._opened = bucket
        return self._opened

    async def _check_ttl(self, bucket: NatsBucket) -> None:
        kept_s = (await bucket.status()).ttl or 0
        if 0 < kept_s < self._ttl_s:
            raise KeyValueUnavailableError(
                f"the bucket {self._name} keeps keys for {kept_s} s only, not {self._ttl_s}: delete it (nats kv del)"
            )

    def _translated(self, error: Exception) -> KeyValueError:
        match error:
            case ServiceUnavailableError():
                self._opened = None
                return KeyValueUnavailableError(
                    "the broker has no JetStream, which the scheduler's lease needs; "
                    "start nats-server with -js, or set MELL_LEASE=off (--lease off) for a single scheduler"
                )
            case NoStreamResponseError():
                self._opened = None  # somebody deleted the bucket: the next call makes it again
                return KeyValueError(f"the bucket {self._name} is gone")
            case TimeoutError():
                return KeyValueError(f"no answer from the bucket {self._name} in time")
        if _is_conflict(error):
            return KeyValueConflictError(f"the key in {self._name} is at another revision")
        return KeyValueError(str(error))


def _is_conflict(error: Exception) -> bool:
    # `delete` does not translate the server's codes as `update` does: 10071 and 10164 say "wrong last sequence".
    return isinstance(error, KeyWrongLastSequenceError) or getattr(error, "err_code", None) in (10071, 10164)
