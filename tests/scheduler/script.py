"""A scripted cluster around one core: short sentences in, commands out, every index checked after each."""

from mell_scheduler.core import Command, CoreSettings, Event, PlaceRequested, Reply, SchedulerCore, Tick
from mell_scheduler.policy import PolicySettings, make_policy
from mell_shared.messages.scheduler import (
    Placed,
    PlaceReply,
    PlaceRequest,
    Queued,
    Rejected,
    SequenceFinished,
    WorkerJoined,
    WorkerLeft,
    WorkerReport,
    WorkerSpec,
)

SECOND = 1_000_000
Row = tuple[str, int, int, int]
"""Sequence, generation, tokens, blocks; a running sequence in a report."""


def worker_spec(worker: str, **changes: object) -> WorkerSpec:
    """A worker of model `m` with 100 blocks of 16 tokens."""
    fields: dict[str, object] = {
        "worker": worker, "name": worker, "host": "host", "model": "m", "engine": "fake", "device": "cpu",
        "kv_layout": "layout", "max_model_len": 4096, "kv_blocks": 100, "block_tokens": 16, "max_sequences": 32,
    }  # fmt: skip
    return WorkerSpec.model_validate({**fields, **changes})


def worker_report(spec: WorkerSpec, number: int, *rows: Row, **changes: object) -> WorkerReport:
    """A report whose used blocks are its rows', unless `changes` says otherwise."""
    used = sum(row[3] for row in rows)
    fields: dict[str, object] = {
        "worker": spec.worker, "number": number, "used_blocks": used, "free_blocks": spec.kv_blocks - used,
        "sequences": tuple(row[0] for row in rows), "generations": [row[1] for row in rows],
        "tokens": [row[2] for row in rows], "blocks": [row[3] for row in rows], "states": [0] * len(rows),
    }  # fmt: skip
    return WorkerReport.model_validate({**fields, **changes})


def place_request(sequence: str, tokens: int = 160, output: int | None = 16, **changes: object) -> PlaceRequest:
    """A request that needs 11 blocks of 16 tokens in the end."""
    fields: dict[str, object] = {
        "sequence": sequence, "generation": 1, "frontend": "f", "model": "m",
        "prompt_tokens": tokens, "max_output_tokens": output,
    }  # fmt: skip
    return PlaceRequest.model_validate({**fields, **changes})


class Script:
    """Drives one core by hand; `now_us` moves only when told."""

    def __init__(self, policy: str = "best-fit", *, head_room: float = 0.0, start_us: int = 0, **settings: int) -> None:
        self.now_us = start_us
        self.settings = CoreSettings(**settings)
        self.core = SchedulerCore(make_policy(policy, PolicySettings(head_room=head_room)), self.settings, start_us)
        self.specs: dict[str, WorkerSpec] = {}
        self.numbers: dict[str, int] = {}
        self._handles = 0

    def send(self, event: Event) -> list[Command]:
        """Give the core an event now, and check it."""
        commands = self.core.handle(event, self.now_us)
        self.core.check()
        return commands

    def join(self, worker: str, **changes: object) -> list[Command]:
        """A worker joins; it has not reported yet."""
        self.specs[worker] = worker_spec(worker, **changes)
        return self.send(WorkerJoined(spec=self.specs[worker]))

    def report(self, worker: str, *rows: Row, **changes: object) -> list[Command]:
        """A worker's next report."""
        self.numbers[worker] = self.numbers.get(worker, -1) + 1
        return self.send(worker_report(self.specs[worker], self.numbers[worker], *rows, **changes))

    def up(self, *workers: str, **changes: object) -> None:
        """Workers join and report themselves empty."""
        for worker in workers:
            self.join(worker, **changes)
            self.report(worker)

    def ask(self, sequence: str, tokens: int = 160, output: int | None = 16, **changes: object) -> list[Command]:
        """A frontend asks for a place, with a new handle `sequence#n`."""
        self._handles += 1
        request = place_request(sequence, tokens, output, **changes)
        return self.send(PlaceRequested(f"{sequence}#{self._handles}", request))

    def answer(self, sequence: str, tokens: int = 160, output: int | None = 16, **changes: object) -> PlaceReply | None:
        """The reply that an ask gets at once, if any."""
        return only_reply(self.ask(sequence, tokens, output, **changes), sequence)

    def finish(self, worker: str, sequence: str, generation: int = 1) -> list[Command]:
        """A sequence ends."""
        return self.send(SequenceFinished(worker=worker, sequence=sequence, generation=generation, reason="stop"))

    def leave(self, worker: str) -> list[Command]:
        """A worker says goodbye."""
        return self.send(WorkerLeft(worker=worker, reason="told to stop"))

    def wait(self, seconds: float) -> list[Command]:
        """Let time pass in steps of 0.1 s, with a tick after each; returns what the core said."""
        commands: list[Command] = []
        for _ in range(round(seconds * 10)):
            self.now_us += SECOND // 10
            commands += self.send(Tick())
        return commands

    def free(self, worker: str) -> int:
        """Blocks that the core would still give away."""
        return self.core.ledger.free_blocks(self.core.ledger.workers[worker])

    def settle(self) -> None:
        """Pass the time in which a new leader still waits for workers; workers go on reporting themselves empty."""
        for _ in range(6):
            self.wait(1)
            for worker in self.specs:
                self.report(worker)


def replies(commands: list[Command]) -> dict[str, PlaceReply]:
    """The replies by sequence; there must be no two for one."""
    found = [command for command in commands if isinstance(command, Reply)]
    by_sequence = {command.sequence: command.reply for command in found}
    assert len(by_sequence) == len(found), "one sequence was answered twice"
    return by_sequence


def only_reply(commands: list[Command], sequence: str) -> PlaceReply | None:
    """The reply to one sequence, where there are no others."""
    found = replies(commands)
    assert set(found) <= {sequence}, f"others were answered too: {found}"
    return found.get(sequence)


def placed(worker: str) -> Placed:
    """The reply that names a worker."""
    return Placed(worker=worker)


def queued(position: int) -> Queued:
    """The reply that there is no room yet."""
    return Queued(position=position)


def reason(reply: PlaceReply | None) -> str:
    """Why a request was rejected."""
    assert isinstance(reply, Rejected), f"not rejected but {reply}"
    return reply.reason
