"""Operators over the bus: orders reach workers and the core, answers come back, and the log replays to the same."""

import asyncio
from pathlib import Path

import pytest

from mell_scheduler.core import Answer, OperatorAsked, StartMigration
from mell_scheduler.core.journal import replay
from mell_scheduler.pause import PauseMemory
from mell_shared.bus import Bus, Delivery, NoResponderError
from mell_shared.codec import decode, encode
from mell_shared.key_value import Entry
from mell_shared.memory_bus import MemoryBroker
from mell_shared.memory_key_value import MemoryBucket, MemoryKeyValue
from mell_shared.messages.admin import (
    ADMIN_REPLY,
    AdminRefused,
    AdminReply,
    AdminRequest,
    DrainReply,
    DrainRequest,
    ExplainRequest,
    Explanation,
    MigrateReply,
    MigrateRequest,
    MovingReply,
    MovingRequest,
    Status,
    StatusRequest,
    UndrainRequest,
)
from mell_shared.messages.base import Message
from mell_shared.messages.worker import WORKER_COMMAND, Drain, DrainRefused, DrainSet, SubmitAccepted, Undrain
from mell_shared.testing import run_virtually
from tests.scheduler.stage import SUBJECTS, LoopClock, Stage, staged, status, until
from tests.scheduler.test_live_and_simulated import MovingWorker


class DrainedWorker(MovingWorker):
    """Drains as it is told, unless the test wants another answer."""

    drains: list[Drain | Undrain]
    drain_answer: Message | bytes | None = None

    async def announce(self, delivery: Delivery) -> None:
        """Answer orders to drain, and whatever else a moving worker gets."""
        command = decode(WORKER_COMMAND, delivery.data)
        if not isinstance(command, Drain | Undrain):
            await super().announce(delivery)
            return
        self.drains = [*getattr(self, "drains", []), command]
        answer = self.drain_answer
        if answer is None:
            self.draining = isinstance(command, Drain)
            answer = DrainSet(draining=self.draining, sequences=len(self.rows))
            await self.report()
        await self.bus.publish(delivery.reply_to, answer if isinstance(answer, bytes) else encode(answer))


async def ask(bus: Bus, request: AdminRequest, timeout_s: float = 3.0) -> AdminReply:
    """Ask as a frontend does."""
    return decode(ADMIN_REPLY, await bus.request(SUBJECTS.admin(request.kind), encode(request), timeout_s))


def team(stage: Stage, **rows: list[tuple[str, int, int, int]]) -> dict[str, DrainedWorker]:
    """Running workers that hold something."""
    peers: dict[str, MovingWorker] = {}
    workers = {name: DrainedWorker(stage, name, peers) for name in rows}
    for name, worker in workers.items():
        worker.rows = list(rows[name])
        stage.tasks.append(stage.group.create_task(worker.run()))
    return workers


def test_a_drain_empties_a_worker_and_undrain_brings_it_back(tmp_path: Path) -> None:
    """Order, plan, moves, `drained`, `standby`; and the log is decided again to the same commands."""
    path = tmp_path / "events.jsonl"

    async def main() -> None:
        async with staged() as stage:
            workers = team(stage, a=[("big", 1, 640, 40)], b=[("x", 1, 320, 20), ("y", 1, 320, 20)])
            scheduler = stage.scheduler(event_log=path, policy="best-fit")
            bus = stage.bus()
            await asyncio.sleep(2.5)
            reply = await ask(bus, DrainRequest(worker="b", deadline_s=9.0))
            assert isinstance(reply, DrainReply)
            assert [(row.sequence, row.target) for row in reply.sequences] == [("x", "a"), ("y", "a")]
            assert workers["b"].drains == [Drain(term=1, deadline_s=9.0)]
            await until(lambda: not workers["b"].rows)
            await asyncio.sleep(1.5)
            assert {row[0] for row in workers["a"].rows} == {"big", "x", "y"}
            assert await states(bus) == {"a": "active", "b": "drained"}
            await ask(bus, UndrainRequest(worker="b"))
            await asyncio.sleep(0.5)
            assert await states(bus) == {"a": "active", "b": "standby"}
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())
    decided = list(replay(path.read_text().splitlines()))
    assert [type(event.request) for _, event, _ in decided if isinstance(event, OperatorAsked)] == [
        DrainRequest,
        UndrainRequest,
    ]
    reasons = [c.order.reason for _, _, said in decided for c in said if isinstance(c, StartMigration)]
    assert reasons == ["drain", "drain"]


