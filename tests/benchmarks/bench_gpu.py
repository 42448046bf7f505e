import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.messages.sampling import SamplingParams
from mell_shared.models import default_model_dir
from mell_shared.process import loop_factory
from tests.benchmarks.figures import print_table, size, spread
from tests.benchmarks.moving import movers
from tests.gpu.cuda_source import cuda_source

# Has not been run yet: no GPU was at hand.
pytestmark = [pytest.mark.benchmark, pytest.mark.gpu, pytest.mark.timeout(1200)]

MIB = 2**20
ROUNDS = size("GPU_ROUNDS", 9)
MODEL = "smollm2-135m"
FLAGS = ("--model", MODEL, "--device", "cuda", "--memory-share", "0.3", "--transport", "ucx", "--no-prefix-cache")


def run(main: Any) -> Any:
    """Run on the event loop that services use."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def test_bandwidth_between_processes() -> None:
    """Rounds of KV blocks between two processes on one GPU, confirmations included."""

    async def main() -> list[list[str]]:
        import torch

        rows = []
        async with cuda_source() as source:
            for block_bytes in (256 * 1024, 2 * MIB):
                for total in (64 * MIB, 512 * MIB):
                    memory = torch.zeros(total // block_bytes, block_bytes, dtype=torch.uint8, device="cuda")
                    _, took, _ = await source.send(memory, ROUNDS + 1)
                    rates = [total / seconds / 1e9 for seconds in took[1:]]
                    rows.append([f"{total // MIB} MiB", f"{block_bytes // 1024:,} KiB", spread(rates, 1)])
        return rows

    print_table("CUDA memory between two processes on one GPU", ["round", "blocks", "GB/s"], run(main()))


def test_pause_of_a_move(tmp_path: Path) -> None:
    """A real model's sequence moved to and fro between two workers on one GPU, over lengths."""

    async def main() -> list[list[str]]:
        rows = []
        async with movers(tmp_path, *FLAGS) as pair:
            for length in (128, 1_000, 4_000, 7_000):
                name = f"moved-{length}"
                await pair.start(name, 0, length, model=MODEL)
                moves = [await pair.move(name, mode="kv") for _ in range(3 * ROUNDS)]
                await pair.end(name)
                rates = [moved.copied_bytes / max(1, moved.copy_us) / 1e3 for moved in moves]
                parts = ("stopped_us", "tail_us", "claim_us", "first_step_us")
                shares = [spread([getattr(moved, part) / 1e3 for moved in moves], 1) for part in parts]
                rows.append([f"{length:,}", spread(rates, 1), *shares])
        return rows

    head = ["tokens", "copied, GB/s", "pause, ms", "tail", "claim", "first step"]
    print_table("Moves by KV between two workers on one GPU", head, run(main()))


def test_decode_steps() -> None:
    """Steps of a real model in CUDA graphs and, in turn with them, launched one operation after the other."""
    from mell_gpu_worker.engine.torch_engine import load_torch_engine

    options = EngineOptions(engine="torch", model=MODEL, model_dir=default_model_dir(), device="cuda", kv_blocks=12_000)
    engines = [load_torch_engine(options), load_torch_engine(replace(options, compile="off"))]
    sampling = SamplingParams(seed=1, temperature=0.8, top_p=0.95)
    rows = []
    for batch, context in ((1, 500), (1, 8_000), (8, 500), (32, 500), (32, 4_000), (128, 500)):
        blocks = -(-context // 16)
        tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(batch)]
        ids = list(range(1, context + 1))
        step = [StepRow(str(row), ids, 1, context - 1, 1, tables[row], sampling) for row in range(batch)]
        took: list[list[float]] = [[], []]
        for engine in engines:
            engine.execute(step)
        for _ in range(10 * ROUNDS):
            for engine, times in zip(engines, took, strict=True):
                times.append(engine.execute(step).step_us / 1e3)
        rows.append([f"{batch}", f"{context:,}", *(spread(times, 2) for times in took)])
    for engine in engines:
        engine.close()
    print_table("Decode steps on one GPU", ["batch", "context", "graphs, ms", "plain, ms"], rows)
