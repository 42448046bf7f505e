"""A process with CUDA memory of its own that offers blocks over UCX: the other worker of a test on one GPU.

Reads one JSON line a job, answers one line with its address, receives until the source has left, then answers with
the SHA-256 of each block.
"""

import asyncio
import hashlib
import json
import os
import sys
from typing import Any

import torch

from mell_gpu_worker.engine.memory import forbid_expandable_segments
from mell_gpu_worker.transport.base import Transport, TransportError, TransportOptions
from mell_gpu_worker.transport.ucx import UcxTransport

LONG_S = 60.0


def tell(answer: dict[str, Any]) -> None:
    """Answer one line."""
    os.write(1, json.dumps(answer).encode() + b"\n")


async def receive(transport: Transport, job: dict[str, Any]) -> None:
    """Offer the same blocks for each round and take the rounds."""
    memory = torch.zeros(job["blocks"], job["block_bytes"], dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    buffers = list(memory) * job["rounds"]
    incoming = transport.offer(bytes.fromhex(job["secret"]), buffers, LONG_S)
    tell({"address": transport.address, "size_bytes": incoming.size_bytes})
    unchecked_bytes = 0
    try:
        while True:
            unchecked_bytes += (await incoming.receive(LONG_S)).unchecked_bytes
    except TransportError:
        await incoming.close()
    torch.cuda.synchronize()
    digests = [hashlib.sha256(block.cpu().numpy()).hexdigest() for block in memory]
    tell({"digests": digests, "unchecked_bytes": unchecked_bytes})


async def main() -> None:
    """Do jobs until stdin ends."""
    forbid_expandable_segments()
    torch.zeros(1, device="cuda")  # the context must be there before UCX looks for it
    transport = await UcxTransport.open(TransportOptions(kind="ucx"), lambda event, fields: None)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        await receive(transport, json.loads(line))
    await transport.close()


if __name__ == "__main__":
    asyncio.run(main())
