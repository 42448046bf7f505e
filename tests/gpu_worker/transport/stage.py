"""One stage for all transports: ours in this process, peers that can be killed and stopped, and bare links."""

import asyncio
import gc
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from mell_gpu_worker.transport.addresses import Address
from mell_gpu_worker.transport.base import Transport, TransportError, TransportOptions
from mell_gpu_worker.transport.link import Link
from mell_gpu_worker.transport.memory import MemoryLink, MemoryNetwork, MemoryTransport
from mell_gpu_worker.transport.tcp import TcpTransport, open_link
from mell_gpu_worker.transport.ucx import UcxTransport
from tests.gpu_worker.transport.peer import Peer
from tests.processes import stands_still

_UCX_WORKER_DESCRIPTORS = 8
OPTIONS = TransportOptions(ucx_net_devices="lo", ucx_tls="tcp", hello_timeout_s=60.0)


async def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return as soon as `condition` holds; the timeout only ends a test that has failed."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)


class OtherWorker(Protocol):
    """A peer on the other side of the process boundary, or of what stands for it."""

    address: str

    async def ask(self, **command: Any) -> dict[str, Any]:
        """Have a command carried out; a `TransportError` comes back as {"error": its name}."""
        ...

    def kill(self) -> None:
        """End it without a word."""
        ...

    async def stop(self) -> None:
        """Make it stand still."""
        ...

    def go_on(self) -> None:
        """Let it go on."""
        ...

    async def close(self) -> None:
        """Clean up, whatever became of it."""
        ...


class MemoryWorker:
    """A peer within this process; its links stand still or break when it is stopped or killed."""

    def __init__(self, network: MemoryNetwork, transport: MemoryTransport) -> None:
        self.address = transport.address
        self._network = network
        self._peer = Peer(transport)

    async def ask(self, **command: Any) -> dict[str, Any]:
        """Have a command carried out."""
        try:
            return await self._peer.command(command)
        except TransportError as error:
            return {"error": type(error).__name__, "reason": str(error)}

    def kill(self) -> None:
        """Break all links."""
        self._network.forget(self.address)
        for link in self._network.links:
            link.close()

    async def stop(self) -> None:
        """Deliver nothing any more."""
        for link in self._network.links:
            link.out.stop()
            link.back.stop()

    def go_on(self) -> None:
        """Deliver again."""
        for link in self._network.links:
            link.out.go_on()
            link.back.go_on()

    async def close(self) -> None:
        """Close it."""
        self.go_on()
        await self._peer.close()


class ProcessWorker:
    """A peer in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.address = address
        self._process = process
        self._asking = asyncio.Lock()

    @classmethod
    async def start(cls, options: TransportOptions) -> "ProcessWorker":
        """Start a process and wait until it listens."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.gpu_worker.transport.peer_process", json.dumps(asdict(options))),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        assert process.stdout is not None
        return cls(process, json.loads(await process.stdout.readline())["address"])

    async def ask(self, **command: Any) -> dict[str, Any]:
        """Have a command carried out."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._asking:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            answer: dict[str, Any] = json.loads(await self._process.stdout.readline() or b'{"error": "dead"}')
            return answer

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    async def stop(self) -> None:
        """SIGSTOP; returns when every thread stands."""
        self._process.send_signal(signal.SIGSTOP)
        await eventually(lambda: stands_still(self._process.pid))

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    async def close(self) -> None:
        """Kill it if it lives, and reap it."""
        if self._process.returncode is None:
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()


class Stage:
    """Transports and peers of one kind; `close` checks that nothing of them is left."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.told: list[tuple[str, dict[str, Any]]] = []
        """What our transports told of their doors."""
        self._network = MemoryNetwork()
        self._transports: list[Any] = []
        self._others: list[OtherWorker] = []
        self._descriptors = descriptors()

    async def transport(self, **options: Any) -> Any:
        """Open a transport in this process."""
        made = await self._open(replace(OPTIONS, **options))
        self._transports.append(made)
        return made

    async def _open(self, options: TransportOptions) -> Transport:
        def tell(event: str, fields: dict[str, Any]) -> None:
            self.told.append((event, fields))

        if self.kind == "memory":
            return self._network.transport(options, tell)
        if self.kind == "tcp":
            return await TcpTransport.open(options, tell)
        return await UcxTransport.open(options, tell)

    async def other(self) -> OtherWorker:
        """Start a peer."""
        made: OtherWorker
        if self.kind == "memory":
            made = MemoryWorker(self._network, self._network.transport(OPTIONS, lambda event, fields: None))
        else:
            made = await ProcessWorker.start(replace(OPTIONS, kind=self.kind))
        self._others.append(made)
        return made

    async def link(self, source: Any, address: str) -> Link:
        """Open a bare link: what a stranger or a forger has."""
        if self.kind == "memory":
            link: MemoryLink = await self._network.open_link(address)
            return link
        peer = Address.parse(address, self.kind)
        found: Link = await (open_link(peer) if self.kind == "tcp" else source.open_link(peer))
        return found

    async def close(self) -> None:
        """Close everything and check that no task, request or file descriptor is left."""
        opened = len(self._transports)
        for other in self._others:
            await other.close()
        while self._transports:
            transport = self._transports.pop()
            await transport.close()
            assert transport.tasks == 0
            assert getattr(transport, "pending", 0) == 0
            del transport
        self._transports.clear()
        self._others.clear()
        self._network = MemoryNetwork()
        await asyncio.sleep(0)
        await eventually(lambda: len(asyncio.all_tasks()) <= 2)
        # UCX keeps a worker, with its own descriptors but no connections, once it has aborted a transfer half-way.
        allowed = self._descriptors + (_UCX_WORKER_DESCRIPTORS * opened if self.kind == "ucx" else 0)
        # Garbage is collected only if need be: with all the other tests' libraries loaded that takes half a second.
        await eventually(lambda: descriptors() <= allowed or (gc.collect() >= 0 and descriptors() <= allowed))


def descriptors() -> int:
    """Open file descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))
