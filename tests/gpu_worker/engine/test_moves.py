"""Real models' sequences moved between whole workers over TCP, in this process: the same tokens, the same KV."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mell_gpu_worker.engine.torch_engine import TorchEngine
from mell_gpu_worker.surroundings import LaneOptions
from mell_gpu_worker.transport.base import TransportOptions
from mell_gpu_worker.transport.tcp import TcpTransport
from mell_shared.clock import SystemClock
from mell_shared.memory_bus import MemoryBroker
from mell_shared.messages.scheduler import MigrationCommitted
from mell_shared.messages.worker import SubmitAccepted
from tests.gpu_worker.core.worlds import submit
from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.families import VOCAB
from tests.gpu_worker.streaming import RunningWorker, SmallFrontend, running_worker, worker_settings

TinyModels = Callable[[str], tuple[Path, Any]]
PROMPT = [(11 * position) % (VOCAB - 1) + 1 for position in range(37)]
TOKENS = 120
ORDERS: list[dict[str, Any]] = [
    {"mode": "kv"},
    {"mode": "hybrid", "split_tokens": 16},
    {"mode": "tokens"},
    {"mode": "kv"},
]


class Pair:
    """Two workers with engines of one model, and a frontend."""

    def __init__(self, frontend: SmallFrontend) -> None:
        self.frontend = frontend
        self.engines: dict[str, TorchEngine] = {}
        self.workers: dict[str, RunningWorker] = {}

    async def run(self, sequence: str, orders: list[dict[str, Any]], **sampling: Any) -> list[int]:
        """Run a sequence, moving it to and fro as ordered; return its tokens."""
        message = submit(sequence, PROMPT, model="m", max_tokens=TOKENS, **sampling)
        assert isinstance(await self.frontend.submit("w1", message), SubmitAccepted)
        stream = self.frontend.streams[sequence]
        for number, order in enumerate(orders):
            wanted = 3 + 8 * number
            await self.frontend.until(lambda wanted=wanted: len(stream.tokens) >= wanted)
            target = "w2" if stream.owner == "w1" else "w1"
            moved = await self.frontend.move(sequence, target, **order)
            assert isinstance(moved, MigrationCommitted), moved
        await self.frontend.finished(sequence)
        assert stream.generation == 1 + len(orders)
        return stream.tokens


@asynccontextmanager
async def pair(engines: list[TorchEngine]) -> AsyncIterator[Pair]:
    """Run two workers on one in-memory bus, their KV over loopback."""
    broker = MemoryBroker(seed=1)
    made = Pair(SmallFrontend(broker.connect()))
    await made.frontend.start()
    async with AsyncExitStack() as stack:
        for number, engine in enumerate(engines, start=1):
            name = f"w{number}"
            transport = await TcpTransport.open(TransportOptions(), lambda event, fields: None)
            settings = worker_settings(worker_name=name, served_model_name="m", max_step_tokens=32)
            bus = broker.connect()
            stack.push_async_callback(bus.close)
            quiet = {"transport": transport, "lanes": LaneOptions(probes_per_minute=0)}
            worker = await stack.enter_async_context(running_worker(bus, engine, SystemClock(), settings, **quiet))
            made.workers[name], made.engines[name] = worker, engine
        await made.frontend.until(lambda: len(made.frontend.events) >= len(engines))
        yield made
        for worker in made.workers.values():
            assert not worker.task.done()
    await made.frontend.bus.close()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
async def test_moved_or_not_the_tokens_are_the_same(
    tiny_models: TinyModels, make_engine: MakeEngine, sampling: dict[str, Any]
) -> None:
    """Four moves in mid-stream, by KV, by both, by tokens: float32 on one thread gives the same tokens."""
    folder = tiny_models("llama")[0]
    async with pair([make_engine(folder, block_tokens=16, kv_blocks=48) for _ in range(2)]) as workers:
        alone = await workers.run("alone", [], **sampling)
        assert await workers.run("moved", ORDERS, **sampling) == alone


async def test_kv_arrives_bit_for_bit(tiny_models: TinyModels, make_engine: MakeEngine) -> None:
    """The blocks of a sequence that moved by KV hold at the target what they held at the source."""
    folder = tiny_models("llama")[0]
    async with pair([make_engine(folder, block_tokens=16, kv_blocks=48) for _ in range(2)]) as workers:
        frontend = workers.frontend
        message = submit("a", PROMPT, model="m", max_tokens=TOKENS)
        await frontend.submit("w1", message)
        await frontend.until(lambda: len(frontend.streams["a"].tokens) >= 10)
        before = workers.engines["w1"].pool.data.clone()
        (held,) = workers.workers["w1"].service.core.batcher.running
        source_blocks, whole = list(held.blocks), held.computed // 16
        assert isinstance(await frontend.move("a", "w2"), MigrationCommitted)
        (held,) = workers.workers["w2"].service.core.batcher.running
        target_blocks = list(held.blocks)
        after = workers.engines["w2"].pool.data
        assert whole >= 2
        for source, target in zip(source_blocks[:whole], target_blocks[:whole], strict=True):
            assert before[source].ne(0).any()
            assert bool((before[source] == after[target]).all())
        await asyncio.wait_for(frontend.finished("a"), 60)
