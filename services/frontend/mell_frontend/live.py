"""The cluster for those who watch it: one poll of the scheduler for all watchers of this frontend, none without any."""

import asyncio
from dataclasses import dataclass

from mell_frontend.exchange import Exchange
from mell_frontend.generation import Gateway, GenerationError
from mell_frontend.pulse import Pulse
from mell_frontend.seats import Seats
from mell_shared.clock import Clock
from mell_shared.messages.admin import NOWHERE, AdminRefused, Live, LiveRequest
from mell_shared.messages.live import GpusLately, LiveRows, LiveState, LiveTrouble

MOST_WATCHERS = 64
_FULL = f"{MOST_WATCHERS} watch here already: close one, or ask another frontend."

_STOPPING = "this frontend is stopping; watch another"
_STRANGE = "the scheduler answers something else: is it of another release?"


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """One server-sent event, made once and sent to everybody; numbers rise."""

    number: int
    text: str
    last: bool = False


class LiveFeed:
    """Makes an event each `interval_s` while somebody watches; whoever asks first polls, the others get the same."""

    def __init__(self, gateway: Gateway, clock: Clock, pulse: Pulse, interval_s: float) -> None:
        self._gateway = gateway
        self._clock = clock
        self._pulse = pulse
        self._interval_s = interval_s
        self._turn = asyncio.Lock()
        self._event = LiveEvent(0, "")
        self._due_us = 0
        """No poll before."""
        self.seats = Seats(MOST_WATCHERS, _FULL)
        """Of watchers: one is held while `watch` runs."""

    async def watch(self, exchange: Exchange) -> None:
        """Send events until the client leaves, or this frontend stops."""
        await exchange.start()
        number = self._event.number if self._clock.now_us() >= self._due_us else 0
        last = False
        while not last:
            event = await self._after(number)
            number, last = event.number, event.last
            await exchange.events(event.text, last=last)

    async def _after(self, number: int) -> LiveEvent:
        """Return the latest event if it is after that number, else poll for it when its time has come."""
        if self._event.number > number:
            return self._event
        async with self._turn:
            if self._event.number <= number:
                await asyncio.sleep(max(0, self._due_us - self._clock.now_us()) / 1e6)
                self._due_us = self._clock.now_us() + round(self._interval_s * 1e6)
                self._event = await self._poll(self._event.number + 1)
            return self._event

    async def _poll(self, number: int) -> LiveEvent:
        if self._gateway.stopping:
            return _trouble(number, _STOPPING, last=True)
        try:
            reply = await self._gateway.admin(LiveRequest())
        except GenerationError as error:
            return _trouble(number, error.message)
        if not isinstance(reply, Live):
            return _trouble(number, reply.message if isinstance(reply, AdminRefused) else _STRANGE)
        return self._told(number, reply)

    def _told(self, number: int, reply: Live) -> LiveEvent:
        state = LiveState(
            number=number,
            interval_s=self._interval_s,
            status=reply.status,
            rows=_rows(reply),
            lately=GpusLately(sample_s=reply.sample_s, used=reply.used_lately, shadow=reply.shadow_lately),
            frontend=self._pulse.read(self._gateway, self._clock.now_us()),
        )
        return LiveEvent(number, f"event: state\ndata: {state.model_dump_json(ensure_ascii=True)}\n\n")


def _rows(live: Live) -> LiveRows:
    return LiveRows(
        sequence=list(live.sequences),
        worker=[-1 if position == NOWHERE else position for position in live.workers],
        target=[-1 if position == NOWHERE else position for position in live.targets],
        tokens=live.tokens,
        blocks=live.blocks,
        state=live.states,
    )


def _trouble(number: int, message: str, *, last: bool = False) -> LiveEvent:
    trouble = LiveTrouble(number=number, message=message)
    return LiveEvent(number, f"event: trouble\ndata: {trouble.model_dump_json(ensure_ascii=True)}\n\n", last)
