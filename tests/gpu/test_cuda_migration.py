import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from mell_gpu_worker.engine.memory import forbid_expandable_segments
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.transport.regions import DeviceRegion, region_of
from mell_shared.messages.scheduler import MigrationCommitted
from mell_shared.models import default_model_dir
from tests.cluster.mover import mover
from tests.cluster.stack import Stack, StreamedChat, eventually
from tests.gpu.cuda_source import cuda_source

# Needs one CUDA device and UCX with CUDA support. Has not been run yet: no GPU was at hand.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
TOKENS = 300


def test_blocks_of_the_pool_are_cuda_memory_that_can_be_shared() -> None:
    """Contiguous, of the size that the spec says, and in no expandable segment, also if the environment asks for it."""
    import torch

    from mell_gpu_worker.engine.torch_engine import load_torch_engine

    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    engine = load_torch_engine(
        EngineOptions(engine="torch", model=MODEL, model_dir=default_model_dir(), device="cuda", kv_blocks=64)
    )
    block = region_of(engine.kv_block(5), writable=True)
    assert isinstance(block, DeviceRegion)
    assert block.nbytes == engine.spec.block_bytes
    pointer = block.raw.pointer
    (segment,) = [
        found
        for found in torch.cuda.memory_snapshot()
        if found["address"] <= pointer < found["address"] + found["total_size"]
    ]
    assert not segment.get("is_expandable", False)
    scratch = region_of(engine.scratch(1000), writable=True)
    assert isinstance(scratch, DeviceRegion)
    assert scratch.nbytes == 1000
    engine.close()


async def test_blocks_travel_between_two_processes_on_one_gpu() -> None:
    """Bit for bit, straight from memory to memory; without a checksum of ours, which the round says."""
    import torch

    forbid_expandable_segments()
    memory = torch.randint(256, (40, 1_474_560), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    async with cuda_source() as source:
        (sent,), _, told = await source.send(memory, rounds=1)
    assert sent.size_bytes == sent.unchecked_bytes == memory.numel() == told["unchecked_bytes"]
    assert sent.staged_bytes == 0
    assert told["digests"] == [hashlib.sha256(block.cpu().numpy()).hexdigest() for block in memory]


@pytest.mark.connected
def test_a_stream_moves_between_two_workers_on_one_gpu(tmp_path: Path) -> None:
    """By KV over CUDA IPC, in float32 and alone in its batch: the text is that of an answer that never moved."""
    flags = ["--model", MODEL, "--device", "cuda", "--dtype", "float32", "--memory-share", "0.2", "--transport", "ucx"]
    with Stack(tmp_path) as stack:
        stack.start_scheduler("--policy", "best-fit").ready()
        workers = [stack.start("mell_gpu_worker", "--worker-name", name, *flags) for name in ("one", "two")]
        for worker in workers:
            worker.ready(180)
        frontend = stack.start_frontend(model=MODEL)
        with stack.client(frontend) as client:
            undisturbed = StreamedChat(client, TOKENS, model=MODEL).read()
            chat = StreamedChat(client, TOKENS, model=MODEL)
            chat.read(20)
            moved = asyncio.run(_move_about(stack, chat))
            assert all(isinstance(outcome, MigrationCommitted) for outcome in moved), moved
            assert not chat.done
            assert chat.read() == undisturbed
        eventually(lambda: all(worker.process.poll() is None for worker in workers), "both workers live")


async def _move_about(stack: Stack, chat: StreamedChat) -> list[Any]:
    outcomes = []
    async with mover(stack.broker.url) as moves:
        source, *_ = await moves.holder()
        names = ["one", "two"] if source.startswith("two") else ["two", "one"]
        for number in range(3):
            outcomes.append(await moves.move(names[number % 2], mode="kv"))
            await asyncio.to_thread(chat.read, len(chat.text) + 20)
    return outcomes
