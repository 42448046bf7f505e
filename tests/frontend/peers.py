"""A scripted scheduler and scripted workers on a bus, for tests of the gateway."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from mell_frontend.gateway import BusGateway
from mell_frontend.generation import Delta, SequenceRequest, SequenceStream, Waiting
from mell_frontend.peers import Timeouts
from mell_frontend.stream.core import FrontendCore
from mell_frontend.stream.limits import StreamLimits
from mell_shared.bus import BusError, Delivery
from mell_shared.codec import decode, encode
from mell_shared.memory_bus import MemoryBroker, MemoryBus
from mell_shared.messages.admin import Status
from mell_shared.messages.base import Message
from mell_shared.messages.frontend import (
    FRONTEND_REPLY,
    FrontendControl,
    FrontendReply,
    StreamStatus,
    StreamStatusReply,
    TokensGenerated,
)
from mell_shared.messages.sampling import FinishReason, SamplingParams
from mell_shared.messages.scheduler import PLACE_REQUEST, Placed, PlaceReply, PlaceRequest, Rejected
from mell_shared.messages.worker import (
    WORKER_COMMAND,
    Cancel,
    CancelDone,
    Resend,
    ResendDone,
    Submit,
    SubmitAccepted,
)
from mell_shared.subjects import Subjects
from mell_shared.testing import VirtualTimeLoop

SUBJECTS = Subjects("test")


def token_at(prompt_ids: list[int], index: int) -> int:
    """Return the token that every worker computes at an output index of that prompt."""
    return (sum(prompt_ids) * 31 + index * 7) % 251


def text(prompt_ids: tuple[int, ...], length: int) -> list[int]:
    """Return the whole output for a prompt."""
    return [token_at(list(prompt_ids), index) for index in range(length)]


def request(sequence: str = "s", *, max_tokens: int = 20, prompt: tuple[int, ...] = (1, 2, 3)) -> SequenceRequest:
    """Return a request for one sequence."""
    sampling = SamplingParams(seed=1, max_tokens=max_tokens)
    return SequenceRequest(sequence=sequence, model="fake", prompt_ids=prompt, sampling=sampling)


class ScriptedScheduler:
    """Answers placements with what `decide` says (None: not at all); by default the first worker not excluded."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus
        self.workers: list[str] = []
        self.asked: list[PlaceRequest] = []
        self.decide: Callable[[PlaceRequest], PlaceReply | None] = self.first_worker

    async def start(self) -> None:
        """Listen."""
        await self._bus.subscribe(SUBJECTS.place, self._place)
        await self._bus.subscribe(SUBJECTS.admin("status"), self._status)

    def first_worker(self, asked: PlaceRequest) -> PlaceReply:
        """Place on the first worker that is not excluded."""
        free = [worker for worker in self.workers if worker not in asked.excluded]
        return Placed(worker=free[0]) if free else Rejected(reason="no_worker", message="no worker")

    async def _place(self, delivery: Delivery) -> None:
        asked = decode(PLACE_REQUEST, delivery.data)
        self.asked.append(asked)
        reply = self.decide(asked)
        if reply is not None:
            await self._bus.publish(delivery.reply_to, encode(reply))

    async def _status(self, delivery: Delivery) -> None:
        status = Status(scheduler="s", policy="p", uptime_s=1.0, workers=(), queued=0, placed=0, rejected=0)
        await self._bus.publish(delivery.reply_to, encode(status))


@dataclass
class Running:
    """One sequence at a scripted worker."""

    submit: Submit
    output_ids: list[int]
    finish: FinishReason | None = None


