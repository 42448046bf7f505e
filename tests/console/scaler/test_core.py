import pytest

from mell_console.scaler.values import DrainWorker, StartWorkers, UndrainWorker
from tests.console.scaler.world import World, quick, starts, stops, texts


def test_more_are_started_once_they_have_been_wanted_for_a_while() -> None:
    """Not at the first status that wants them; then as many as are wanted, by the lowest free numbers."""
    world = World()
    world.wanted = 3
    assert starts(world.second()) == []
    assert starts(world.second()) == [StartWorkers(3, ("worker-2", "worker-3"))]
    assert starts(world.second(5)) == []
    assert sorted(world.workers) == ["worker-1", "worker-2", "worker-3"]


def test_what_is_wanted_for_a_moment_only_changes_nothing() -> None:
    """Wishes that come and go within the time for more, and for fewer, are not followed."""
    world = World(workers=2)
    for _ in range(10):
        world.wanted = 3
        assert world.second() == []
        world.wanted = 1
        assert world.second(4) == []


def test_there_are_never_more_or_fewer_than_the_limits_say() -> None:
    """A wish beyond them is cut; below the least, workers are started without delay."""
    world = World(quick(least=2, most=3), workers=0)
    world.wanted = None
    assert starts(world.second()) == [StartWorkers(2, ("worker-1", "worker-2"))]
    world.wanted = 9
    assert [order.count for order in starts(world.second(10))] == [3]
    world.wanted = 0
    world.second(60)
    assert len(world.workers) == 2


def test_spare_workers_are_kept_beyond_the_wish() -> None:
    """With one spare there is always one more than wanted, up to the most."""
    world = World(quick(spare=1))
    world.second(5)
    assert len(world.workers) == 2
    world.wanted = 4
    world.second(5)
    assert len(world.workers) == 4


def test_a_worker_goes_drained_first_and_only_when_empty() -> None:
    """The latest empty one is asked to drain, seen drained and empty, stopped; then the others' turn comes."""
    world = World(workers=3)
    world.workers["worker-3"].held = 1
    world.wanted = 1
    assert stops(world.second(5)) == []
    drains = [command for command in world.second() if isinstance(command, DrainWorker)]
    assert [drain.worker for drain in drains] == [world.workers["worker-2"].worker]
    assert stops(world.second()) == ["worker-2"]
    world.workers["worker-3"].held = 0
    assert stops(world.second(20)) == ["worker-3"]
    assert stops(world.second(20)) == []
    assert world.core.count == 1


def test_nothing_is_stopped_soon_after_a_start_or_a_stop() -> None:
    """The cool-down counts from the last change, whichever it was."""
    world = World(quick(down_us=0, cooldown_us=10_000_000))
    world.wanted = 3
    world.second(3)
    world.wanted = 1
    assert stops(world.second(9)) == []
    assert stops(world.second(3)) == ["worker-3"]
    assert stops(world.second(9)) == []
    assert stops(world.second(5)) == ["worker-2"]


def test_a_worker_that_got_work_just_before_it_heard_stays() -> None:
    """The scheduler placed on it while the order to drain was under way: it is used again, and not stopped."""
    world = World(workers=2)
    world.second(5)
    drained = [command.worker for command in world.second() if isinstance(command, DrainWorker)]
    busy = world.by_id(drained[0])
    assert busy is not None
    busy.held = 1
    said = world.second()
    assert UndrainWorker(busy.worker) in said
    assert "got work in between" in texts(said)
    assert stops(world.second(30)) == ["worker-1"]  # the one that is empty now
    assert not busy.draining


def test_a_worker_being_drained_is_used_again_when_more_are_wanted() -> None:
    """That is quicker than a start, and no worker is started in its place."""
    world = World(quick(order="last"), workers=2)
    world.workers["worker-2"].held = 1
    world.second(8)
    assert world.workers["worker-2"].draining
    world.wanted = 2
    said = world.second(5)
    assert not world.workers["worker-2"].draining
    assert starts(said) == []


def test_the_last_one_is_emptied_where_a_count_decides_who_goes() -> None:
    """With `last` the highest number is drained though it works, and stopped when it is empty, never before."""
    world = World(quick(order="last"), workers=3)
    world.workers["worker-3"].held = 2
    assert stops(world.second(30)) == []
    assert world.workers["worker-3"].draining
    world.workers["worker-3"].held = 0
    assert stops(world.second()) == ["worker-3"]


def test_a_failed_start_is_told_and_tried_again_later_and_later() -> None:
    """Five seconds, ten, twenty; when it works the wish is met."""
    world = World()
    world.wanted, world.start_fails = 2, "no GPU is left"
    times_s = []
    for second in range(1, 60):
        said = world.second()
        if starts(said):
            times_s.append(second)
            assert "starting failed: no GPU is left" in texts(said)
    assert times_s == [2, 7, 17, 37]
    world.start_fails = ""
    world.second(60)
    assert sorted(world.workers) == ["worker-1", "worker-2"]


