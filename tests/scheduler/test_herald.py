"""What the scheduler tells other systems of what its core decides and sees: each thing once."""

from mell_scheduler.core import Command, Event
from mell_scheduler.herald import Herald
from mell_shared.events.data import (
    EventData,
    GpusWanted,
    MigrationFailed,
    RequestMigrated,
    RequestPlaced,
    SchedulerState,
    WorkerEvent,
    WorkerJoined,
    WorkerLost,
)
from tests.scheduler.script import SECOND, Script
from tests.scheduler.test_core_moves import Packed


class Heard(Script):
    """A scripted cluster whose events are told."""

    told: list[EventData]
    herald: Herald | None = None

    def send(self, event: Event) -> list[Command]:
        """Give the core an event, and the herald what came of it."""
        if self.herald is None:
            self.told = []
            self.herald = Herald(self.told.append, "best-fit")
            self.herald.begin(self.core, 7)
        commands = super().send(event)
        self.herald.tell(event, commands)
        return commands

    def heard(self) -> list[EventData]:
        """What was told since the last call."""
        said, self.told[:] = list(self.told), []
        return said

    def of_workers(self) -> list[str]:
        """The same of workers: who did what."""
        return [f"{event.worker} {event.TYPE[7:]}" for event in self.heard() if isinstance(event, WorkerEvent)]


class HeardMoves(Heard, Packed):
    """The scene of moves, told."""


def test_a_leader_begins_with_the_state() -> None:
    """It knows nothing yet; later it tells what it knows."""
    scene = Heard()
    scene.up("a")
    first, *_ = scene.heard()
    assert first == SchedulerState(term=7, policy="best-fit", workers=(), models=(), queued=0, sequences=0, migrating=0)
    scene.ask("s")
    assert scene.herald is not None
    state = scene.herald.state()
    assert state is not None
    assert (state.sequences, [(w.worker, w.state, w.sequences) for w in state.workers]) == (1, [("a", "active", 1)])
    scene.herald.end()
    assert scene.herald.state() is None


def test_a_placement_is_told_once() -> None:
    """With who asked and how long it waited; the same ask again places nothing, a new generation does."""
    scene = Heard()
    scene.up("a", "b")
    scene.heard()
    scene.ask("s", request_id="mine", waited_s=2.5)
    scene.now_us += 1
    scene.ask("s", request_id="mine", waited_s=2.5)
    placed = [event for event in scene.heard() if isinstance(event, RequestPlaced)]
    assert placed == [
        RequestPlaced(
            sequence="s", request_id="mine", model="m", worker="a", generation=1, prompt_tokens=160, waited_s=2.5
        )
    ]
    scene.ask("s", generation=2, excluded=("a",))
    (again,) = [event for event in scene.heard() if isinstance(event, RequestPlaced)]
    assert (again.worker, again.generation) == ("b", 2)


def test_who_waited_is_told_when_placed() -> None:
    """The cause is another's end, not an ask."""
    scene = Heard()
    scene.up("a", kv_blocks=12)
    scene.ask("first")
    scene.ask("second", request_id="two")
    scene.heard()
    scene.now_us += SECOND // 2
    scene.finish("a", "first")
    (event,) = [event for event in scene.heard() if isinstance(event, RequestPlaced)]
    assert (event.sequence, event.request_id, event.worker) == ("second", "two", "a")


def test_a_worker_is_told_from_joining_to_leaving() -> None:
    """Each change of its standing, once."""
    scene = Heard()
    scene.up("a")
    (joined,) = [event for event in scene.heard() if isinstance(event, WorkerJoined)]
    assert (joined.worker, joined.model, joined.host, joined.kv_blocks) == ("a", "m", "host", 100)
    scene.ask("s")
    scene.ask("t")
    assert scene.of_workers() == ["a active"]
    scene.report("a", ("s", 1, 160, 10), ("t", 1, 160, 10))
    scene.finish("a", "s")
    assert scene.of_workers() == []
    scene.finish("a", "t")
    assert scene.of_workers() == ["a standby"]
    scene.ask("u")
    scene.report("a", ("u", 1, 160, 10), draining=True)
    scene.report("a", draining=True)
    assert scene.of_workers() == ["a active", "a draining", "a drained"]
    scene.report("a")
    scene.leave("a")
    assert scene.of_workers() == ["a standby", "a left"]


def test_a_worker_that_has_not_reported_yet_is_not_told_silent() -> None:
    """Nor a stranger that was lost and joins again."""
    scene = Heard()
    scene.up("a")
    assert scene.of_workers() == ["a joined", "a standby"]
    scene.wait(12)
    assert scene.of_workers() == ["a silent", "a lost"]
    scene.up("a")
    assert scene.of_workers() == ["a joined", "a standby"]


def test_a_worker_that_falls_silent_is_told_lost_in_the_end() -> None:
    """Silent after three reports, lost after ten seconds; when it speaks again it is back."""
    scene = Heard()
    scene.up("a", "b")
    scene.heard()
    for _ in range(12):
        scene.wait(1)
        scene.report("b")
    events = scene.heard()
    assert [f"{e.worker} {e.TYPE}" for e in events if isinstance(e, WorkerEvent)] == [
        "a worker.silent",
        "a worker.lost",
    ]
    (lost,) = [event for event in events if isinstance(event, WorkerLost)]
    assert lost.reason.startswith("no report for 10")


def test_a_silent_worker_that_reports_is_told_to_be_back() -> None:
    """Its standing is what it was."""
    scene = Heard()
    scene.up("a")
    scene.wait(4)
    scene.heard()
    scene.report("a")
    assert scene.of_workers() == ["a standby"]


def test_gpus_wanted_are_told() -> None:
    """When they change."""
    scene = HeardMoves(modes=())
    for _ in range(3):
        scene.second()
    assert [event for event in scene.heard() if isinstance(event, GpusWanted)] == [GpusWanted(model="m", gpus=2)]


def test_a_move_is_told_with_what_it_cost() -> None:
    """And its source, now empty, stands by."""
    scene = HeardMoves()
    order = scene.order()
    scene.heard()
    scene.commit(order, copied_bytes=1_000, copy_us=2_000, stopped_us=3_000)
    migrated, standby = scene.heard()
    assert isinstance(migrated, RequestMigrated)
    assert (migrated.sequence, migrated.model, migrated.source, migrated.target) == ("small", "m", "b", "a")
    assert (migrated.mode, migrated.cause) == ("kv", "consolidate")
    assert (migrated.copied_bytes, migrated.copy_s, migrated.stopped_s) == (1_000, 0.002, 0.003)
    assert migrated.predicted_s == order.predicted_us / 1e6
    assert (standby.TYPE, standby.about) == ("worker.standby", "b")


def test_a_failed_move_is_told_with_one_word_why() -> None:
    """The workers' own words, which may hold anything, are left out."""
    scene = HeardMoves()
    order = scene.order()
    scene.heard()
    scene.fail(order, "no_room")
    (failed,) = scene.heard()
    assert isinstance(failed, MigrationFailed)
    assert (failed.sequence, failed.outcome, failed.reason) == ("small", "failed", "no_room")
