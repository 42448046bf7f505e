"""The sending side of a test on one GPU: blocks of CUDA memory to a `cuda_peer` process, through UCX."""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mell_gpu_worker.engine.memory import forbid_expandable_segments
from mell_gpu_worker.transport.base import Round, TransportOptions
from mell_gpu_worker.transport.ucx import UcxTransport

LONG_S = 60.0


class CudaSource:
    """Sends rounds of blocks to the peer."""

    def __init__(self, process: asyncio.subprocess.Process, transport: UcxTransport) -> None:
        self._process = process
        self._transport = transport

    async def send(self, memory: Any, rounds: int) -> tuple[list[Round], list[float], dict[str, Any]]:
        """Send all rows of `memory`, uint8 [blocks, block_bytes] on CUDA, so many times.

        Returns the rounds, the seconds that each took, and what the peer says at the end.
        """
        secret = secrets.token_bytes(32)
        blocks, block_bytes = memory.shape
        job = {"blocks": blocks, "block_bytes": block_bytes, "rounds": rounds, "secret": secret.hex()}
        offered = await self._ask(job)
        outgoing = await self._transport.connect(offered["address"], secret, offered["size_bytes"], LONG_S)
        sent, took = [], []
        for number in range(rounds):
            slots = [(number * blocks + row, block) for row, block in enumerate(memory)]
            begun_s = time.perf_counter()
            sent.append(await outgoing.send(slots, LONG_S))
            took.append(time.perf_counter() - begun_s)
        await outgoing.close()
        return sent, took, await self._answer()

    async def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return answer


@asynccontextmanager
async def cuda_source() -> AsyncIterator[CudaSource]:
    """Start the peer process and a transport here."""
    import torch

    forbid_expandable_segments()
    torch.zeros(1, device="cuda")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.gpu.cuda_peer"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    transport = await UcxTransport.open(TransportOptions(kind="ucx"), lambda event, fields: None)
    try:
        yield CudaSource(process, transport)
    finally:
        await transport.close()
        process.kill()
        await process.wait()
