import asyncio
import time

import pytest
from structlog.testing import capture_logs

from mell_shared.actor import Actor
from mell_shared.testing import run_virtually


async def test_items_are_handled_in_order_and_one_at_a_time() -> None:
    """The next item waits until `handle` has returned, however long it takes; stopping handles what waits."""
    begun: list[int] = []
    ended: list[int] = []

    async def handle(item: int) -> None:
        begun.append(item)
        await asyncio.sleep(0)
        ended.append(item)
        assert begun == ended

    actor = Actor("a", handle)
    for item in range(100):
        assert actor.post(item)
    actor.stop()
    await actor.run()
    assert ended == list(range(100))


async def test_a_full_mailbox_drops_and_counts_posts() -> None:
    """`post` says False and counts, and what was there stays."""
    handled: list[int] = []

    async def handle(item: int) -> None:
        handled.append(item)

    actor = Actor("a", handle, max_items=2)
    assert [actor.post(item) for item in range(4)] == [True, True, False, False]
    assert actor.dropped == 2
    actor.stop()
    actor.stop()
    await actor.run()
    assert handled == [0, 1]


async def test_what_must_not_be_lost_gets_into_a_full_mailbox() -> None:
    """In its turn, behind what waits; the next post is still dropped."""
    handled: list[int] = []

    async def handle(item: int) -> None:
        handled.append(item)

    actor = Actor("a", handle, max_items=2)
    for item in (0, 1):
        assert actor.post(item)
    actor.post_anyway(2)
    assert not actor.post(3)
    assert actor.dropped == 1
    actor.stop()
    await actor.run()
    assert handled == [0, 1, 2]


async def test_put_waits_for_room() -> None:
    """`put` loses nothing in a small mailbox, from several tasks at once."""
    handled: list[int] = []

    async def handle(item: int) -> None:
        handled.append(item)
        await asyncio.sleep(0)

    actor = Actor("a", handle, max_items=2)

    async def fill(start: int) -> None:
        for item in range(start, start + 50):
            await actor.put(item)

    running = asyncio.create_task(actor.run())
    await asyncio.gather(fill(0), fill(100), fill(200))
    actor.stop()
    await running
    assert sorted(handled) == [*range(50), *range(100, 150), *range(200, 250)]
    assert actor.dropped == 0


async def test_a_busy_actor_lets_others_run() -> None:
    """A long backlog whose handler never waits does not hold the event loop until its end."""
    handled = 0
    seen: list[int] = []

    async def handle(_item: int) -> None:
        nonlocal handled
        handled += 1

    async def look() -> None:
        while handled < 1000:
            seen.append(handled)
            await asyncio.sleep(0)

    actor = Actor("a", handle)
    for item in range(1000):
        actor.post(item)
    actor.stop()
    await asyncio.gather(actor.run(), look())
    assert len(seen) > 10


async def test_a_handler_s_exception_is_logged_and_raised() -> None:
    """A bug leaves `run`, with one log event that holds its traceback; the tasks beside it are cancelled."""
    cancelled = asyncio.Event()

    async def handle(_item: int) -> None:
        raise ZeroDivisionError("bug")

    async def beside() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    actor = Actor("kitchen", handle)

    def started() -> None:
        actor.spawn(beside())
        asyncio.get_running_loop().call_soon(actor.post, 1)

    with capture_logs() as logs, pytest.raises(ExceptionGroup) as caught:
        await actor.run(started)
    assert caught.group_contains(ZeroDivisionError, match="bug")
    assert cancelled.is_set()
    (logged,) = logs
    assert (logged["event"], logged["actor"], logged["log_level"]) == ("actor_failed", "kitchen", "error")


async def test_a_spawned_task_s_exception_ends_the_actor() -> None:
    """Work beside the loop is no place to lose a bug."""

    async def handle(_item: int) -> None:
        return

    async def broken() -> None:
        raise ZeroDivisionError

    actor = Actor("a", handle)
    with capture_logs(), pytest.raises(ExceptionGroup) as caught:
        await actor.run(lambda: actor.spawn(broken()))
    assert caught.group_contains(ZeroDivisionError)


async def test_stopping_cancels_spawned_work() -> None:
    """A clean stop raises nothing and leaves no task."""
    ended = asyncio.Event()

    async def handle(_item: int) -> None:
        return

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    actor = Actor("a", handle)
    running = asyncio.create_task(actor.run(lambda: actor.spawn(endless())))
    await asyncio.sleep(0)
    actor.stop()
    await running
    assert ended.is_set()


async def test_work_for_a_stopped_actor_is_not_begun() -> None:
    """A late delivery that spawns after the stop disturbs nothing; spawning before the start is a bug."""

    async def handle(_item: int) -> None:
        return

    async def late() -> None:
        raise ZeroDivisionError

    actor = Actor("a", handle)
    work = late()
    with pytest.raises(AssertionError):
        actor.spawn(work)
    work.close()
    actor.stop()
    await actor.run()
    actor.spawn(late())


def test_ticks_come_at_their_interval_and_are_not_made_up_for() -> None:
    """`every` posts at once and then on time; after a stall it goes on without a burst."""
    ticks: list[float] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def handle(at_s: float) -> None:
            ticks.append(at_s)
            if len(ticks) == 3:
                await asyncio.sleep(10)  # the actor stalls; the mailbox of one item misses ticks

        actor = Actor("a", handle, max_items=1)
        loop.call_later(14.5, actor.stop)
        await actor.run(lambda: actor.every(1.0, loop.time))

    run_virtually(scenario())
    assert ticks == [0.0, 1.0, 2.0, 3.0, 13.0, 14.0]


async def test_a_standstill_is_told_before_the_next_tick() -> None:
    """Where somebody wants to know."""
    told: list[str] = []

    async def handle(item: str) -> None:
        told.append(item)
        if len(told) == 1:
            time.sleep(1.1)  # noqa: ASYNC251 - as if the process were stopped
        elif len(told) == 3:
            actor.stop()

    actor = Actor("a", handle)
    await actor.run(lambda: actor.every(0.01, lambda: "tick", lambda: "stood still"))
    assert told[:3] == ["tick", "stood still", "tick"]
