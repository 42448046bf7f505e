"""Draining by hand: what a drained worker takes, says and gives back, and whom it obeys."""

from mell_gpu_worker.core.commands import Exit, PublishEvent, SendEvicted
from mell_gpu_worker.core.events import CommandReceived, EvictionAnswered, EvictionUnanswered, StopRequested, TimePassed
from mell_shared.messages.scheduler import WorkerReport
from mell_shared.messages.worker import Drain, DrainRefused, DrainSet, Report, SubmitAccepted, SubmitRefused, Undrain

from .worlds import SECOND_US, CoreWorld, only, submit


def last_report(world: CoreWorld) -> WorkerReport:
    """What the worker told the schedulers last."""
    return [c.message for c in only(PublishEvent, world.commands) if isinstance(c.message, WorkerReport)][-1]


def test_a_draining_worker_takes_nothing_and_goes_on_serving() -> None:
    """It says so at once and in every report, refuses submissions as a stopping one does, and finishes what runs."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=6))
    assert world.ask(Drain(term=3)) == DrainSet(draining=True, sequences=1)
    assert last_report(world).draining
    refused = world.ask(submit("b"))
    assert isinstance(refused, SubmitRefused)
    assert refused.reason == "stopping"
    world.run()
    assert len(world.output("a")) == 6
    world.tell(TimePassed(), after_us=100 * SECOND_US)
    assert last_report(world).draining
    assert last_report(world).sequences == ()
    assert not only(Exit, world.commands), "it stays up"


def test_a_new_leader_hears_of_the_drain() -> None:
    """The answer to `Report` says it: nobody else has to remember."""
    world = CoreWorld()
    world.ask(Drain(term=3))
    world.tell(CommandReceived(Report()))
    assert last_report(world).draining


def test_at_the_deadline_what_is_left_is_given_back() -> None:
    """With all its output; the worker reports itself empty at once, and stays."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=30))
    world.ask(Drain(term=1, deadline_s=2.5))
    for _ in range(3):
        world.finish_step()
    assert world.core.wake_us <= world.now_us + 2_500_000
    assert not only(SendEvicted, world.tell(TimePassed(), after_us=2_499_999))
    (evicted,) = only(SendEvicted, world.tell(TimePassed(), after_us=1))
    assert (evicted.frontend, evicted.message.output_ids) == ("f1", world.output("a"))
    assert last_report(world).sequences == ()
    world.run()
    world.tell(EvictionAnswered("a", 1))
    assert world.core.batcher.pool.used_blocks == 0
    assert not only(Exit, world.commands)
    assert not only(SendEvicted, world.tell(TimePassed(), after_us=10 * SECOND_US))


def test_an_eviction_without_an_answer_is_repeated() -> None:
    """As often as when a worker leaves."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=30))
    commands = only(SendEvicted, world.tell(CommandReceived(Drain(term=1, deadline_s=0.0))))
    assert len(commands) == 1
    assert only(SendEvicted, world.tell(EvictionUnanswered("a", 1))) == commands


def test_the_last_deadline_counts() -> None:
    """A repeat sets it anew, from its own arrival; one without a deadline takes it away."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=30))
    world.ask(Drain(term=1, deadline_s=5.0))
    world.now_us += 4 * SECOND_US
    world.ask(Drain(term=1, deadline_s=5.0))
    assert not only(SendEvicted, world.tell(TimePassed(), after_us=4 * SECOND_US))
    world.ask(Drain(term=1))
    assert not only(SendEvicted, world.tell(TimePassed(), after_us=50 * SECOND_US))


def test_undrained_it_takes_work_again() -> None:
    """And says so at once; the deadline is off."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=30))
    world.ask(Drain(term=1, deadline_s=5.0))
    assert world.ask(Undrain(term=1)) == DrainSet(draining=False, sequences=1)
    assert not last_report(world).draining
    assert isinstance(world.ask(submit("b", b"other")), SubmitAccepted)
    assert not only(SendEvicted, world.tell(TimePassed(), after_us=9 * SECOND_US))


def test_only_the_newest_leader_is_obeyed() -> None:
    """A lower term is refused, and told the highest known; nothing changes."""
    world = CoreWorld()
    world.ask(Undrain(term=7))
    refused = world.ask(Drain(term=6))
    assert isinstance(refused, DrainRefused)
    assert (refused.reason, refused.term) == ("term", 7)
    assert not world.core.draining
    assert world.ask(Drain(term=8)) == DrainSet(draining=True, sequences=0)
    assert isinstance(world.ask(Undrain(term=7)), DrainRefused)
    assert world.core.draining


def test_a_worker_that_stops_cannot_be_told_otherwise() -> None:
    """It drains already, and leaves when it is empty."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=30))
    world.tell(StopRequested())
    for order in (Undrain(term=1), Drain(term=1)):
        refused = world.ask(order)
        assert isinstance(refused, DrainRefused)
        assert refused.reason == "stopping"
    assert world.core.draining


def test_a_drained_worker_can_be_stopped() -> None:
    """Being drained does not keep it from leaving."""
    world = CoreWorld()
    world.ask(Drain(term=1))
    assert only(Exit, world.tell(StopRequested())) == [Exit()]