async def states(bus: Bus) -> dict[str, str]:
    """How the scheduler sees each worker."""
    seen = await status(bus)
    return {worker.worker: worker.state for worker in seen.workers}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (DrainRefused(reason="term", message="older", term=9), "not_leader"),
        (DrainRefused(reason="stopping", message="it stops"), "stopping"),
        (SubmitAccepted(), "unsupported"),
        (b"\xc1", "unreachable"),
    ],
    ids=["term", "stopping", "an older release", "no message"],
)
def test_a_drain_that_is_refused_is_told_so(answer: Message | bytes, reason: str) -> None:
    """Whatever the worker answers, the operator gets the reason."""

    async def main() -> None:
        async with staged() as stage:
            workers = team(stage, a=[])
            workers["a"].drain_answer = answer
            stage.scheduler()
            await asyncio.sleep(2.5)
            reply = await ask(stage.bus(), DrainRequest(worker="a"))
            assert isinstance(reply, AdminRefused)
            assert reply.reason == reason

    run_virtually(main())


def test_a_move_is_ordered_followed_explained_and_listed(tmp_path: Path) -> None:
    """What the operator is told at each step is what the log's core answers again."""
    path = tmp_path / "events.jsonl"
    told: list[AdminReply] = []

    async def main() -> None:
        async with staged() as stage:
            workers = team(stage, a=[("chatcmpl-1.0.0", 1, 640, 40)], b=[])
            scheduler = stage.scheduler(event_log=path)
            bus = stage.bus()
            await asyncio.sleep(2.5)
            told.append(await ask(bus, MovingRequest(paused=True)))
            order = MigrateRequest(ask="x", request="chatcmpl-1", target="b", mode="tokens")
            told.append(await ask(bus, order))
            told.append(await ask(bus, order))
            explanation = await ask(bus, ExplainRequest(request="chatcmpl-1"))
            assert isinstance(explanation, Explanation)
            assert [h.what for h in explanation.stories[0].happenings][:3] == ["found", "moving", "moved"]
            seen = await ask(bus, StatusRequest(sequences=True))
            assert isinstance(seen, Status)
            assert (seen.moves_paused, seen.migrated) == (True, 1)
            assert [(move.reason, move.outcome, move.mode) for move in seen.recent_moves] == [
                ("manual", "committed", "tokens")
            ]
            assert [(row.sequence, row.worker, row.moves) for row in seen.sequences] == [("chatcmpl-1.0.0", "b", 1)]
            assert scheduler.metric("mell_scheduler_moves_paused") == 1
            assert workers["a"].rows == []
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())
    assert told[0] == MovingReply(paused=True)
    results = [reply.moves[0].state for reply in told if isinstance(reply, MigrateReply)]
    assert results[-1] == "committed"
    answers = [c.reply for _, _, said in replay(path.read_text().splitlines()) for c in said if isinstance(c, Answer)]
    assert answers == told


def test_failures_are_counted_by_reason() -> None:
    """In the status and in the metrics; the asker is told."""

    async def main() -> None:
        async with staged() as stage:
            workers = team(stage, a=[("s", 1, 640, 40)], b=[])
            workers["a"].failing = ["link"]
            scheduler = stage.scheduler()
            bus = stage.bus()
            await asyncio.sleep(2.5)
            await ask(bus, MovingRequest(paused=True))
            reply = await ask(bus, MigrateRequest(ask="x", request="s", target="b"))
            assert isinstance(reply, MigrateReply)
            assert (reply.moves[0].state, reply.moves[0].reason) == ("failed", "link")
            seen = await status(bus)
            assert [(failure.reason, failure.count) for failure in seen.failures] == [("link", 1)]
            assert scheduler.metric("mell_scheduler_migration_failures_total", reason="link") == 1

    run_virtually(main())


def test_only_the_leader_answers_operators() -> None:
    """A standby does not listen; where nobody leads there is nobody to ask."""

    async def main() -> None:
        async with staged() as stage:
            first, second = stage.scheduler("s1", lease=True), None
            await asyncio.sleep(1.0)
            second = stage.scheduler("s2", lease=True)
            bus = stage.bus()
            await asyncio.sleep(1.0)
            seen = await status(bus)
            assert seen.scheduler == "s1"
            first.stop.set()
            await first.task
            await asyncio.sleep(3.0)
            seen = await status(bus)
            assert seen.scheduler == "s2"
            second.stop.set()
            await second.task
            with pytest.raises(NoResponderError):
                await ask(bus, StatusRequest())

    run_virtually(main())


def test_a_pause_outlasts_its_leader() -> None:
    """A standby has heard of it; and of its end."""

    async def main() -> None:
        async with staged() as stage:
            first = stage.scheduler("s1", lease=True)
            await asyncio.sleep(1.0)
            second = stage.scheduler("s2", lease=True)
            await asyncio.sleep(1.0)
            bus = stage.bus()
            assert await ask(bus, MovingRequest(paused=True)) == MovingReply(paused=True)
            first.stop.set()
            await first.task
            await asyncio.sleep(3.0)
            seen = await status(bus)
            assert (seen.scheduler, seen.moves_paused) == ("s2", True)
            third = stage.scheduler("s3", lease=True)
            await asyncio.sleep(1.0)
            await ask(bus, MovingRequest(paused=False))
            second.stop.set()
            await second.task
            await asyncio.sleep(3.0)
            seen = await status(bus)
            assert (seen.scheduler, seen.moves_paused) == ("s3", False)
            third.stop.set()

    run_virtually(main())


