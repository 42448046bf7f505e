"""A worker's data port in a process of its own, to be killed and stopped: driven by JSON lines on its stdin."""

import asyncio
import json
import os
import sys
from typing import Any

from mell_gpu_worker.transport.base import TransportError, TransportOptions
from mell_gpu_worker.transport.factory import open_transport
from mell_shared.process import loop_factory
from tests.gpu_worker.transport.peer import Peer


async def serve(options: TransportOptions) -> None:
    """Carry out one command a line until stdin ends; answer each with one line."""
    loop = asyncio.get_running_loop()
    transport = await open_transport(options, lambda event, fields: None)
    peer = Peer(transport)
    tell({"address": transport.address})
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            tell(await peer.command(json.loads(line)))
        except TransportError as error:
            tell({"error": type(error).__name__, "reason": str(error)})
    await peer.close()


def tell(answer: dict[str, Any]) -> None:
    """Answer one line."""
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(TransportOptions(**json.loads(sys.argv[1]))))
