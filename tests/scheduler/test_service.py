import asyncio
from pathlib import Path

import pytest

from mell_scheduler.core import Reply
from mell_scheduler.core.journal import replay
from mell_shared.bus import NoResponderError, RequestTimeoutError
from mell_shared.codec import decode, encode
from mell_shared.messages.admin import ADMIN_REPLY, AdminRefused, StatusRequest
from mell_shared.messages.scheduler import SequenceFinished, WorkerLeft
from mell_shared.process import StartError
from mell_shared.testing import run_virtually
from tests.scheduler.script import place_request, placed, queued
from tests.scheduler.stage import SUBJECTS, place, staged, status, until


def test_a_frontend_gets_a_worker() -> None:
    """From the bus through the core and back."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            stage.scheduler()
            await asyncio.sleep(0.5)
            assert await place(stage.bus(), place_request("s1")) == placed("w1")

    run_virtually(main())


def test_a_request_before_the_worker_is_held_for_it() -> None:
    """The reply comes as soon as there is room, within the request's time."""

    async def main() -> None:
        async with staged() as stage:
            stage.scheduler()
            await asyncio.sleep(0.5)
            asked = asyncio.create_task(place(stage.bus(), place_request("s1")))
            await asyncio.sleep(0.3)
            stage.worker("w1")
            assert await asked == placed("w1")

    run_virtually(main())


def test_without_room_the_answer_comes_within_a_second() -> None:
    """A frontend that waits two seconds always hears in time."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1", kv_blocks=10)
            stage.scheduler()
            await asyncio.sleep(0.5)
            bus = stage.bus()
            assert await place(bus, place_request("s1", 100, 16)) == placed("w1")
            asked_s = stage.clock.now_us()
            assert await place(bus, place_request("s2", 100, 16)) == queued(0)
            assert stage.clock.now_us() - asked_s <= 1_000_000

    run_virtually(main())


def test_an_end_makes_room_at_once() -> None:
    """Events of workers reach the core."""

    async def main() -> None:
        async with staged() as stage:
            worker = stage.worker("w1", kv_blocks=10)
            stage.scheduler()
            await asyncio.sleep(0.5)
            bus = stage.bus()
            await place(bus, place_request("s1", 100, 16))
            asked = asyncio.create_task(place(bus, place_request("s2", 100, 16)))
            await asyncio.sleep(0.1)
            await worker.tell(SequenceFinished(worker="w1", sequence="s1", generation=1, reason="stop"))
            assert await asked == placed("w1")
            await worker.tell(WorkerLeft(worker="w1", reason="stopped"))
            await asyncio.sleep(0.1)
            assert (await status(bus)).workers == ()

    run_virtually(main())


def test_a_worker_whose_join_was_lost_is_asked_by_name() -> None:
    """A report of a stranger leads to its announcement."""

    async def main() -> None:
        async with staged() as stage:
            stage.scheduler()
            await asyncio.sleep(0.5)
            stage.worker("w1")
            await asyncio.sleep(0.1)
            assert [w.worker for w in (await status(stage.bus())).workers] == ["w1"]

    run_virtually(main())


def test_the_status_counts_what_was_decided() -> None:
    """Operators see workers, queue and totals."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            stage.scheduler(policy="first-fit")
            await asyncio.sleep(8)
            bus = stage.bus()
            await place(bus, place_request("s1"))
            await place(bus, place_request("s2", 5_000, 16))
            await place(bus, place_request("s3", model="other"))
            answer = await status(bus)
            assert (answer.scheduler, answer.policy, answer.queued) == ("s1", "first-fit", 0)
            assert (answer.placed, answer.rejected) == (1, 2)
            assert [(w.worker, w.state, w.kv_blocks) for w in answer.workers] == [("w1", "active", 100)]

    run_virtually(main())


def test_the_status_says_whether_everybody_should_be_known() -> None:
    """Not so in the first two report intervals of a leader: whoever counts workers waits for it."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            stage.scheduler()
            await asyncio.sleep(1.5)
            bus = stage.bus()
            assert not (await status(bus)).settled
            await asyncio.sleep(1.0)
            assert (await status(bus)).settled

    run_virtually(main())


@pytest.mark.parametrize(
    ("data", "fault"),
    [(b"\xc1", "malformed"), (b"", "malformed"), (b"\x81\xa4kind\xa5place", "malformed"), (b"x" * 70_000, "oversized")],
    ids=["not msgpack", "empty", "fields missing", "oversized"],
)
def test_a_place_request_that_cannot_be_read_is_dropped(data: bytes, fault: str) -> None:
    """It is counted, gets no reply, and disturbs nobody."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            scheduler = stage.scheduler()
            await asyncio.sleep(0.5)
            bus = stage.bus()
            with pytest.raises(RequestTimeoutError):
                await bus.request(SUBJECTS.place, data, 1.0)
            assert scheduler.metric("mell_scheduler_dropped_messages_total", fault=fault) == 1
            assert await place(bus, place_request("s1")) == placed("w1")

    run_virtually(main())


