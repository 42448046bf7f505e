"""Whether an operator wants no moves: heard by standbys too, kept in the broker's store for those started later."""

import asyncio
import json

import structlog

from mell_scheduler.inbox import read_pause
from mell_shared.bus import Bus, BusError, Delivery
from mell_shared.key_value import KeyValue, KeyValueConflictError, KeyValueError
from mell_shared.subjects import Subjects

_KEY = "moves"
_ANSWER_S = 1.0
_AGAIN_S = 1.0
"""After a failure to listen, or to read what is kept."""
_TRIES = 3
"""Against others who write at the same time: a leader that is just being replaced."""


class PauseMemory:
    """The operator's last word, to whichever scheduler. `store` must not expire; None: nothing is kept."""

    def __init__(self, bus: Bus, subjects: Subjects, store: KeyValue | None) -> None:
        self.heard = False
        """What was last heard here."""
        self._bus = bus
        self._subject = subjects.admin("moving")
        self._store = store
        self._log = structlog.get_logger()

    async def listen(self) -> bool:
        """Hear operators also while another leads; returns whether that was possible now."""
        try:
            await self._bus.subscribe(self._subject, self._hear)
        except BusError as error:
            self._log.warning("subscribing_failed", reason=str(error))
            return False
        return True

    async def listen_yet(self) -> None:
        """Try again until it is possible."""
        while not await self.listen():  # noqa: ASYNC110 - nobody tells when it will be
            await asyncio.sleep(_AGAIN_S)

    async def _hear(self, delivery: Delivery) -> None:
        request = read_pause(delivery)
        if request is not None:
            self.heard = request.paused

    async def keep(self, *, paused: bool, anew: bool = False) -> bool:
        """Write it down, `anew` only where nothing stands; returns whether that was done."""
        if self._store is None:
            return False
        for _ in range(_TRIES):
            try:
                entry = await self._store.read(_KEY, _ANSWER_S)
                if anew and entry is not None:
                    return False
                revision = 0 if entry is None else entry.revision
                await self._store.write(_KEY, json.dumps({"paused": paused}).encode(), revision, _ANSWER_S)
            except KeyValueConflictError:
                continue
            except KeyValueError as error:
                self._log.warning("pause_not_kept", paused=paused, reason=str(error))
                return False
            return True
        return False

    async def keep_on(self) -> None:
        """Write a pause down again: the broker may have come back without its store.

        What an operator says meanwhile counts more.
        """
        await self.keep(paused=True, anew=True)

    async def recall(self) -> bool:
        """Return what was wanted of earlier leaders: what is kept, else what was heard. Waits for the store."""
        while self._store is not None:
            try:
                entry = await self._store.read(_KEY, _ANSWER_S)
                return self.heard if entry is None else bool(json.loads(entry.value)["paused"])
            except (ValueError, KeyError, TypeError):
                break  # not of this release
            except KeyValueError:
                await asyncio.sleep(_AGAIN_S)
        return self.heard
