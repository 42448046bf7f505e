"""The shell of the lease: asks the store what `Lease` says, and tells the service when leading begins and ends."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from typing import Protocol

from mell_scheduler.lease import (
    Conflicted,
    Held,
    Lease,
    LeaseCommand,
    LeaseEvent,
    LeaseValue,
    Look,
    Looked,
    Unanswered,
    Write,
    Written,
)
from mell_shared.clock import Clock
from mell_shared.key_value import KeyValue, KeyValueConflictError, KeyValueError
from mell_shared.process import StartError

_KEY = "leader"
_ANSWER_S = 1.0
_START_S = 5.0
_JITTER = 0.2


class Leadership(Protocol):
    """Told of the changes; `begin` and `end` alternate. None may wait for a peer: renewals would come too late."""

    def begin(self, term: int) -> None:
        """This scheduler leads from now on."""
        ...

    def end(self) -> None:
        """It leads no more."""
        ...

    def stand_by(self) -> None:
        """Another leads; said once, at start."""
        ...


class AlwaysLeads:
    """Leadership without a lease, for a single scheduler."""

    def __init__(self, unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self.kept: KeyValue | None = None
        self._unix_ms = unix_ms

    async def prepare(self) -> None:
        """Nothing is needed."""

    def leads(self) -> bool:
        """Whether this scheduler may decide now."""
        return True

    async def run(self, leadership: Leadership) -> None:
        """Lead until cancelled."""
        leadership.begin(self._unix_ms())
        await asyncio.Event().wait()

    async def resign(self) -> None:
        """Nothing is held."""


class Candidate:
    """Leads while it holds the lease. `jitter` returns a factor about 1 that spreads the looks of many candidates."""

    def __init__(
        self,
        lease: Lease,
        store: KeyValue,
        clock: Clock,
        *,
        unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        jitter: Callable[[], float] = lambda: random.uniform(1 - _JITTER, 1 + _JITTER),  # noqa: S311 - no secret
    ) -> None:
        self._lease = lease
        self._store = store
        self._clock = clock
        self._unix_ms = unix_ms
        self._jitter = jitter
        self._term: int | None = None
        self.kept: KeyValue | None = None
        """Where what must outlast leaders is kept, if anywhere; keys there do not expire."""
        self.failures = 0
        """How often the store gave no answer."""

    async def prepare(self) -> None:
        """Ask the store once; raises `StartError` if the broker has none."""
        try:
            await self._store.read(_KEY, _START_S)
        except KeyValueError as error:
            raise StartError(str(error)) from error

    def leads(self) -> bool:
        """Whether this scheduler may decide now; asked at every decision, since `end` may come a moment late."""
        return self._lease.leads(self._clock.now_us())

    async def run(self, leadership: Leadership) -> None:
        """Stand for leader until cancelled."""
        command = await self._first_look(leadership)
        while True:
            await self._wait(command, leadership)
            event = await self._carry_out(command)
            command = self._lease.handle(event, self._clock.now_us(), self._unix_ms())
            self._tell(leadership)

    async def _first_look(self, leadership: Leadership) -> LeaseCommand:
        seen = await self._carry_out(Look(self._clock.now_us()))
        if isinstance(seen, Looked) and seen.held is not None:
            leadership.stand_by()
        return self._lease.handle(seen, self._clock.now_us(), self._unix_ms())

    async def resign(self) -> None:
        """Give the lease back, so that another need not wait for its end; without effect while following."""
        held = self._lease.held
        if held is not None:
            with contextlib.suppress(KeyValueError):
                await self._store.erase(_KEY, held.revision, _ANSWER_S)

    async def _wait(self, command: LeaseCommand, leadership: Leadership) -> None:
        """Sleep until the command is due, waking when leading would end before."""
        due_us = command.at_us
        if isinstance(command, Look) and self._lease.held is None:
            due_us = self._clock.now_us() + int((command.at_us - self._clock.now_us()) * self._jitter())
        while (left_us := due_us - self._clock.now_us()) > 0:
            until_end_us = self._lease.valid_until_us - self._clock.now_us() if self._lease.held else left_us
            await asyncio.sleep(max(0, min(left_us, until_end_us)) / 1_000_000)
            if self._lease.lapse(self._clock.now_us()):
                self._tell(leadership)

    async def _carry_out(self, command: LeaseCommand) -> LeaseEvent:
        sent_us = self._clock.now_us()
        left_s = (self._lease.valid_until_us - sent_us) / 1_000_000 if self._lease.held else _ANSWER_S
        timeout_s = max(0.001, min(_ANSWER_S, left_s))
        try:
            if isinstance(command, Write):
                revision = await self._store.write(_KEY, command.value.to_bytes(), command.revision, timeout_s)
                return Written(command.value, revision, sent_us)
            entry = await self._store.read(_KEY, timeout_s)
        except KeyValueConflictError:
            return Conflicted()
        except KeyValueError:
            self.failures += 1
            return Unanswered()
        return Looked(None if entry is None else Held(LeaseValue.from_bytes(entry.value), entry.revision))

    def _tell(self, leadership: Leadership) -> None:
        """Pass on a change of the term led in; None is no term."""
        held = self._lease.held
        term = None if held is None else held.value.term
        if term == self._term:
            return
        if self._term is not None:
            leadership.end()
        self._term = term
        if term is not None:
            leadership.begin(term)