@dataclass
class ScriptedWorker:
    """Runs what it is given, a token each `step_s`; keeps outputs until acknowledged; sends statuses.

    `answer` may replace or withhold (None) the reply to a command; `silent` stops all that it says and does.
    """

    name: str
    bus: MemoryBus
    step_s: float = 0.02
    running: dict[str, Running] = field(default_factory=dict)
    commands: list[Message] = field(default_factory=list)
    replies: list[FrontendReply] = field(default_factory=list)
    answer: Callable[[Message, Message], Message | None] = lambda command, reply: reply
    silent: bool = False
    tells_status: bool = True
    lose_tokens: Callable[[TokensGenerated], bool] = lambda message: False

    async def start(self) -> None:
        """Listen."""
        await self.bus.subscribe(SUBJECTS.worker_commands(self.name), self._command)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._work())
            group.create_task(self._tell_status())

    async def ask(self, message: FrontendControl) -> FrontendReply:
        """Ask the frontend."""
        data = await self.bus.request(SUBJECTS.frontend_control("f"), encode(message), 1.0)
        return decode(FRONTEND_REPLY, data)

    async def publish(self, row: Running, first_index: int) -> None:
        """Publish a sequence's tokens from that index on."""
        submit = row.submit
        token_ids = row.output_ids[first_index:]
        message = TokensGenerated(
            worker=self.name,
            sequences=(submit.sequence,),
            generations=[submit.generation],
            first_indices=[first_index],
            counts=[len(token_ids)],
            token_ids=token_ids,
            finished={0: row.finish} if row.finish else {},
        )
        if not self.silent and not self.lose_tokens(message):
            await self.bus.publish(SUBJECTS.frontend_tokens(submit.frontend), encode(message))

    async def _command(self, delivery: Delivery) -> None:
        command = decode(WORKER_COMMAND, delivery.data)
        self.commands.append(command)
        if self.silent:
            return
        reply = self.answer(command, await self._obey(command))
        if reply is not None:
            await self.bus.publish(delivery.reply_to, encode(reply))

    async def _obey(self, command: Message) -> Message:
        match command:
            case Submit():
                self.running[command.sequence] = Running(command, list(command.output_ids))
                return SubmitAccepted(cached_tokens=1)
            case Cancel():
                row = self.running.get(command.sequence)
                if row is not None and row.submit.generation == command.generation:
                    del self.running[command.sequence]
                return CancelDone()
            case Resend():
                row = self.running.get(command.sequence)
                if row is None:
                    return ResendDone(known=False)
                await self.publish(row, command.first_index)
                return ResendDone(known=True)
        raise AssertionError(f"not expected: {command}")

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            for row in list(self.running.values()):
                if row.finish is None:
                    await self._step(row)

    async def _step(self, row: Running) -> None:
        index = len(row.output_ids)
        row.output_ids.append(token_at(row.submit.prompt_ids, index))
        limit = row.submit.sampling.max_tokens
        assert limit is not None
        if len(row.output_ids) >= limit:
            row.finish = "length"
        await self.publish(row, index)

    async def _tell_status(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            rows = list(self.running.items())
            status = StreamStatus(
                worker=self.name,
                sequences=tuple(name for name, _ in rows),
                generations=[row.submit.generation for _, row in rows],
                next_indices=[len(row.output_ids) for _, row in rows],
                ended=[int(row.finish is not None) for _, row in rows],
            )
            if self.tells_status and not self.silent and self.bus.connected:
                with contextlib.suppress(BusError):
                    await self._follow(rows, await self.ask(status))

    async def _follow(self, rows: list[tuple[str, Running]], reply: FrontendReply) -> None:
        self.replies.append(reply)
        assert isinstance(reply, StreamStatusReply)
        for number, first_index in reply.resend.items():
            await self.publish(rows[number][1], first_index)
        for number in (*reply.cancel, *reply.ack_end):
            self.running.pop(rows[number][0], None)


class Cluster:
    """A gateway with a scripted scheduler and workers, in virtual time. `async with` runs and ends it all."""

    def __init__(self, *workers: str, limits: StreamLimits | None = None, max_payload: int = 8 * 2**20) -> None:
        self._names = workers
        self._limits = limits
        self._max_payload = max_payload

    async def __aenter__(self) -> "Cluster":
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, VirtualTimeLoop)
        self.broker = MemoryBroker(max_payload=self._max_payload)
        self.bus = self.broker.connect()
        self.scheduler = ScriptedScheduler(self.broker.connect())
        await self.scheduler.start()
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._tasks: list[asyncio.Task[None]] = []
        self.workers = {name: await self.add_worker(name) for name in self._names}
        self.core = FrontendCore("f", self._limits)
        self.gateway = BusGateway(self.bus, SUBJECTS, self.core, self.loop, Timeouts())
        started = asyncio.Event()
        self._gateway_task = self._group.create_task(self.gateway.run(started.set))
        self._tasks.append(self._group.create_task(self.bus.watch()))
        await started.wait()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.core.check()
        self.gateway.stop()
        await self._gateway_task
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(None, None, None)
        await self.bus.close()

    async def add_worker(self, name: str) -> ScriptedWorker:
        """Start one more worker, last in the scheduler's order."""
        worker = ScriptedWorker(name, self.broker.connect())
        await worker.start()
        self._tasks.append(self._group.create_task(worker.run()))
        self.scheduler.workers.append(name)
        return worker


async def read_to_end(stream: SequenceStream) -> list[int]:
    """Return all tokens of a stream that ends."""
    token_ids, _ = await read(stream)
    return token_ids


async def read(
    stream: SequenceStream, at_least: int | None = None, *, came: list[Waiting | Delta] | None = None
) -> tuple[list[int], list[Waiting | Delta]]:
    """Return the tokens of a stream, to its end or until there are that many, and all that came (into `came`)."""
    token_ids: list[int] = []
    came = [] if came is None else came
    while at_least is None or len(token_ids) < at_least:
        news = await stream.next()
        came.append(news)
        if isinstance(news, Delta):
            token_ids += news.token_ids
            if news.finish_reason is not None:
                break
    return token_ids, came