def test_messages_that_cannot_be_read_are_dropped() -> None:
    """Rubbish, giants, ids that are no subject tokens and questions without a reply subject are counted, no more."""

    async def main() -> None:
        async with staged(max_payload=16 * 2**20) as stage:
            worker = stage.worker("w1")
            scheduler = stage.scheduler()
            await asyncio.sleep(0.5)
            bus = stage.bus()
            for data in (b"\xff\xff", b"0" * (8 * 2**20 + 1), encode(WorkerLeft(worker="w1.>", reason=""))):
                await bus.publish(SUBJECTS.scheduler_events, data)
            await bus.publish(SUBJECTS.place, encode(place_request("nobody listens")))
            await bus.publish(SUBJECTS.admin("status"), encode(StatusRequest()))
            refused = decode(ADMIN_REPLY, await bus.request(SUBJECTS.admin("status"), b"\xff", 1.0))
            assert isinstance(refused, AdminRefused)
            assert refused.reason == "invalid"
            await asyncio.sleep(0.1)
            for fault, count in {"malformed": 2, "oversized": 1, "bad_id": 1, "no_reply_subject": 2}.items():
                assert scheduler.metric("mell_scheduler_dropped_messages_total", fault=fault) == count
            assert [w.worker for w in (await status(bus)).workers] == [worker.spec.worker]

    run_virtually(main())


def test_metrics_tell_the_state() -> None:
    """Counters and gauges follow the core."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1").rows = [("old", 1, 160, 10)]
            stage.worker("w2")
            scheduler = stage.scheduler()
            await asyncio.sleep(8)
            bus = stage.bus()
            await place(bus, place_request("s1"))
            await place(bus, place_request("s2", 1_590, 10))
            await place(bus, place_request("s3", 1_590, 10))
            await place(bus, place_request("s4", 9_999, 10))
            await until(lambda: scheduler.metric("mell_scheduler_queued_total") == 1)
            assert scheduler.metric("mell_scheduler_leads") == 1
            assert scheduler.metric("mell_scheduler_placed_total") == 2
            assert scheduler.metric("mell_scheduler_rejected_total", reason="too_large") == 1
            assert scheduler.metric("mell_scheduler_queue_length") == 1
            assert scheduler.metric("mell_scheduler_sequences") == 3
            assert scheduler.metric("mell_scheduler_workers", state="active") == 2
            assert scheduler.metric("mell_scheduler_workers", state="silent") == 0
            assert scheduler.metric("mell_scheduler_kv_blocks", model="m") == 200
            assert scheduler.metric("mell_scheduler_kv_blocks_used", model="m") == 10
            assert scheduler.metric("mell_scheduler_decision_seconds_count", event="PlaceRequested") == 4

    run_virtually(main())


def test_a_stop_answers_who_waits_and_ends_listening() -> None:
    """Nobody is left to time out; the next request finds no scheduler."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1", kv_blocks=10)
            scheduler = stage.scheduler()
            await asyncio.sleep(0.5)
            bus = stage.bus()
            await place(bus, place_request("s1", 100, 16))
            asked = asyncio.create_task(place(bus, place_request("s2", 100, 16)))
            await asyncio.sleep(0.1)
            scheduler.stop.set()
            assert await asked == queued(0)
            await scheduler.task
            with pytest.raises(NoResponderError):
                await place(bus, place_request("s3"))

    run_virtually(main())


def test_our_own_disconnection_costs_no_worker() -> None:
    """While nothing can be heard no time passes for workers; afterwards they are asked and found."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            scheduler = stage.scheduler()
            await asyncio.sleep(0.5)
            scheduler.bus.disconnect()
            await asyncio.sleep(60)
            assert not scheduler.service.healthy
            assert scheduler.metric("mell_scheduler_workers", state="active") == 0
            assert scheduler.metric("mell_scheduler_workers", state="standby") == 1
            scheduler.bus.reconnect()
            assert await place(stage.bus(), place_request("s1")) == placed("w1")

    run_virtually(main())


def test_two_schedulers_have_one_leader() -> None:
    """Only the holder of the lease listens."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            first = stage.scheduler("first", lease=True)
            await asyncio.sleep(0.2)
            second = stage.scheduler("second", lease=True)
            await asyncio.sleep(30)
            assert (first.contest.leads(), second.contest.leads()) == (True, False)
            assert (await status(stage.bus())).scheduler == "first"
            assert second.metric("mell_scheduler_leads") == 0

    run_virtually(main())


