"""The live service and the simulated core are one: the same events give the same commands, live and again."""

import asyncio
import json
from pathlib import Path

import pytest

from mell_scheduler import replay as replay_command
from mell_scheduler.core import PlaceRequested, Reply, SchedulerCore, StartMigration
from mell_scheduler.core.journal import read_event, replay
from mell_scheduler.policy import POLICY_NAMES, make_policy
from mell_scheduler.settings import SchedulerSettings
from mell_shared.bus import Delivery
from mell_shared.codec import decode, encode
from mell_shared.messages.base import Message
from mell_shared.messages.scheduler import (
    MigrationCommitted,
    MigrationFailed,
    Placed,
    SequenceFinished,
    WorkerReport,
)
from mell_shared.messages.worker import (
    WORKER_COMMAND,
    CommandInvalid,
    Migrate,
    MigrateAccepted,
    MigrateRefused,
    SubmitAccepted,
)
from mell_shared.testing import run_virtually
from tests.scheduler.script import Row, place_request
from tests.scheduler.stage import SUBJECTS, ScriptedWorker, Stage, place, staged, status

MIGRATING = ("repack", "repack-frugal", "mell", "load-balance", "load-balance-drain")
GROWTH_TOKENS = 24
MOVE_S = 0.7


class MovingWorker(ScriptedWorker):
    """Carries out orders to move; what it answers, and whether a move succeeds, the test decides."""

    def __init__(self, stage: Stage, name: str, peers: "dict[str, MovingWorker]", **spec: object) -> None:
        super().__init__(stage.bus(), name, SUBJECTS, **({"migration_modes": ("kv", "tokens")} | spec))
        self.stage = stage
        self.peers = peers
        self.orders: list[Migrate] = []
        self.answers: list[Message | bytes | None] = []
        """For the next orders; afterwards all are accepted. None: no answer."""
        self.failing: list[str] = []
        """Reasons for which the next accepted moves fail."""
        peers[name] = self

    async def announce(self, delivery: Delivery) -> None:
        """Answer `Report`, and orders to move."""
        command = decode(WORKER_COMMAND, delivery.data)
        if not isinstance(command, Migrate):
            await super().announce(delivery)
            return
        self.orders.append(command)
        answer = self.answers.pop(0) if self.answers else MigrateAccepted()
        if answer is not None:
            await self.bus.publish(delivery.reply_to, answer if isinstance(answer, bytes) else encode(answer))
        if isinstance(answer, MigrateAccepted):
            self.stage.tasks.append(self.stage.group.create_task(self.move(command)))

    async def move(self, order: Migrate) -> None:
        """Take a while; then the sequence is at the target, or stays."""
        await asyncio.sleep(MOVE_S)
        row = next((row for row in self.rows if row[0] == order.sequence), None)
        if row is None:
            return
        told = {"migration": order.migration, "sequence": order.sequence}
        target = self.peers[order.target]
        if self.failing or target.used_blocks + row[3] > target.spec.kv_blocks:
            reason = self.failing.pop(0) if self.failing else "no_room"
            await self.tell(MigrationFailed(worker=self.spec.worker, generation=row[1], reason=reason, **told))
            return
        self.rows.remove(row)
        target.rows.append((row[0], row[1] + 1, row[2], row[3]))
        event = MigrationCommitted(
            worker=order.target,
            source=self.spec.worker,
            generation=row[1] + 1,
            copied_bytes=row[2] * 1_000,
            copy_us=round(MOVE_S * 1e6),
            **told,
        )
        await target.tell(event)

    @property
    def used_blocks(self) -> int:
        """Blocks of all rows."""
        return sum(row[3] for row in self.rows)

    def grow(self) -> list[Row]:
        """Every sequence has more tokens; returns the latest ones that there is no room for any more."""
        grown = [(s, g, tokens + GROWTH_TOKENS) for s, g, tokens, _ in self.rows]
        self.rows = [(s, g, tokens, -(-tokens // 16)) for s, g, tokens in grown]
        out = []
        while self.used_blocks > self.spec.kv_blocks:
            out.append(self.rows.pop())
        return out


async def live(stage: Stage, workers: dict[str, MovingWorker], seconds: int) -> dict[str, list[str]]:
    """Requests come, grow and end; returns each one's workers, as its frontend was told."""
    bus, told = stage.bus(), {}
    lengths = [160, 480, 96, 720, 240, 64]
    for number in range(seconds):
        name = f"s{number}"
        answer = await place(bus, place_request(name, lengths[number % 6], 400))
        told[name] = [answer.worker if isinstance(answer, Placed) else answer.kind]
        if isinstance(answer, Placed):
            tokens = lengths[number % 6]
            workers[answer.worker].rows.append((name, 1, tokens, -(-tokens // 16)))
        await asyncio.sleep(1.0)
        for worker in workers.values():
            out = worker.grow()
            done = [row for row in worker.rows if int(row[0][1:]) % 3 and int(row[0][1:]) < number - 5]
            worker.rows = [row for row in worker.rows if row not in done]
            for row in [*out, *done]:
                event = SequenceFinished(worker=worker.spec.worker, sequence=row[0], generation=row[1], reason="stop")
                await worker.tell(event)
    return told


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_live_commands_are_those_of_the_simulated_core(policy: str, tmp_path: Path) -> None:
    """What workers and frontends got over the bus is what the bare core says to the logged events."""
    path = tmp_path / "events.jsonl"
    workers: dict[str, MovingWorker] = {}
    told: dict[str, list[str]] = {}
    flags = {"policy": policy, "cooldown_epochs": 1, "migration_timeout_s": 4.0}

    async def main() -> None:
        async with staged() as stage:
            for number in range(4):
                worker = MovingWorker(stage, f"w{number}", workers, kv_blocks=120)
                worker.answers = [MigrateAccepted(), MigrateRefused(reason="busy", message="")]
                worker.failing = ["no_room"] if number % 2 else []
                stage.tasks.append(stage.group.create_task(worker.run()))
            scheduler = stage.scheduler(event_log=path, **flags)
            await asyncio.sleep(2.5)
            told.update(await live(stage, workers, 40))
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())
    lines = path.read_text().splitlines()
    settings = SchedulerSettings.model_validate(flags)
    events = [read_event(line) for line in lines[1:]]
    core = SchedulerCore(make_policy(policy, settings.policy_settings()), settings.core_settings(), events[0][0])
    simulated = [core.handle(event, now_us) for now_us, event in events]
    core.check()
    assert [commands for _, _, commands in replay(lines)] == simulated
    commands = [command for said in simulated for command in said]
    orders = [command.order for command in commands if isinstance(command, StartMigration)]
    received = [order for worker in workers.values() for order in worker.orders]
    assert sorted(orders, key=_id) == sorted(received, key=_id)
    assert bool(orders) == (policy in MIGRATING), "this load should make these policies move something"
    answered = {c.sequence: c.reply for c in commands if isinstance(c, Reply)}
    assert {n: [r.worker if isinstance(r, Placed) else r.kind] for n, r in answered.items()} == told
    assert [e for _, e in events if isinstance(e, PlaceRequested)]


def _id(order: Migrate) -> int:
    return int(order.migration.rpartition("-")[2])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (MigrateRefused(reason="unsupported", message="no"), "unsupported"),
        (MigrateRefused(reason="superseded", message="gone on"), "superseded"),
        (CommandInvalid(message="unknown kind"), "unsupported"),
        (SubmitAccepted(), "unsupported"),
        (b"\xc1", "unsupported"),
    ],
    ids=["unsupported", "superseded", "an older release", "nonsense", "no message"],
)
def test_a_refused_order_comes_back_as_a_failure(answer: Message | bytes, reason: str, tmp_path: Path) -> None:
    """Whatever a source answers but yes: the move is over, both ends are free, and the log shows why."""
    path = tmp_path / "events.jsonl"

    async def main() -> None:
        async with staged() as stage:
            workers: dict[str, MovingWorker] = {}
            for name, rows in {"a": [("big", 1, 640, 40)], "b": [("small", 1, 160, 10)]}.items():
                worker = MovingWorker(stage, name, workers)
                worker.rows, worker.answers = list(rows), [answer]
                stage.tasks.append(stage.group.create_task(worker.run()))
            scheduler = stage.scheduler(event_log=path)
            await asyncio.sleep(6.5)
            assert scheduler.metric("mell_scheduler_migrations_total", outcome="failed") == 1
            assert scheduler.metric("mell_scheduler_gpus_wanted", model="m") in {1, 2}
            told = await status(stage.bus())
            assert (told.migrations_failed, told.migrating + told.migrated) >= (1, 0)
            assert [(model.model, model.gpus_wanted) for model in told.models] in ([("m", 1)], [("m", 2)])
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())
    failures = [event for _, event, _ in replay(path.read_text().splitlines()) if isinstance(event, MigrationFailed)]
    assert [failure.reason for failure in failures][:1] == [reason]


def test_an_order_without_an_answer_is_repeated_not_given_up() -> None:
    """The source may have begun, and only the answer be lost: both ends stay held, and a repeat gets the answer."""

    async def main() -> None:
        async with staged() as stage:
            workers: dict[str, MovingWorker] = {}
            for name, rows in {"a": [("big", 1, 640, 40)], "b": [("small", 1, 160, 10)]}.items():
                worker = MovingWorker(stage, name, workers)
                worker.rows, worker.answers = list(rows), [None]
                stage.tasks.append(stage.group.create_task(worker.run()))
            scheduler = stage.scheduler()
            await asyncio.sleep(9.0)
            (orders,) = [worker.orders for worker in workers.values() if worker.orders]
            assert len(orders) >= 2
            assert orders[0] == orders[1]
            told = await status(stage.bus())
            assert (told.migrations_failed, told.migrated) == (0, 1)
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())


def test_a_log_is_decided_again_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON line for each command, in order; twice the same."""
    path = tmp_path / "events.jsonl"

    async def main() -> None:
        async with staged() as stage:
            workers: dict[str, MovingWorker] = {}
            stage.tasks.append(stage.group.create_task(MovingWorker(stage, "a", workers).run()))
            scheduler = stage.scheduler(event_log=path)
            await asyncio.sleep(0.5)
            await place(stage.bus(), place_request("s1"))
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())
    capsys.readouterr()
    assert replay_command.main([str(path)]) == 0
    first = capsys.readouterr().out
    records = [json.loads(line) for line in first.splitlines()]
    assert [r["command"] for r in records] == ["AskReport", "Announce", "Announce", "Reply"]
    assert records[-1]["reply"] == {"kind": "placed", "worker": "a"}
    assert records[-1]["cause"] == "PlaceRequested"
    assert replay_command.main([str(path)]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), (b"{}\n", "line 1"), (b"\xff\xfe", "decode")])
def test_what_is_no_log_is_said_so(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, and an exit code that is not 0."""
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert replay_command.main([str(path)]) == 1
    assert said in capsys.readouterr().err


def test_a_report_is_a_value(tmp_path: Path) -> None:
    """The log keeps packed columns as plain numbers, so that a line can be read by people."""
    path = tmp_path / "events.jsonl"

    async def main() -> None:
        async with staged() as stage:
            worker = MovingWorker(stage, "a", {})
            worker.rows = [("s", 3, 160, 10)]
            stage.tasks.append(stage.group.create_task(worker.run()))
            scheduler = stage.scheduler(event_log=path)
            await asyncio.sleep(0.5)
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())
    events = [read_event(line)[1] for line in path.read_text().splitlines()[1:]]
    reports = [event for event in events if isinstance(event, WorkerReport)]
    assert reports
    assert (reports[0].sequences, reports[0].generations, reports[0].tokens) == (("s",), [3], [160])
