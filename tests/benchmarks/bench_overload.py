"""Five times the sustainable load for minutes, on real processes: goodput, refusals, memory, recovery.

`make soak-overload`; MELL_OVERLOAD_S sets how long the flood lasts. The fake engine sleeps for its steps, so that the
worker, not this machine's cores, is what is too small.
"""

import asyncio
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster.stack import Service, Stack, chat

STEP_US = 100_000
TOKENS = 19
SLOTS = 16
CAPACITY = SLOTS / (STEP_US / 1e6 * (TOKENS + 1))
SUSTAINED = 0.6 * CAPACITY
FLOOD_S = float(os.environ.get("MELL_OVERLOAD_S", "120"))
PATIENCE_S = 60.0
_WAIT_S = "5"


@dataclass
class Phase:
    """What the clients of one stretch of time saw."""

    name: str
    rate: float
    duration_s: float
    statuses: Counter[int] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)
    retry_after: Counter[str] = field(default_factory=Counter)
    ended: int = 0

    def line(self) -> str:
        """Return the phase as a row."""
        waits = sorted(self.waits_s) or [0.0]
        middle, worst = waits[len(waits) // 2], waits[int(len(waits) * 0.99)]
        refused, others = self.statuses[429], sum(self.statuses.values()) - self.statuses[200] - self.statuses[429]
        return (
            f"{self.name:<8} {self.rate:6.1f}/s asked  {self.ended / self.duration_s:6.2f}/s served"
            f"  {refused:6} refused  {others:3} other  whole answer p50 {middle:5.2f} s, p99 {worst:5.2f} s"
            f"  retry-after {dict(self.retry_after.most_common(3))}"
        )


async def ask(client: httpx.AsyncClient, phase: Phase, now: list[Phase]) -> None:
    """Ask once, and note what came."""
    began_s = time.monotonic()
    response = await client.post("/v1/chat/completions", json=chat(TOKENS))
    phase.statuses[response.status_code] += 1
    if response.status_code == 200:
        phase.waits_s.append(time.monotonic() - began_s)
        now[0].ended += 1
    else:
        phase.retry_after[response.headers.get("retry-after", "none")] += 1


async def load(url: str, phases: list[Phase], services: list[Service]) -> dict[str, list[int]]:
    """Run the phases one after another; returns each process's memory, in MiB, at their ends."""
    memory: dict[str, list[int]] = {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        now = [phases[0]]
        for phase in phases:
            now[0] = phase
            end_s = time.monotonic() + phase.duration_s
            while time.monotonic() < end_s:
                group.create_task(ask(client, phase, now))
                await asyncio.sleep(1 / phase.rate)
            for service in services:
                rss = psutil.Process(service.process.pid).memory_info().rss
                memory.setdefault(service.module, []).append(rss >> 20)
    return memory


@pytest.mark.benchmark
@pytest.mark.timeout(0)
def test_five_times_the_sustainable_load(tmp_path: Path) -> None:
    """Goodput under a flood is not below that before it, memory does not grow with it, and it passes at once."""
    phases = [
        Phase("before", SUSTAINED, 40),
        Phase("flood", 5 * SUSTAINED, FLOOD_S / 2),
        Phase("flood", 5 * SUSTAINED, FLOOD_S / 2),
        Phase("after", SUSTAINED, 40),
    ]
    settings = {"MELL_LOG_FORMAT": "json", "MELL_QUEUE_WAIT_S": _WAIT_S, "MELL_MAX_SEQUENCES": str(SLOTS)}
    with Stack(tmp_path, settings) as stack:
        services = [stack.start_scheduler(), stack.start_worker("one", step_us=STEP_US), stack.start_frontend()]
        for service in services:
            service.ready()
        memory = asyncio.run(load(services[2].ready()["url"], phases, services))
    lines = [f"capacity {CAPACITY:.1f}/s, queue_wait_s {_WAIT_S}", *(phase.line() for phase in phases)]
    sys.stdout.write("\n".join(["", *lines, f"memory in MiB at the end of each phase: {memory}", ""]))
    before, flood = phases[0], phases[1:3]
    assert all(set(phase.statuses) <= {200, 429} for phase in phases)
    assert all("none" not in phase.retry_after for phase in flood)
    assert min(phase.ended / phase.duration_s for phase in flood) >= before.ended / before.duration_s