def test_a_stopped_leader_hands_over_within_a_second() -> None:
    """The lease is given back; the next one rebuilds its state from the workers and goes on."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1").rows = [("old", 1, 1_280, 80)]
            first = stage.scheduler("first", lease=True)
            await asyncio.sleep(0.2)
            second = stage.scheduler("second", lease=True)
            await asyncio.sleep(5)
            first.stop.set()
            await first.task
            await until(second.contest.leads, 1.5)
            await asyncio.sleep(0.1)
            bus = stage.bus()
            assert await place(bus, place_request("s1")) == queued(0)
            assert await place(bus, place_request("s2", 16, 1, priority=1)) == placed("w1")

    run_virtually(main())


def test_a_killed_leader_is_replaced_when_its_lease_expires() -> None:
    """Nobody gives the lease back; five seconds and a look later another leads, in a higher term."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            first = stage.scheduler("first", lease=True)
            await asyncio.sleep(0.2)
            second = stage.scheduler("second", lease=True)
            await asyncio.sleep(5)
            first.bus.disconnect()
            first.task.cancel()
            await until(second.contest.leads, 8.0)
            await asyncio.sleep(0.1)
            assert await place(stage.bus(), place_request("s1")) == placed("w1")

    run_virtually(main())


def test_a_leader_cut_from_the_store_stops_before_another_begins() -> None:
    """It still hears frontends, but decides nothing; when it is back it stands by."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            first = stage.scheduler("first", lease=True)
            await asyncio.sleep(0.2)
            second = stage.scheduler("second", lease=True)
            await asyncio.sleep(5)
            first.store.reachable = False
            while not second.contest.leads():
                await asyncio.sleep(0.01)
                assert not (first.contest.leads() and second.contest.leads())
            await until(lambda: first.metric("mell_scheduler_leads") == 0)
            first.store.reachable = True
            await asyncio.sleep(10)
            assert (first.contest.leads(), second.contest.leads()) == (False, True)
            assert (await status(stage.bus())).scheduler == "second"
            assert await place(stage.bus(), place_request("s1")) == placed("w1")

    run_virtually(main())


def test_a_leader_that_begins_while_the_bus_is_down_listens_later() -> None:
    """Subscribing is tried again until it works."""

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1")
            scheduler = stage.scheduler(lease=True)
            scheduler.bus.disconnect()
            await asyncio.sleep(3)
            scheduler.bus.reconnect()
            await asyncio.sleep(0.5)
            assert await place(stage.bus(), place_request("s1")) == placed("w1")

    run_virtually(main())


def test_a_store_that_does_not_answer_at_start_is_said_so() -> None:
    """A scheduler that could never lead does not pretend to stand by."""

    async def main() -> None:
        async with staged() as stage:
            scheduler = stage.scheduler(lease=True)
            scheduler.store.reachable = False
            with pytest.raises(StartError, match="no answer"):
                await scheduler.task
            stage.tasks.clear()

    with pytest.raises(ExceptionGroup) as raised:
        run_virtually(main())
    assert raised.group_contains(StartError)


def test_a_logged_run_replays_to_the_same_replies(tmp_path: Path) -> None:
    """The event log is all it takes to see every decision again."""
    path = tmp_path / "events.jsonl"
    answers = {}

    async def main() -> None:
        async with staged() as stage:
            stage.worker("w1", kv_blocks=20)
            stage.worker("w2", kv_blocks=20)
            scheduler = stage.scheduler(event_log=path)
            await asyncio.sleep(0.5)
            bus = stage.bus()
            for number in range(6):
                name = f"s{number}"
                answers[name] = await place(bus, place_request(name, 120, 16))
            scheduler.stop.set()
            await scheduler.task

    run_virtually(main())
    replayed = [c for _, _, commands in replay(path.read_text().splitlines()) for c in commands]
    assert {c.sequence: c.reply for c in replayed if isinstance(c, Reply)} == answers
    assert len(answers) == 6
