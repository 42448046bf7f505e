import asyncio
import json
import secrets
import socket
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mell_gpu_worker.transport.base import Outgoing, TransportOptions
from mell_gpu_worker.transport.checksum import checksum_of
from mell_gpu_worker.transport.factory import open_transport
from mell_gpu_worker.transport.regions import HostRegion
from mell_shared.process import loop_factory
from tests.benchmarks.figures import memory_read_gb_per_s, print_table, size, spread, verdict
from tests.benchmarks.raw_ucx import RawUcx
from tests.benchmarks.transport_target import blocks

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

MIB = 2**20
BLOCK = 737_280  # 16 tokens of the default model's KV in float32
TOTALS = {"64 MiB": 64 * MIB, "256 MiB": 256 * MIB}
ROUNDS = size("TRANSPORT_ROUNDS", 7)
LONG_S = 60.0


class Target:
    """The receiving process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def begin(self, **job: Any) -> dict[str, Any]:
        """Give it a job; return its first answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        """Return the next answer."""
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return answer


@asynccontextmanager
async def target() -> AsyncIterator[Target]:
    """Start the receiving process, and end it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.transport_target"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield Target(process)
    finally:
        process.kill()
        await process.wait()


class Source:
    """The sending side of every kind; `took_s` sends some rounds of blocks and returns the time of each."""

    def __init__(self, there: Target, memory: memoryview) -> None:
        self._there = there
        self._memory = memory
        self._transports: dict[str, Any] = {}

    async def took_s(self, kind: str, sizes: list[int], rounds: int) -> list[float]:
        """Return the seconds of each round, from its beginning to its confirmation."""
        if kind == "raw tcp":
            took = await self._raw_socket(sizes, rounds)
        elif kind == "raw ucx":
            took = await self._raw_ucx(sizes, rounds)
        else:
            took = await self._ours(kind, sizes, rounds)
        await self._there.answer()
        return took

    async def connect(self, kind: str, sizes: list[int], rounds: int) -> Outgoing:
        """Return a transfer of our transport, accepted."""
        if kind not in self._transports:
            options = TransportOptions(kind=kind, ucx_net_devices="lo", ucx_tls="tcp")
            self._transports[kind] = await open_transport(options, lambda event, fields: None)
        secret = secrets.token_bytes(32)
        offered = await self._there.begin(kind=kind, sizes=sizes, rounds=rounds, secret=secret.hex())
        outgoing: Outgoing = await self._transports[kind].connect(
            offered["address"], secret, offered["size_bytes"], LONG_S
        )
        return outgoing

    async def _ours(self, kind: str, sizes: list[int], rounds: int) -> list[float]:
        outgoing = await self.connect(kind, sizes, rounds)
        took = []
        for number in range(rounds):
            first = number * len(sizes)
            slots = [(first + slot, block) for slot, block in enumerate(blocks(self._memory, sizes))]
            begun_s = time.perf_counter()
            await outgoing.send(slots, LONG_S)
            took.append(time.perf_counter() - begun_s)
        await outgoing.close()
        return took

    async def _raw_socket(self, sizes: list[int], rounds: int) -> list[float]:
        loop = asyncio.get_running_loop()
        port = (await self._there.begin(kind="raw tcp", sizes=sizes, rounds=rounds))["port"]
        took = []
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(rounds):
                begun_s = time.perf_counter()
                for block in blocks(self._memory, sizes):
                    await loop.sock_sendall(sock, block)
                await loop.sock_recv(sock, 1)
                took.append(time.perf_counter() - begun_s)
        return took

    async def _raw_ucx(self, sizes: list[int], rounds: int) -> list[float]:
        port = (await self._there.begin(kind="raw ucx", sizes=sizes, rounds=rounds))["port"]
        took = []
        with RawUcx() as raw:
            raw.connect(port)
            for _ in range(rounds):
                begun_s = time.perf_counter()
                raw.send(blocks(self._memory, sizes))
                raw.receive([bytearray(1)])
                took.append(time.perf_counter() - begun_s)
        return took

    async def close(self) -> None:
        """Close our transports."""
        for transport in self._transports.values():
            await transport.close()


def filled(size_bytes: int) -> memoryview:
    """Return memory that is really there."""
    return memoryview(bytearray(secrets.token_bytes(MIB)) * (size_bytes // MIB))


def run(main: Any) -> Any:
    """Run on the event loop that services use."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def test_bandwidth() -> None:
    """Bandwidth of rounds of KV blocks, checksums and confirmation included, against the raw transports."""

    async def main() -> dict[tuple[str, str], list[float]]:
        figures: dict[tuple[str, str], list[float]] = defaultdict(list)
        async with target() as there:
            source = Source(there, filled(max(TOTALS.values())))
            for _ in range(ROUNDS):
                for label, total in TOTALS.items():
                    sizes = [BLOCK] * (total // BLOCK)
                    for kind in ("raw tcp", "tcp", "raw ucx", "ucx"):
                        took = await source.took_s(kind, sizes, 2)
                        figures[kind, label].append(sum(sizes) / took[1] / 1e9)
            await source.close()
        return figures

    figures = run(main())
    rows = []
    for label in TOTALS:
        for kind in ("tcp", "ucx"):
            raw, ours = figures[f"raw {kind}", label], figures[kind, label]
            ratios = [mine / theirs for mine, theirs in zip(ours, raw, strict=True)]
            rows.append([label, kind, spread(raw, 2), spread(ours, 2), spread(ratios, 2), verdict(ratios, 0.9)])
    head = ["round", "transport", "raw GB/s", "ours GB/s", "ratio", "goal"]
    print_table(f"{ROUNDS} interleaved rounds, memory reads {memory_read_gb_per_s():.1f} GB/s", head, rows)


def test_latency() -> None:
    """Time from the start of a small round to its confirmation, against the raw transports."""

    async def main() -> dict[tuple[str, int], list[float]]:
        figures: dict[tuple[str, int], list[float]] = defaultdict(list)
        async with target() as there:
            source = Source(there, filled(max(TOTALS.values())))
            for _ in range(ROUNDS):
                for size_bytes in (256, 4096):
                    for kind in ("raw tcp", "tcp", "raw ucx", "ucx"):
                        took = await source.took_s(kind, [size_bytes], 100)
                        figures[kind, size_bytes].append(statistics.median(took) * 1e6)
            await source.close()
        return figures

    figures = run(main())
    rows = [[kind, str(size_bytes), spread(values)] for (kind, size_bytes), values in sorted(figures.items())]
    print_table(f"Round trip, medians of 100 in {ROUNDS} rounds", ["transport", "bytes", "µs"], rows)


@pytest.mark.parametrize("kind", ["tcp", "ucx"])
def test_idle(kind: str) -> None:
    """CPU of a process with eight accepted transfers that carry nothing, over five seconds."""

    async def main() -> tuple[float, float]:
        there = await open_transport(TransportOptions(kind=kind, ucx_net_devices="lo", ucx_tls="tcp"), lambda *_: None)
        here = await open_transport(TransportOptions(kind=kind, ucx_net_devices="lo", ucx_tls="tcp"), lambda *_: None)
        begun_s = time.process_time()
        await asyncio.sleep(5)
        alone = time.process_time() - begun_s
        ends: list[Any] = []
        for _ in range(8):
            secret = secrets.token_bytes(32)
            ends.append(there.offer(secret, [bytearray(5)], LONG_S))
            ends.append(await here.connect(there.address, secret, 5, LONG_S))
        begun_s = time.process_time()
        await asyncio.sleep(5)
        used = time.process_time() - begun_s
        for end in ends:
            await end.close()
        await here.close()
        await there.close()
        return alone / 5, used / 5

    alone, used = run(main())
    rows = [["two transports listening", f"{alone:.3%}"], ["and 8 accepted transfers", f"{used:.3%}"]]
    print_table(f"{kind}: share of a core while idle", ["", "CPU"], rows)


def test_copies() -> None:
    """Bytes copied in user space for each byte moved, as both ends count them; and the speed of the checksum."""

    async def main() -> list[list[str]]:
        rows = []
        async with target() as there:
            source = Source(there, filled(max(TOTALS.values())))
            for each in (BLOCK, 64 * 1024):
                outgoing = await source.connect("tcp", [each] * 16, 1)
                sent = await outgoing.send([(slot, memoryview(bytes(each))) for slot in range(16)], LONG_S)
                await outgoing.close()
                await there.answer()
                rows.append([f"blocks of {each:,} bytes", f"{2 * sent.staged_bytes / sent.size_bytes:.0f}"])
            await source.close()
        return rows

    print_table(
        "Copies in user space, both ends together (checksums read, and do not copy)", ["", "copies"], run(main())
    )
    data, rates = HostRegion(filled(64 * MIB)), []
    for _ in range(ROUNDS):
        begun_s = time.thread_time()
        for offset in range(0, 64 * MIB, MIB):
            checksum_of(data.part(offset, MIB))
        rates.append(64 * MIB / (time.thread_time() - begun_s) / 1e9)
    print_table(
        "Checksum of memory not in a cache, chunks of 1 MiB", ["", "GB/s of CPU time"], [["XXH3", spread(rates, 1)]]
    )
