"""How long the device would wait between two steps: a real worker on a broker, whose engine only waits.

The wait is like that for a GPU: the engine's thread holds nothing that the event loop needs.
"""

import asyncio
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mell_gpu_worker.core.step import SampledToken, StepResult, StepRow
from mell_gpu_worker.engine.base import EngineSpec
from mell_gpu_worker.engine.decode_step import DecodeInputs
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.clock import SystemClock
from mell_shared.codec import encode
from mell_shared.log import configure_logging
from mell_shared.models import FAKE_MODEL
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer
from mell_shared.process import loop_factory
from tests.benchmarks.figures import print_table, size, spread
from tests.gpu_worker.core.worlds import submit
from tests.gpu_worker.streaming import SUBJECTS, SmallFrontend, running_worker, worker_settings

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]

ROUNDS = size("ROUNDS", 5)
STEPS = size("STEPS", 200)
STEP_S = size("STEP_MS", 10) / 1e3
CONTEXT = size("CONTEXT", 500)
"""Tokens of each prompt."""
BLOCK_TOKENS = 16
BLOCKS = 2 + (CONTEXT + 2 * STEPS) // BLOCK_TOKENS
"""Of the longest row."""


class WaitingEngine(FakeEngine):
    """Makes tokens of nothing in `STEP_S`, on its thread; keeps what passes between steps that only decode."""

    def __init__(self, rows: int, inputs: DecodeInputs) -> None:
        blocks = rows * BLOCKS
        options = EngineOptions(
            engine="fake", model=FAKE_MODEL, model_dir=Path(), kv_blocks=blocks, block_tokens=BLOCK_TOKENS
        )
        super().__init__(options)
        self._own_spec = replace(super().spec, instant=False)
        self._rows = rows
        self._inputs = inputs
        self._ended_s: float | None = None
        self.between_s: list[float] = []
        """From the end of a step to the beginning of the next."""
        self.filling_s: list[float] = []
        """To write a step's inputs."""
        self.done = threading.Event()

    @property
    def spec(self) -> EngineSpec:
        """It runs on a thread."""
        return self._own_spec

    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Wait."""
        began_s = time.perf_counter()
        if len(rows) == self._rows and all(row.count == 1 for row in rows):
            if self._ended_s is not None:
                self.between_s.append(began_s - self._ended_s)
            began_s = time.perf_counter()
            self._inputs.fill(rows)
            self.filling_s.append(time.perf_counter() - began_s)
            time.sleep(STEP_S)
            if len(self.between_s) == STEPS:
                self.done.set()
            self._ended_s = time.perf_counter()
        token = SampledToken(65)
        return StepResult(tuple(token if row.sampling else None for row in rows), 1)


@pytest.mark.parametrize("rows", [32, 256])
def test_between_two_steps(nats_server: NatsServer, rows: int) -> None:
    """Batching, bookkeeping and token messages, as far as the next step waits for them, and writing its inputs."""
    configure_logging("warning", "json", service="gpu_worker", process="w1")
    shape = KvShape(layers=1, block_tokens=BLOCK_TOKENS, kv_heads=1, head_dim=8, dtype=torch.float32)
    pool = KvPool(rows * BLOCKS, shape, torch.device("cpu"))
    between, filling = [], []
    for _ in range(ROUNDS):
        engine = WaitingEngine(rows, DecodeInputs(pool, rows, BLOCKS))
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_serve(nats_server, engine, rows))
        between.append(statistics.median(engine.between_s) * 1e6)
        filling.append(statistics.median(engine.filling_s) * 1e6)
    print_table(
        f"{rows} rows of {CONTEXT} tokens, steps of {STEP_S * 1e3:g} ms, {ROUNDS} rounds",
        ["µs a step", "median (range)"],
        [["from step to step", spread(between)], ["writing its inputs", spread(filling)]],
    )


async def _serve(nats_server: NatsServer, engine: WaitingEngine, rows: int) -> None:
    """Let a worker decode so many sequences together for some steps."""
    settings = worker_settings(max_sequences=rows, max_step_tokens=8192, report_interval_s=1.0)
    async with AsyncExitStack() as stack:
        bus, client = [await NatsBus.connect(nats_server.url, name="bench") for _ in range(2)]
        stack.push_async_callback(bus.close)
        stack.push_async_callback(client.close)
        scheduler = SmallFrontend(client)
        await scheduler.start()
        await stack.enter_async_context(running_worker(bus, engine, SystemClock(), settings))
        worker = await scheduler.worker()

        async def ask(index: int) -> None:
            prompt = [(index * 31 + token) % 200 for token in range(CONTEXT)]
            # Of frontends that do not listen: what they would do with the tokens takes no time from the worker.
            message = submit(f"s{index}", prompt, max_tokens=2 * STEPS, frontend=f"away-{index % 2}")
            await client.request(SUBJECTS.worker_commands(worker), encode(message), 60.0)

        await asyncio.gather(*map(ask, range(rows)))
        assert await asyncio.to_thread(engine.done.wait, 60)