def test_a_worker_that_does_not_appear_is_asked_for_again_under_the_same_count() -> None:
    """After the time that a start may take, and not started twice in the meantime."""
    world = World()
    world.wanted, world.starts_late = 2, True
    world.second(2)
    world.core.start_ended(0, "", world.now_us)  # the script says yes, and nothing comes
    world.orders.clear()
    assert starts(world.second(19)) == []
    said = world.second(2)
    assert starts(said) == [StartWorkers(2, ("worker-2",))]
    assert "1 of 2 workers not seen" in texts(said)


def test_a_death_is_its_supervisors_business() -> None:
    """Neither a silent worker nor its next incarnation changes the number, and nothing is stopped meanwhile."""
    world = World(workers=3)
    world.wanted = 3
    world.second(3)
    world.workers["worker-2"].up = False
    world.wanted = 1
    assert world.second(15) == []
    world.restart("worker-2")
    world.wanted = 3
    assert world.second(15) == []
    assert world.core.count == 3


def test_a_new_leader_neither_starts_nor_stops() -> None:
    """While it may not know everybody nothing is done, and what was wanted before the change does not count."""
    world = World(workers=3)
    world.second(4)
    world.settled = False
    world.wanted = 0
    assert world.second(8) == []
    world.settled, world.wanted = True, 3
    assert world.second(4) == []
    world.settled = False
    world.second(4)
    world.settled, world.wanted = True, 4
    assert starts(world.second(5)) == [StartWorkers(4, ("worker-4",))]


def test_a_leader_change_in_the_middle_of_a_start_starts_nothing_twice() -> None:
    """The worker on its way is remembered here, not by the leader."""
    world = World()
    world.wanted, world.starts_late = 2, True
    assert len(starts(world.second(2))) == 1
    world.settled = False
    world.second(3)
    world.settled = True
    assert starts(world.second(10)) == []
    world.carry_out_starts()
    world.second(10)
    assert len(world.workers) == 2


def test_an_operators_drain_is_left_alone_and_made_up_for() -> None:
    """It is neither stopped nor undrained; another takes its place if the limits allow."""
    world = World(workers=2)
    world.wanted = 2
    world.second(2)
    world.workers["worker-2"].draining = True
    said = world.second(5)
    assert "drained by an operator" in texts(said)
    assert [order.names for order in starts(said)] == [("worker-3",)]
    world.wanted = 1
    assert stops(world.second(40)) == ["worker-3"]
    assert world.workers["worker-2"].draining


def test_a_lost_order_to_undrain_is_repeated() -> None:
    """A worker that is to stay, and has not heard it, is told again, though it looks like an operator's drain."""
    world = World(quick(order="last"), workers=2)
    world.workers["worker-2"].held = 1
    world.second(8)
    world.deaf, world.wanted = True, 2
    assert "stays" in texts(world.second(3))
    assert world.workers["worker-2"].draining
    world.deaf = False
    said = world.second(4)
    assert not world.workers["worker-2"].draining
    assert "operator" not in texts(world.log)
    assert starts(said) == []


def test_a_lost_order_to_drain_is_repeated() -> None:
    """Until the status shows its effect."""
    world = World(workers=2)
    world.deaf = True
    said = world.second(12)
    assert len([command for command in said if isinstance(command, DrainWorker)]) >= 3
    assert stops(said) == []
    world.deaf = False
    world.second(2)
    assert any(worker.draining for worker in world.workers.values()) or len(world.workers) == 1


def test_a_stop_that_fails_is_told_and_the_worker_is_used_again() -> None:
    """It is not tried again at once, and not lost from the count."""
    world = World(workers=2)
    world.stop_fails = "the script is broken"
    said = world.second(8)
    assert stops(said) == ["worker-2"]
    assert "the script is broken" in texts(said)
    world.second(2)
    assert not world.workers["worker-2"].draining
    assert world.core.count == 2
    world.stop_fails = ""
    assert stops(world.second(40)) == ["worker-2"]


def test_a_worker_that_ignores_its_end_is_used_again() -> None:
    """The script says yes and the worker stays: after a while it is undrained, and counted."""
    world = World(workers=2)
    second = world.workers["worker-2"]
    said = world.second(7)
    assert stops(said) == ["worker-2"]
    world.workers["worker-2"] = second
    said = world.second(14)
    assert "still there after 10 s" in texts(said)
    assert not second.draining
    assert world.core.count == 2


def test_a_scaler_that_stops_leaves_nothing_drained() -> None:
    """Nobody else would undrain what it had begun to empty."""
    world = World(quick(order="last"), workers=2)
    world.workers["worker-2"].held = 1
    world.second(8)
    assert world.workers["worker-2"].draining
    world.end()
    assert not world.workers["worker-2"].draining
    assert world.end() == []


@pytest.mark.parametrize("name", ["gpu", "worker"])
def test_new_names_are_free_ones(name: str) -> None:
    """Numbers that are taken, by whomever, are passed over."""
    world = World(quick(name=name), workers=1)
    world._begin(f"{name}-3")
    world.wanted = 4
    assert starts(world.second(3)) == [StartWorkers(4, (f"{name}-2", f"{name}-4"))]
