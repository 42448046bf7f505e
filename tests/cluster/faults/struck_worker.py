"""A real worker that is struck at a named point: it says so on stdout, then gets SIGKILL or SIGSTOP from itself.

    python -m tests.cluster.faults.struck_worker source:copying KILL --engine fake ...

So a fault comes exactly there, without any guess about time. The worker's own code is run unchanged; what it calls is
looked at from outside.

| point | when |
|---|---|
| `prefill` | the engine is about to compute a part of a prompt |
| `decode` | the engine is about to compute the twentieth token of a sequence's output |
| `source:PHASE`, `target:PHASE` | a move is in this phase of `migration/tables.py`, all that is said then is sent |
| `source:PHASE!`, `target:PHASE!` | it has just come into it, and nothing of that is said yet |
| `source:chunk` | the first chunk of a group of KV has been sent, over TCP, the others have not |
| `target:chunk` | the third chunk of KV is being received |
"""

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from mell_gpu_worker import __main__ as program
from mell_gpu_worker.core.events import Event
from mell_gpu_worker.core.migration import source, tables, target
from mell_gpu_worker.core.step import StepResult, StepRow
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.service import WorkerService
from mell_gpu_worker.transport.incoming import LinkIncoming
from mell_gpu_worker.transport.tcp import TcpLink

STRUCK = "struck at "
_OUTPUTS = 20
_CHUNKS = 3


class Strike:
    """Waits for its point, once."""

    def __init__(self, point: str, number: signal.Signals) -> None:
        self.point = point
        self._number = number

        self.armed = False
        """Whether the worker serves: it tries its own data port before."""

    def at(self, point: str) -> None:
        """Strike if this is the point."""
        if point != self.point or not self.armed:
            return
        self.armed = False
        os.write(1, f"{STRUCK}{point}\n".encode())
        os.kill(os.getpid(), self._number)


def watch_engine(strike: Strike) -> None:
    """Look at each step before it is computed."""
    execute = FakeEngine.execute

    @functools.wraps(execute)
    def watched(engine: FakeEngine, rows: Sequence[StepRow]) -> StepResult:
        for row in rows:
            outputs = len(row.token_ids) - row.prompt_tokens
            if row.start < row.prompt_tokens and row.count > 1:
                strike.at("prefill")
            elif outputs >= _OUTPUTS:
                strike.at("decode")
        return execute(engine, rows)

    FakeEngine.execute = watched  # type: ignore[method-assign]


def watch_chunks(strike: Strike) -> None:
    """Look at KV under way: what has just been sent, what is about to be received."""
    send, receive = TcpLink._send_now, LinkIncoming._chunk
    received = 0

    def watched_send(link: TcpLink, parts: Sequence[memoryview]) -> int:
        sent = send(link, parts)
        strike.at("source:chunk")
        return sent

    async def watched_receive(*arguments: Any) -> None:
        nonlocal received
        received += strike.armed
        if received == _CHUNKS:
            strike.at("target:chunk")
        await receive(*arguments)

    TcpLink._send_now = watched_send  # type: ignore[method-assign]
    LinkIncoming._chunk = watched_receive  # type: ignore[method-assign]


def watch_moves(strike: Strike) -> None:
    """Look at each step of a move: when it is decided, and when what follows from it is done."""
    entered: list[str] = []
    transition, handle = tables.transition, WorkerService._handle

    def watched_transition(role: Any, state: Any, event: Any, *more: Any) -> Any:
        standing, acts = transition(role, state, event, *more)
        if standing.phase is not state.phase:
            entered.append(f"{role.name}:{standing.phase.name.lower()}")
            strike.at(f"{entered[-1]}!")
        return standing, acts

    async def watched_handle(service: WorkerService, event: Event) -> None:
        before = set(service.core.moves.source.moving)
        await handle(service, event)
        if service.core.moves.source.moving.keys() - before:
            entered.append("source:reserving")
        if strike.point in entered:
            for _ in range(2):  # in the first, tasks begun just now come to send
                await service._bus.flush()
            strike.at(strike.point)
        entered.clear()

    source.transition = target.transition = watched_transition  # type: ignore[attr-defined]
    WorkerService._handle = watched_handle  # type: ignore[method-assign]


def arm_once_it_serves(strike: Strike) -> None:
    """Look away until then."""
    started = WorkerService._started

    def arming(service: WorkerService, stop: asyncio.Event) -> None:
        strike.armed = True
        started(service, stop)

    WorkerService._started = arming  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    """Run a worker with the flags after point and signal."""
    strike = Strike(arguments[0], signal.Signals[f"SIG{arguments[1]}"])
    watch_engine(strike)
    watch_chunks(strike)
    watch_moves(strike)
    arm_once_it_serves(strike)
    program.main(arguments[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
