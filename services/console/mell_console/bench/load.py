"""Keeps a server under load: a closed loop of so many requests in flight, or an open one at planned times."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mell_console.bench.client import Target, ask
from mell_console.bench.measure import ClientCost, Outcome
from mell_console.bench.prompts import Calibration, make_prompt
from mell_console.bench.workload import Shot

Progress = Callable[[int, int], None]
"""Told how many requests have started and how many have ended."""


@dataclass(slots=True)
class Load:
    """One measured run against `target`. `interrupt` ends it early; what is in flight is then given up."""

    target: Target
    calibration: Calibration
    progress: Progress

    async def run(self, shots: Iterator[Shot]) -> tuple[list[Outcome], ClientCost]:
        """Send `shots` and return what became of them, in order of their start, and what sending them cost."""
        outcomes: list[Outcome] = []
        cpu_s, wall_s = time.process_time(), time.monotonic()
        send = self._open if self.target.settings.open_loop else self._closed
        await send(shots, outcomes)
        outcomes.sort(key=lambda outcome: outcome.sent_us)
        return outcomes, ClientCost(time.process_time() - cpu_s, time.monotonic() - wall_s)

    async def _closed(self, shots: Iterator[Shot], outcomes: list[Outcome]) -> None:
        numbered = enumerate(shots)
        end_us = self._end_us()

        async def keep_sending() -> None:
            for number, shot in numbered:
                if self.target.clock.now_us() >= end_us:
                    return
                self.progress(1, 0)
                outcomes.append(await self._send(number, shot, late_us=0))
                self.progress(0, 1)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.target.settings.concurrency):
                group.create_task(keep_sending())

    async def _open(self, shots: Iterator[Shot], outcomes: list[Outcome]) -> None:
        begun_us, end_us = self.target.clock.now_us(), self._end_us()

        async def send(number: int, shot: Shot, late_us: int) -> None:
            outcomes.append(await self._send(number, shot, late_us))
            self.progress(0, 1)

        async with asyncio.TaskGroup() as group:
            for number, shot in enumerate(shots):
                assert shot.start_s is not None, "an open loop knows when its requests start"
                due_us = begun_us + round(shot.start_s * 1e6)
                if due_us >= end_us:
                    return
                await asyncio.sleep(max(0, due_us - self.target.clock.now_us()) / 1e6)
                self.progress(1, 0)
                group.create_task(send(number, shot, max(0, self.target.clock.now_us() - due_us)))

    async def _send(self, number: int, shot: Shot, late_us: int) -> Outcome:
        words = self.calibration.words_for(shot.prompt_tokens)
        prompt = make_prompt((self.target.settings.seed << 32) + number, words)
        return await ask(self.target, prompt, shot.output_tokens, late_us)

    def _end_us(self) -> float:
        duration_s = self.target.settings.duration_s
        return self.target.clock.now_us() + duration_s * 1e6 if duration_s else float("inf")
