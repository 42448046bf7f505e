"""Measures the lanes to other workers: a new one greets all, some of them measure, one at a time and not at once.

Whatever goes wrong with a probe costs nothing but its figure; the lane is then learnt from the moves over it.
"""

import asyncio
import random
import secrets
from collections import deque
from typing import Any

import structlog

from mell_gpu_worker.engine_runner import EngineRunner
from mell_gpu_worker.surroundings import Spawn, Surroundings
from mell_gpu_worker.transport.base import SECRET_BYTES, Incoming, TransportError
from mell_gpu_worker.transport.self_test import LaneMeasured, measure, offer_probe, serve_probe
from mell_shared.bus import BusError, Delivery, Subscription
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.lanes import (
    LANE_MESSAGE,
    PROBE_REPLY,
    LaneGreeting,
    ProbeOffered,
    ProbeRefused,
    ProbeRequested,
)
from mell_shared.messages.scheduler import LaneMeasured as LaneMeasuredEvent
from mell_shared.messages.scheduler import WorkerSpec

_WINDOW_S = 60.0
_QUEUE = 64
"""Most workers that wait to be measured; a greeting beyond is not answered."""
_REMEMBERED = 1024
"""Workers known to have been met; each is measured once."""
_ATTEMPTS = 4
_ASK_S = 2.0
_PROBE_S = 10.0


class Lanes:
    """One worker's part in measuring: `subscribe`, then `run`."""

    def __init__(self, spec: WorkerSpec, engine: EngineRunner, around: Surroundings, spawn: Spawn) -> None:
        assert around.transport is not None, "without a transport there are no lanes"
        self._worker = spec.worker
        self._kv_layout = spec.kv_layout
        self._engine = engine
        self._transport = around.transport
        self._bus = around.bus
        self._subjects = around.subjects
        self._options = around.lanes
        self._spawn = spawn
        self._waiting: deque[tuple[str, int]] = deque()
        """(worker, attempts so far) of those to be measured."""
        self._filled = asyncio.Event()
        self._met: dict[str, None] = {}
        self._served_s: deque[float] = deque()
        self._serving = False
        self._log = structlog.get_logger()

    async def subscribe(self) -> list[Subscription]:
        """Listen; raises `BusError`."""
        subjects = (self._subjects.all_lanes, self._subjects.worker_lanes(self._worker))
        return [await self._bus.subscribe(subject, self._deliver) for subject in subjects]

    async def run(self) -> None:
        """Greet, and measure whoever is met, until cancelled."""
        greeting = LaneGreeting(worker=self._worker, kv_layout=self._kv_layout)
        await self._publish(self._subjects.all_lanes, greeting)
        while True:
            while not self._waiting:
                self._filled.clear()
                await self._filled.wait()
            worker, attempts = self._waiting.popleft()
            await asyncio.sleep(random.uniform(0, self._options.stagger_s))  # noqa: S311 - spreads load
            again = await self._measure(worker)
            if again and attempts + 1 < _ATTEMPTS:
                self._waiting.append((worker, attempts + 1))

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            message = decode(LANE_MESSAGE, delivery.data)
        except InvalidMessageError as error:
            self._log.warning("invalid_lane_message", fault=str(error))
            return
        if message.worker == self._worker or message.kv_layout != self._kv_layout:
            return
        if isinstance(message, LaneGreeting):
            self._meet(message.worker)
        elif delivery.reply_to:
            await self._publish(delivery.reply_to, self._answer(message))

    # --- measured by others

    def _answer(self, message: ProbeRequested) -> ProbeOffered | ProbeRefused:
        now_s = asyncio.get_running_loop().time()
        while self._served_s and now_s - self._served_s[0] > _WINDOW_S:
            self._served_s.popleft()
        if self._serving:
            return ProbeRefused(busy=True, message="another probe is under way")
        if len(self._served_s) >= self._options.probes_per_minute:
            return ProbeRefused(busy=False, message=f"{len(self._served_s)} probes were enough for now")
        secret = secrets.token_bytes(SECRET_BYTES)
        try:
            probe = offer_probe(self._transport, secret, _PROBE_S, self._engine.scratch)
        except TransportError as error:
            return ProbeRefused(busy=True, message=str(error))
        self._serving = True
        self._served_s.append(now_s)
        self._spawn(self._serve(probe))
        self._meet(message.worker)
        return ProbeOffered(address=self._transport.address, secret=secret)

    async def _serve(self, probe: Incoming) -> None:
        try:
            await serve_probe(probe, _PROBE_S)
        except (TransportError, TimeoutError) as error:
            self._log.debug("probe_ended", why=str(error))
        finally:
            self._serving = False

    # --- measuring others

    def _meet(self, worker: str) -> None:
        if worker in self._met or len(self._waiting) >= _QUEUE:
            return
        self._met[worker] = None
        if len(self._met) > _REMEMBERED:
            del self._met[next(iter(self._met))]
        self._waiting.append((worker, 0))
        self._filled.set()

    async def _measure(self, worker: str) -> bool:
        """Measure one lane and say what it carries; returns whether to try again later."""
        try:
            offered = await self._ask(worker)
            if isinstance(offered, ProbeRefused):
                return offered.busy
            lane = await measure(self._transport, offered.address, offered.secret, _PROBE_S, self._engine.scratch)
        except (BusError, InvalidMessageError, TransportError) as error:
            self._log.info("lane_not_measured", peer=worker, why=f"{type(error).__name__}: {error}")
            return False
        await self._tell(worker, lane)
        return False

    async def _ask(self, worker: str) -> ProbeOffered | ProbeRefused:
        question = ProbeRequested(worker=self._worker, kv_layout=self._kv_layout)
        reply = await self._bus.request(self._subjects.worker_lanes(worker), encode(question), _ASK_S)
        return decode(PROBE_REPLY, reply)

    async def _tell(self, worker: str, lane: LaneMeasured) -> None:
        tell = self._log.info
        fields: dict[str, Any] = {"bytes_per_s": round(lane.bytes_per_s), "latency_us": round(lane.latency_s * 1e6)}
        expected = self._options.slow_bytes_per_s
        if lane.bytes_per_s < expected:
            tell = self._log.warning
            fields["slower_than"] = round(expected)
        tell("lane_measured", peer=worker, **fields)
        event = LaneMeasuredEvent(
            worker=self._worker, target=worker, bytes_per_s=fields["bytes_per_s"], latency_us=fields["latency_us"]
        )
        await self._publish(self._subjects.scheduler_events, event)

    async def _publish(self, subject: str, message: Any) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except BusError as error:
            self._log.debug("unsent", subject=subject, why=str(error))
