from mell_scheduler.core import Announce, AskReport, Command, ConnectionRestored
from mell_scheduler.core.status import worker_statuses
from mell_shared.messages.scheduler import WorkerJoined, WorkerLeft
from tests.scheduler.script import SECOND, Script, only_reply, placed, queued, replies, worker_report, worker_spec


def changes(commands: list[Command]) -> list[tuple[str, str]]:
    """The announcements as (worker, change)."""
    return [(c.worker, c.change) for c in commands if isinstance(c, Announce)]


def standing(script: Script) -> dict[str, str]:
    """Each worker's state in the status."""
    return {status.worker: status.state for status in worker_statuses(script.core, script.now_us)}


def test_a_worker_takes_nothing_before_its_first_report() -> None:
    """A join says what a worker is, not what it holds."""
    script = Script()
    script.join("a")
    assert script.answer("s1") is None
    assert standing(script) == {"a": "silent"}
    assert only_reply(script.report("a"), "s1") == placed("a")


def test_a_repeated_join_changes_nothing() -> None:
    """Workers announce themselves again whenever a leader asks."""
    script = Script()
    script.up("a")
    script.ask("s1")
    assert script.join("a") == []
    assert script.answer("s1") == placed("a")


def test_older_and_repeated_reports_are_dropped() -> None:
    """Reports may arrive out of order; only a higher number is news."""
    script = Script()
    script.up("a")
    spec = script.specs["a"]
    script.send(worker_report(spec, 7, ("s1", 1, 1_500, 94)))
    for number in (6, 7):
        assert script.send(worker_report(spec, number)) == []
    assert script.answer("s2") is None


def test_a_report_of_an_unknown_worker_asks_it_to_announce_itself() -> None:
    """Its join was lost, or this leader is new."""
    script = Script()
    assert script.send(worker_report(worker_spec("a"), 3)) == [AskReport("a")]
    script.join("a")
    script.send(worker_report(worker_spec("a"), 4))
    assert script.answer("s1") == placed("a")


def test_three_missed_reports_and_a_worker_gets_nothing() -> None:
    """A silent worker keeps what it has; new work goes elsewhere, until it reports again."""
    script = Script()
    script.up("a", "b")
    script.ask("s1")
    said = script.wait(3)
    assert changes(said) == []
    script.report("b")
    assert changes(script.wait(0.1)) == [("a", "silent")]
    assert standing(script) == {"a": "silent", "b": "standby"}
    assert script.answer("s2") == placed("b")
    assert changes(script.report("a", ("s1", 1, 160, 10))) == [("a", "heard")]
    assert script.answer("s3") == placed("a")


def test_a_lost_worker_is_forgotten_with_all_it_held() -> None:
    """Its sequences are their frontends' to place again."""
    script = Script(worker_lost_us=10 * SECOND)
    script.up("a")
    script.ask("s1", 1_500, 16)
    script.report("a", ("s1", 1, 1_500, 94))
    assert changes(script.wait(10))[-1] == ("a", "lost")
    assert standing(script) == {}
    script.up("b")
    assert script.answer("s1", 1_500, 16, generation=2) == placed("b")


def test_a_lost_worker_that_comes_back_is_asked_and_taken_again() -> None:
    """The network was cut, not the worker; reports from before the cut stay old."""
    script = Script(worker_lost_us=10 * SECOND)
    script.up("a")
    spec = script.specs["a"]
    script.send(worker_report(spec, 5))
    script.wait(10)
    assert script.send(worker_report(spec, 6, ("s1", 1, 160, 10))) == [AskReport("a")]
    script.join("a")
    assert script.send(worker_report(spec, 4)) == []
    assert changes(script.send(worker_report(spec, 7, ("s1", 1, 1_500, 94)))) == [("a", "heard")]
    assert script.answer("s2") is None


def test_a_worker_that_left_does_not_come_back() -> None:
    """Ids are new at every start: what still arrives from it is late."""
    script = Script()
    script.up("a")
    assert changes(script.leave("a")) == [("a", "left")]
    assert script.leave("a") == []
    assert script.report("a") == []
    assert script.join("a") == []
    assert standing(script) == {}


def test_who_left_is_remembered_for_a_minute() -> None:
    """Memory of the gone is bounded."""
    script = Script()
    script.send(WorkerLeft(worker="a", reason="never seen"))
    script.wait(59)
    assert script.join("a") == []
    script.wait(1.1)
    assert changes(script.join("a")) == [("a", "joined")]


def test_a_worker_that_speaks_another_protocol_is_refused() -> None:
    """One release apart works together; further apart is told which side to update."""
    script = Script()
    assert changes(script.send(WorkerJoined(spec=worker_spec("next", protocol=2)))) == [("next", "joined")]
    said = script.send(WorkerJoined(spec=worker_spec("far", protocol=3)))
    assert changes(said) == [("far", "refused")]
    assert isinstance(said[0], Announce)
    assert "protocol 3" in said[0].reason
    assert "far" not in standing(script)


def test_a_draining_worker_finishes_and_takes_nothing() -> None:
    """What it holds stays counted; new work goes elsewhere; it may change its mind."""
    script = Script()
    script.up("a", "b")
    script.ask("s1")
    assert changes(script.report("a", ("s1", 1, 160, 10), draining=True)) == [("a", "draining")]
    assert script.answer("s2") == placed("b")
    assert standing(script) == {"a": "draining", "b": "active"}
    assert changes(script.report("a", ("s1", 1, 161, 11))) == [("a", "undrained")]
    assert script.answer("s3", 1_300, 16) == placed("a")


def test_a_drained_worker_may_still_report_a_late_submission() -> None:
    """A frontend may submit to a worker that has just begun to drain and is empty."""
    script = Script()
    script.up("a")
    script.report("a", draining=True)
    script.report("a", ("s1", 1, 160, 10), draining=True)
    assert script.answer("s1") == placed("a")
    assert standing(script) == {"a": "draining"}
    script.report("a", draining=True)
    assert standing(script) == {"a": "drained"}


def test_silence_while_our_own_connection_is_down_does_not_count() -> None:
    """After a reconnection everybody gets the full time to be heard, and is asked."""
    script = Script()
    script.up("a")
    script.now_us += 60 * SECOND
    assert script.send(ConnectionRestored()) == [AskReport(None)]
    assert script.wait(3) == []
    assert changes(script.wait(0.1)) == [("a", "silent")]


def test_a_request_waits_while_all_workers_are_silent() -> None:
    """Silent workers may be back any moment: nothing is rejected for it."""
    script = Script()
    script.up("a")
    script.wait(4)
    script.ask("s1")
    assert replies(script.wait(0.8)) == {"s1": queued(0)}


def test_the_status_shows_what_was_reported() -> None:
    """Operators read the worker's own figures and their age."""
    script = Script()
    script.up("a")
    script.report("a", ("s1", 1, 160, 10), ("s2", 1, 16, 0), states=[0, 1], step_us=900)
    script.wait(0.5)
    (status,) = worker_statuses(script.core, script.now_us)
    assert (status.state, status.used_blocks, status.running, status.waiting) == ("active", 10, 1, 1)
    assert (status.step_us, status.kv_blocks, status.report_age_s) == (900, 100, 0.5)