def test_a_pause_outlasts_the_only_scheduler() -> None:
    """It is kept in the store, whose answer the next one waits for; and so is its end."""

    async def main() -> None:
        async with staged() as stage:
            bus = stage.bus()
            for number, paused in enumerate((True, True, False, False)):
                only = stage.scheduler(f"s{number}", lease=True)
                only.kept.reachable = False
                await asyncio.sleep(1.5)
                only.kept.reachable = True
                await asyncio.sleep(1.5)
                seen = await status(bus)
                assert seen.moves_paused is (number in (1, 2))
                assert await ask(bus, MovingRequest(paused=paused)) == MovingReply(paused=paused)
                only.stop.set()
                await only.task

    run_virtually(main())


def test_a_pause_is_kept_again_by_a_broker_that_has_lost_its_store() -> None:
    """The leader writes it down anew when its connection is back."""

    async def main() -> None:
        async with staged() as stage:
            only = stage.scheduler("s1", lease=True)
            await asyncio.sleep(1.0)
            await ask(stage.bus(), MovingRequest(paused=True))
            only.bus.disconnect()
            kept = stage.kept.read("moves")
            assert kept is not None
            stage.kept.replace("moves", None, kept.revision)
            only.bus.reconnect()
            await until(lambda: stage.kept.read("moves") is not None)

    run_virtually(main())


def test_a_pause_that_an_operator_ends_meanwhile_is_not_written_down_again() -> None:
    """The leader is just about to write the pause anew, after a reconnection, when it is told to go on."""

    async def main() -> None:
        bucket = MemoryBucket(LoopClock(), 1 << 60)
        store = MemoryKeyValue(bucket)
        memory = PauseMemory(MemoryBroker().connect(), SUBJECTS, store)
        read = store.read

        async def read_as_an_operator_resumes(key: str, timeout_s: float) -> Entry | None:
            entry = await read(key, timeout_s)
            store.read = read  # type: ignore[method-assign]
            await memory.keep(paused=False)
            return entry

        store.read = read_as_an_operator_resumes  # type: ignore[method-assign]
        await memory.keep_on()
        assert await memory.recall() is False
        bucket.replace("moves", None, 1)
        await memory.keep_on()
        assert await memory.recall() is True

    run_virtually(main())


def test_a_pause_that_is_not_kept_is_told_so() -> None:
    """It holds all the same, for the schedulers that run."""

    async def main() -> None:
        async with staged() as stage:
            only = stage.scheduler("s1", lease=True)
            only.kept.reachable = False
            await asyncio.sleep(1.0)
            bus = stage.bus()
            assert await ask(bus, MovingRequest(paused=True)) == MovingReply(paused=True, kept=False)
            seen = await status(bus)
            assert seen.moves_paused

    run_virtually(main())


def test_a_scheduler_that_cannot_listen_at_first_hears_pauses_later() -> None:
    """The broker was away just as it started to stand by."""

    async def main() -> None:
        async with staged() as stage:
            first = stage.scheduler("s1", lease=True)
            await asyncio.sleep(1.0)
            second = stage.scheduler("s2", lease=True)
            first.kept.reachable = second.kept.reachable = False
            second.bus.disconnect()
            await asyncio.sleep(1.5)
            second.bus.reconnect()
            await asyncio.sleep(1.5)
            bus = stage.bus()
            assert await ask(bus, MovingRequest(paused=True)) == MovingReply(paused=True, kept=False)
            first.stop.set()
            await first.task
            await asyncio.sleep(3.0)
            seen = await status(bus)
            assert (seen.scheduler, seen.moves_paused) == ("s2", True)

    run_virtually(main())


def test_a_new_leader_goes_on_with_a_drain() -> None:
    """The worker's reports say that it drains: nobody has to order it again."""

    async def main() -> None:
        async with staged() as stage:
            workers = team(stage, a=[("big", 1, 640, 40)], b=[("x", 1, 320, 20)])
            first = stage.scheduler("s1", lease=True)
            await asyncio.sleep(2.0)
            bus = stage.bus()
            reply = await ask(bus, DrainRequest(worker="b"))
            assert isinstance(reply, DrainReply)
            first.stop.set()
            await first.task
            assert workers["b"].rows, "it was still full when its leader went"
            stage.scheduler("s2", lease=True)
            await until(lambda: not workers["b"].rows)
            await asyncio.sleep(1.5)
            assert (await states(bus))["b"] == "drained"

    run_virtually(main())
