"""The receiving process of the transport benchmark: our transports, a raw socket and raw ucxx, one after the other.

Reads one JSON line per job, answers one line with its address, and receives until the source has left.
"""

import asyncio
import itertools
import json
import os
import socket
import sys
from typing import Any

from mell_gpu_worker.transport.base import Transport, TransportError, TransportOptions
from mell_gpu_worker.transport.factory import open_transport
from mell_shared.process import loop_factory

LONG_S = 60.0
OPTIONS = TransportOptions(ucx_net_devices="lo", ucx_tls="tcp")


def tell(answer: dict[str, Any]) -> None:
    """Answer one line."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def blocks(memory: memoryview, sizes: list[int]) -> list[memoryview]:
    """Return memory cut into blocks of these sizes, one behind the other."""
    ends = list(itertools.accumulate(sizes))
    return [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]


async def ours(transport: Transport, job: dict[str, Any], memory: memoryview) -> None:
    """Offer `rounds` times the same memory in blocks, and take the rounds."""
    buffers = blocks(memory, job["sizes"]) * job["rounds"]
    incoming = transport.offer(bytes.fromhex(job["secret"]), buffers, LONG_S)
    tell({"address": transport.address, "size_bytes": incoming.size_bytes})
    try:
        while True:
            await incoming.receive(LONG_S)
    except TransportError:
        await incoming.close()


async def raw_socket(job: dict[str, Any], memory: memoryview) -> None:
    """Receive rounds of plain bytes, each answered by one byte."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        tell({"port": listening.getsockname()[1]})
        sock, _ = await loop.sock_accept(listening)
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(job["rounds"]):
            left = memory[: sum(job["sizes"])]
            while left.nbytes:
                left = left[await loop.sock_recv_into(sock, left) :]
            await loop.sock_sendall(sock, b"!")


def raw_ucx(job: dict[str, Any], memory: memoryview) -> None:
    """Receive rounds of tagged messages of `sizes`, each round answered by one byte; nothing but progress."""
    from tests.benchmarks.raw_ucx import RawUcx

    with RawUcx() as raw:
        raw.listen(lambda port: tell({"port": port}))
        for _ in range(job["rounds"]):
            raw.receive(blocks(memory, job["sizes"]))
            raw.send([memory[:1]])


async def main() -> None:
    """Do jobs until stdin ends."""
    loop = asyncio.get_running_loop()
    memory = memoryview(bytearray(256 * 2**20))
    memory[:: os.sysconf("SC_PAGESIZE")] = bytes(len(memory[:: os.sysconf("SC_PAGESIZE")]))
    transports = {
        kind: await open_transport(TransportOptions(kind=kind, ucx_net_devices="lo", ucx_tls="tcp"), _quiet)
        for kind in ("tcp", "ucx")
    }
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        job = json.loads(line)
        if job["kind"] == "raw tcp":
            await raw_socket(job, memory)
        elif job["kind"] == "raw ucx":
            raw_ucx(job, memory)
        else:
            await ours(transports[job["kind"]], job, memory)
        tell({"done": True})


def _quiet(event: str, fields: dict[str, Any]) -> None:
    """Say nothing."""


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())
