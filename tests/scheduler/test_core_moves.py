"""Moves of the core by hand: what is planned, what is held meanwhile, and each way in which a move comes out."""

from itertools import pairwise

import pytest

from mell_scheduler.core import (
    Command,
    LeadershipTaken,
    MigrationPriced,
    MigrationSettled,
    OperatorAsked,
    StartMigration,
    WantGpus,
)
from mell_shared.messages.admin import MigrateRequest
from mell_shared.messages.scheduler import LaneMeasured, MigrationCommitted, MigrationFailed
from tests.scheduler.script import SECOND, Row, Script, placed, queued, replies

KV = ("kv",)
ALL = ("kv", "tokens", "hybrid")


def orders(commands: list[Command]) -> list[StartMigration]:
    """The moves begun."""
    return [command for command in commands if isinstance(command, StartMigration)]


def settled(commands: list[Command]) -> list[tuple[str, str]]:
    """How moves came out: sequence and outcome."""
    return [(c.sequence, c.outcome) for c in commands if isinstance(c, MigrationSettled)]


class Packed(Script):
    """Two workers that can move sequences: `a` holds much, `b` little, so that `repack` empties `b` into `a`."""

    def __init__(
        self,
        *,
        modes: tuple[str, ...] = KV,
        second_modes: tuple[str, ...] | None = None,
        second_seats: int = 32,
        **settings: int,
    ):
        super().__init__("repack", **settings)
        self.rows: dict[str, list[Row]] = {"a": [("big", 1, 640, 40)], "b": [("small", 1, 160, 10)]}
        self.send(LeadershipTaken(7))
        self.join("a", migration_modes=modes)
        second = modes if second_modes is None else second_modes
        self.join("b", migration_modes=second, max_sequences=second_seats)

    def second(self) -> list[Command]:
        """Everybody reports, and a second passes."""
        said = [command for worker in self.rows for command in self.report(worker, *self.rows[worker])]
        return said + self.wait(1)

    def order(self) -> StartMigration:
        """Let time pass until the one move of this scene is ordered."""
        for _ in range(5):
            found = orders(self.second())
            if found:
                (order,) = found
                return order
        raise AssertionError("no move was ordered")

    def commit(self, order: StartMigration, generation: int = 2, **fields: int) -> list[Command]:
        """The target tells that the sequence goes on there."""
        told = order.order
        return self.send(
            MigrationCommitted(
                worker=told.target,
                source=order.source,
                migration=told.migration,
                sequence=told.sequence,
                generation=generation,
                **fields,
            )
        )

    def fail(self, order: StartMigration, reason: str) -> list[Command]:
        """The source tells that the sequence stays."""
        told = order.order
        return self.send(
            MigrationFailed(
                worker=order.source,
                migration=told.migration,
                sequence=told.sequence,
                generation=told.generation,
                reason=reason,
            )
        )


def test_an_almost_empty_worker_is_emptied() -> None:
    """The order names sequence, generation, target, mode, reason and term."""
    order = Packed().order()
    told = order.order
    assert (order.source, told.target, told.sequence, told.generation) == ("b", "a", "small", 1)
    assert (told.mode, told.split_tokens, told.reason, told.term) == ("kv", 0, "consolidate", 7)
    assert told.migration == "7-1"
    assert order.predicted_us == pytest.approx(160 * 131_072 / 125, rel=0.01)


@pytest.mark.parametrize(("first", "second"), [((), ()), (KV, ()), (("tokens",), KV), (("sorcery",), ("sorcery",))])
def test_only_workers_that_can_do_the_same_take_part(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Nothing is planned from or to a worker that declares no mode, or none that is known, or another one."""
    scene = Packed(modes=first, second_modes=second)
    assert not orders([command for _ in range(6) for command in scene.second()])


@pytest.mark.parametrize("both", [(ALL, ("tokens",)), (("tokens",), ALL), (("kv", "tokens"), ("tokens",))])
def test_workers_that_have_tokens_in_common_move_by_them(both: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    """As while a fleet gets what lets it move by KV, server by server, however cheap KV would be."""
    order = Packed(modes=both[0], second_modes=both[1], link_bytes_per_s=1 << 40).order()
    assert (order.source, order.order.mode) == ("b", "tokens")


def test_nothing_moves_in_a_new_leaders_first_two_report_intervals() -> None:
    """It may not have heard everybody yet."""
    scene = Packed()
    assert not orders(scene.second())
    assert scene.now_us < 2 * SECOND
    assert orders(scene.second())
    assert scene.now_us == 2 * SECOND


def test_both_ends_are_held_until_the_move_is_settled() -> None:
    """No arrival gets the room that the move needs at its target, or still has at its source."""
    scene = Packed()
    scene.second()
    before = scene.free("a"), scene.free("b")
    order = scene.order()
    assert (scene.free("a"), scene.free("b")) == (before[0] - order.blocks, before[1])
    assert settled(scene.commit(order)) == [("small", "committed")]
    assert (scene.free("a"), scene.free("b")) == (before[0] - order.blocks, before[1] + order.blocks)


def test_an_order_tells_what_room_the_plan_counts_on() -> None:
    """The source asks for no more at the target than what is charged there."""
    order = Packed().order()
    assert order.order.planned_tokens == 16 * order.blocks


def test_what_is_reserved_for_a_move_is_not_charged_twice() -> None:
    """A target that reports in mid-move uses blocks for what is on its way, which is no sequence of its own yet."""
    scene = Packed()
    order = scene.order()
    free_blocks = scene.free("a")
    reserved = order.blocks - 1
    scene.report("a", *scene.rows["a"], used_blocks=40 + reserved, free_blocks=60 - reserved, reserved_blocks=reserved)
    assert scene.free("a") == free_blocks


def test_what_an_unknown_move_holds_is_charged() -> None:
    """One that an earlier leader ordered."""
    scene = Packed()
    scene.second()
    free_blocks = scene.free("a")
    scene.report("a", *scene.rows["a"], used_blocks=47, free_blocks=53, reserved_blocks=7)
    assert scene.free("a") == free_blocks - 7


class Growing(Script):
    """Worker `a` of 100 blocks holds two sequences that gain three blocks a second each; `b` is empty."""

    def __init__(self, first_report_s: float, **settings: int) -> None:
        super().__init__("repack", **settings)
        self.send(LeadershipTaken(7))
        self.up("a", "b", migration_modes=KV)
        self.wait(first_report_s)
        self._tokens = 672
        self.grow()
        self.wait(1)
        self.grow()

    def grow(self) -> None:
        """The next report of `a`."""
        self.report("a", ("s1", 1, self._tokens, self._tokens // 16), ("s2", 1, self._tokens, self._tokens // 16))
        self._tokens += 48


def test_a_worker_is_relieved_by_the_last_plan_that_can_do_it_in_time() -> None:
    """Reported at 2.1 s with 90 blocks it is full at 3.8 s: the plan at 4 s is too late, so that at 3 s has to act."""
    scene = Growing(1.1)
    assert scene.free("a") < 0
    (order,) = orders(scene.wait(1))
    assert (order.source, order.order.reason) == ("a", "overload")


@pytest.mark.parametrize(("report_late_us", "relieved"), [(0, False), (200_000, True)])
def test_a_report_may_have_to_serve_the_plan_after_the_next(report_late_us: int, relieved: bool) -> None:
    """Reported at 1.9 s, again at 2.9 s or a little after the plan at 3 s: where that happens, 2 s must act for it."""
    scene = Growing(0.9, report_late_us=report_late_us)
    assert (scene.free("a") < 0) == relieved
    assert bool(orders(scene.wait(0.1))) == relieved


def test_moves_that_take_long_are_planned_earlier() -> None:
    """What a move took lately counts as time for which sizes must fit: for 0.8 s five blocks of two sequences."""
    free_blocks: dict[float, int] = {}
    for took_s in (0.0, 0.8):
        scene = Packed()
        order = scene.order()
        scene.wait(took_s)
        scene.commit(order)
        scene.wait(0.8 - took_s)
        scene.report("b")
        for tokens in (640, 720):
            scene.report("a", ("big", 1, tokens, 45), ("small", 2, 160, 10))
        free_blocks[took_s] = scene.free("a")
    assert free_blocks[0.0] - free_blocks[0.8] == 5


def test_who_waits_for_blocks_is_not_moved_but_makes_room_necessary() -> None:
    """It holds nothing: somebody else has to go for it to run again."""
    scene = Packed()
    scene.rows = {"a": [("s1", 1, 800, 50), ("s2", 1, 736, 46), ("w", 1, 80, 0)], "b": []}
    states = {"used_blocks": 96, "free_blocks": 4, "states": [0, 0, 1]}
    begun = []
    for _ in range(4):
        scene.report("a", *scene.rows["a"], **states)
        assert scene.free("a") < 0
        scene.report("b")
        begun += orders(scene.wait(1))
        if begun:
            break
    assert [order.order.sequence for order in begun] == ["s2"]


def test_where_nobody_who_runs_can_go_nothing_is_ordered() -> None:
    """Least of all for one that waits, though it would fit anywhere."""
    scene = Packed()
    scene.rows = {"a": [("s1", 1, 1_536, 96), ("w", 1, 80, 0)], "b": [("s2", 1, 800, 50)]}
    for _ in range(4):
        scene.report("a", *scene.rows["a"], used_blocks=96, free_blocks=4, states=[0, 1])
        scene.report("b", *scene.rows["b"])
        assert not orders(scene.wait(1))


def test_an_emptied_worker_stands_by() -> None:
    """And the sequence is known to be at its target, under the new generation."""
    scene = Packed()
    scene.commit(scene.order())
    ledger = scene.core.ledger
    assert ledger.standing(ledger.workers["b"]) == "standby"
    assert scene.answer("small", generation=2) == placed("a")


def test_a_commit_makes_room_for_who_waits() -> None:
    """The source's memory is free at once."""
    scene = Packed()
    order = scene.order()
    assert replies(scene.ask("wide", 1_580, 16)) == {}
    assert replies(scene.commit(order)) == {"wide": placed("b")}


def test_a_failed_move_frees_the_target_and_rests() -> None:
    """One, two, four epochs: the same sequence is tried ever more rarely."""
    scene = Packed()
    scene.rows["a"] = [("big", 1, 1_120, 70)]
    tries: list[int] = []
    for _ in range(20):
        for order in orders(scene.second()):
            tries.append(scene.now_us // SECOND)
            assert settled(scene.fail(order, "no_room")) == [("small", "failed")]
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps == [1, 2, 4, 8]


def test_a_pair_that_cannot_rests_whoever_is_to_move() -> None:
    """After `unreachable` even another sequence is not sent between the two for an epoch, then two."""
    scene = Packed()
    scene.fail(scene.order(), "unreachable")
    scene.rows["b"] = [("other", 1, 160, 10)]
    scene.fail(scene.order(), "unreachable")
    since_us = scene.now_us
    scene.rows["b"] = [("third", 1, 160, 10)]
    assert scene.order().order.sequence == "third"
    assert scene.now_us - since_us == 2 * SECOND


def test_a_move_not_heard_of_fails_after_a_while() -> None:
    """Both ends are released, and the failure is told."""
    scene = Packed(migration_timeout_us=3 * SECOND)
    scene.order()
    said = [command for _ in range(3) for command in scene.second()]
    assert ("small", "timeout") in settled(said)
    assert not scene.core.ledger.moving


def test_the_targets_report_settles_a_move_whose_news_was_lost() -> None:
    """The source's copy stays charged until the source, too, reports."""
    scene = Packed()
    order = scene.order()
    free = scene.free("b")
    said = scene.report("a", ("big", 1, 640, 40), ("small", 2, 161, 11))
    assert settled(said) == [("small", "committed")]
    assert scene.free("b") == free + order.blocks - 10
    scene.report("b")
    assert scene.free("b") == 100


def test_news_that_come_after_a_report_still_tell_the_cost() -> None:
    """Once; and they change nothing else."""
    scene = Packed()
    order = scene.order()
    scene.report("a", ("big", 1, 640, 40), ("small", 2, 161, 11))
    free = scene.free("a"), scene.free("b")
    (priced,) = scene.commit(order, copied_bytes=1_000_000, stopped_us=5_000)
    assert isinstance(priced, MigrationPriced)
    told = priced.settled
    assert (told.migration, told.outcome, told.reason) == (order.order.migration, "committed", "")
    assert (told.copied_bytes, told.stopped_us, told.predicted_us) == (1_000_000, 5_000, order.predicted_us)
    assert scene.commit(order, copied_bytes=1_000_000) == []
    assert (scene.free("a"), scene.free("b")) == free


def test_a_source_that_has_not_let_go_yet_takes_no_other_in_its_place() -> None:
    """The target's report says that it has moved; the copy at the source still takes its only seat."""
    scene = Packed(second_seats=1)
    scene.second()
    scene.second()
    asked = MigrateRequest(ask="1", request="small", target="a", mode="kv")
    (order,) = orders(scene.send(OperatorAsked("operator", asked)))
    assert order.source == "b"
    assert settled(scene.report("a", ("big", 1, 640, 40), ("small", 2, 160, 10))) == [("small", "committed")]
    assert "b" in scene.core.ledger.models["m"].closed
    scene.report("b")
    assert not scene.core.ledger.models["m"].closed


def test_a_source_that_has_let_go_settles_it_too() -> None:
    """The sequence counts at its target until that reports, or is forgotten if it never does."""
    scene = Packed()
    scene.order()
    assert settled(scene.report("b")) == [("small", "committed")]
    assert scene.core.ledger.sequences["small"].worker.worker_id == "a"
    scene.wait(1)
    scene.report("a", ("big", 1, 640, 40))
    for _ in range(5):
        scene.wait(1)
        scene.report("a", ("big", 1, 640, 40))
    assert "small" not in scene.core.ledger.sequences


@pytest.mark.parametrize(("dies", "kept"), [("b", False), ("a", True)])
def test_a_worker_that_dies_at_either_end_ends_the_move(dies: str, kept: bool) -> None:
    """With its source the sequence is gone; without its target it stays where it is."""
    scene = Packed(worker_lost_us=4 * SECOND)
    scene.order()
    said = []
    for _ in range(4):
        for worker in {"a", "b"} - {dies}:
            scene.report(worker, *scene.rows[worker])
        said += scene.wait(1)
    assert ("small", "ended") in settled(said)
    assert ("small" in scene.core.ledger.sequences) == kept


def test_a_source_that_leaves_in_order_has_let_go() -> None:
    """It leaves only when it is empty, so the sequence is at the target, whose news is on its way."""
    scene = Packed()
    order = scene.order()
    assert settled(scene.leave("b")) == [("small", "committed")]
    assert settled(scene.commit(order)) == []
    scene.report("a", ("big", 1, 640, 40), ("small", 2, 161, 11))
    record = scene.core.ledger.sequences["small"]
    assert (record.worker.worker_id, record.generation) == ("a", 2)


@pytest.mark.parametrize("worker", ["a", "b"])
def test_a_sequence_that_ends_in_mid_move_leaves_nothing_behind(worker: str) -> None:
    """Whichever end says so: the target may have taken over, and the news of that got lost."""
    scene = Packed()
    scene.order()
    assert settled(scene.finish(worker, "small", 2)) == [("small", "ended")]
    assert scene.free("b") == 100


def test_late_news_change_nothing() -> None:
    """A commit or failure of a move that is over is ignored; reports have the last word."""
    scene = Packed()
    order = scene.order()
    scene.fail(order, "no_room")
    free = scene.free("a"), scene.free("b")
    assert scene.commit(order) == []
    assert scene.fail(order, "no_room") == []
    assert (scene.free("a"), scene.free("b")) == free


def test_a_draining_worker_is_emptied() -> None:
    """What finds room elsewhere is ordered away; the rest waits."""
    scene = Packed()
    scene.rows = {"a": [("big", 1, 640, 40)], "b": [("one", 1, 640, 40), ("two", 1, 320, 20)]}
    scene.second()
    found: list[StartMigration] = []
    for _ in range(3):
        scene.report("a", *scene.rows["a"])
        scene.report("b", *scene.rows["b"], draining=True)
        found += orders(scene.wait(1))
    assert [(o.order.sequence, o.order.target, o.order.reason) for o in found] == [("one", "a", "drain")]


def test_a_move_is_made_by_tokens_where_the_link_is_slow() -> None:
    """Both boundaries decide, as workers tell them."""
    slow = {"link_bytes_per_s": 1_000_000, "prefill_tokens_per_s": 4_000}
    scene = Packed(modes=("kv", "tokens", "hybrid"))
    scene.specs = {name: spec.model_copy(update=slow) for name, spec in scene.specs.items()}
    for worker in scene.core.ledger.workers.values():
        worker.spec = worker.spec.model_copy(update=slow)
    assert scene.order().order.mode == "tokens"


def test_a_hybrid_names_its_split_in_whole_blocks() -> None:
    """Where neither boundary has room for all of it, each takes a part."""
    scene = Packed(modes=("hybrid",), link_bytes_per_s=2_000_000, prefill_tokens_per_s=20, kv_bytes_per_token=131_072)
    told = scene.order().order
    assert told.mode == "hybrid"
    assert 0 < told.split_tokens < 160
    assert told.split_tokens % 16 == 0


def test_what_finds_no_room_in_the_boundaries_waits_for_another_epoch() -> None:
    """It is deferred without being held against it: as soon as there is room it goes."""
    scene = Packed(link_bytes_per_s=1)
    assert not orders([command for _ in range(8) for command in scene.second()])
    assert not scene.core.ledger.moving
    scene.core._migrations._boundaries._links["b out"].per_s = 1e9  # the links have become faster
    scene.core._migrations._boundaries._links["a in"].per_s = 1e9
    assert orders(scene.second())


@pytest.mark.parametrize(("limits", "most"), [({}, 4), ({"max_outgoing_moves": 2}, 2), ({"max_incoming_moves": 1}, 1)])
def test_no_worker_is_ordered_more_moves_at_once_than_it_takes(limits: dict[str, int], most: int) -> None:
    """A drain goes on as soon as one of its moves is over; without limits all are ordered at once."""
    scene = Script("repack")
    scene.send(LeadershipTaken(7))
    scene.join("a", migration_modes=KV, **limits)
    scene.join("b", migration_modes=KV, **limits)
    rows: dict[str, dict[str, Row]] = {"a": {}, "b": {f"s{n}": (f"s{n}", 1, 160, 10) for n in range(4)}}

    def second() -> list[StartMigration]:
        said = [c for name, row in rows.items() for c in scene.report(name, *row.values(), draining=name == "b")]
        return orders(said + scene.wait(1))

    begun = [order for _ in range(6) for order in second()]
    assert [order.source for order in begun] == ["b"] * most
    told = begun[0].order
    done = {"migration": told.migration, "sequence": told.sequence, "generation": 2}
    scene.send(MigrationCommitted(worker="a", source="b", **done))
    del rows["b"][told.sequence]
    rows["a"][told.sequence] = (told.sequence, 2, 160, 10)
    assert len(second()) == bool(limits)


def test_rates_follow_what_moves_took() -> None:
    """A slow copy makes the next prediction longer."""
    scene = Packed()
    first = scene.order()
    scene.commit(first, copied_bytes=1_000_000, copy_us=1_000_000)
    scene.rows = {"a": [("big", 1, 640, 40), ("small", 2, 160, 10)], "b": [("next", 1, 160, 10)]}
    assert scene.order().predicted_us > first.predicted_us


def test_gpus_wanted_are_told_when_they_change() -> None:
    """Those in use, and one more for what waits."""
    scene = Packed(modes=())
    said = [command for _ in range(3) for command in scene.second()]
    assert [c for c in said if isinstance(c, WantGpus)] == [WantGpus("m", 2)]
    assert scene.answer("wide", 1_500, 16) is None
    said = scene.second()
    assert [c for c in said if isinstance(c, WantGpus)] == [WantGpus("m", 3)]


def test_what_outgrows_the_workers_wants_one_more() -> None:
    """Nothing waits, but running sequences are about to need more than their worker has, and cannot move."""
    scene = Packed(modes=())
    scene.rows["a"] = [("big", 1, 640, 40), ("next", 1, 640, 40)]
    for _ in range(3):
        scene.second()
    assert scene.core.scaling.wanted == {"m": 2}
    scene.rows["a"] = [("big", 1, 800, 50), ("next", 1, 800, 50)]
    scene.second()
    scene.second()
    assert scene.core.scaling.wanted == {"m": 3}
    scene.rows = {"a": [("big", 1, 810, 51)], "b": []}
    for _ in range(3):
        scene.second()
    assert scene.core.scaling.wanted == {"m": 1}


def test_what_is_leaving_a_full_worker_wants_no_other() -> None:
    """A move to a worker that is there ends the overload: while it is under way nothing more is wanted."""
    scene = Packed()
    scene.rows = {"a": [("big", 1, 1_120, 70), ("next", 1, 320, 20)], "b": [("small", 1, 160, 10)]}
    for _ in range(3):
        scene.second()
    scene.rows["a"] = [("big", 1, 1_216, 76), ("next", 1, 384, 24)]
    assert orders([command for _ in range(2) for command in scene.second()])
    assert scene.core.scaling.wanted == {"m": 2}


def test_a_worker_with_preempted_sequences_takes_nothing() -> None:
    """It refuses everything while one waits there, so neither arrivals nor moves count on its free blocks."""
    scene = Packed()
    scene.rows["b"] = [("small", 1, 160, 10)]
    waiting = {"states": [1], "blocks": [0], "used_blocks": 0, "free_blocks": 100}
    for _ in range(4):
        scene.report("a", *scene.rows["a"], **waiting)
        scene.report("b", *scene.rows["b"])
        assert not [o for o in orders(scene.wait(1)) if o.order.target == "a"]
    assert scene.free("a") <= 0
    assert scene.answer("s1", 1_440, 1) is None
    assert replies(scene.report("a", *scene.rows["a"])) == {}
    scene.wait(1)
    assert scene.answer("s2", 160, 1) in {placed("a"), queued(0), None}


class Starved(Packed):
    """`a` is full, and has preempted one of its sequences; `b` holds `used` of its 100 blocks."""

    def __init__(self, used: int = 10, modes: tuple[str, ...] = ("kv", "tokens")) -> None:
        super().__init__(modes=modes)
        self.rows["b"] = [("small", 1, 16 * used, used)]
        self.wait(2)

    def second(self) -> list[Command]:
        """Everybody reports, and a second passes."""
        said = self.report("a", ("big", 1, 1_520, 95), ("out", 1, 480, 0), states=[0, 1], free_blocks=5, used_blocks=95)
        return said + self.report("b", *self.rows["b"]) + self.wait(1)


def test_what_was_preempted_goes_by_its_tokens_to_where_there_is_room() -> None:
    """It holds no KV; its need counts at its target while it is on its way, and whoever runs stays where it is."""
    scene = Starved()
    scene.report("b", *scene.rows["b"])
    free = scene.free("b")
    (order,) = orders(scene.second())
    told = order.order
    assert (told.sequence, told.mode, told.target, told.reason) == ("out", "tokens", "b", "overload")
    assert order.blocks >= 30, "all of its tokens are to be computed again"
    assert scene.free("b") <= free - order.blocks
    for _ in range(3):
        assert not orders(scene.second()), "nobody else has to go, and nothing comes"
    assert settled(scene.commit(order)) == [("out", "committed")]
    scene.core.check()


def test_what_was_preempted_waits_where_it_is_if_there_is_no_room_elsewhere() -> None:
    """Or no way to move it by its tokens; what it needs stays charged to its worker."""
    for scene in (Starved(used=90), Starved(modes=KV)):
        for _ in range(3):
            moved = [order.order.sequence for order in orders(scene.second())]
            assert "out" not in moved
            assert scene.free("a") <= 0
            scene.core.check()


def test_a_rescue_that_failed_is_tried_again_later() -> None:
    """Its pair of workers rests; until then its need is its worker's again."""
    scene = Starved()
    (order,) = orders(scene.second())
    scene.fail(order, "timeout")
    scene.core.check()
    again = [orders(scene.second()) for _ in range(6)]
    scene.core.check()
    assert [len(each) for each in again].count(1) == 1
    assert not again[0]


def lane(scene: Packed, bytes_per_s: int, source: str = "b", target: str = "a") -> None:
    """The workers have measured the lane between them."""
    scene.send(LaneMeasured(worker=source, target=target, bytes_per_s=bytes_per_s, latency_us=100))


def test_a_slow_lane_between_two_fast_workers_counts() -> None:
    """What a move is predicted to take follows the slowest part of its way; the lane back says nothing of it."""
    fast, slow, back = Packed(), Packed(), Packed()
    lane(slow, 12_500_000)
    lane(back, 12_500_000, source="a", target="b")
    usual_us = fast.order().predicted_us
    assert slow.order().predicted_us == pytest.approx(10 * usual_us, rel=0.01)
    assert back.order().predicted_us == usual_us


def test_a_lane_that_was_measured_slow_once_is_not_slow_for_ever() -> None:
    """Nothing large is sent over it, so nothing would correct a bad measurement: after minutes it is tried again."""
    scene = Packed()
    lane(scene, 100_000)
    assert not any(orders(scene.second()) for _ in range(50))
    assert any(orders(scene.second()) for _ in range(600))


def test_a_lane_of_unknown_workers_is_nothing() -> None:
    """A figure that came late, or of workers that never joined, is not kept."""
    scene = Packed()
    lane(scene, 1, target="gone")
    assert scene.order().predicted_us == Packed().order().predicted_us


@pytest.mark.parametrize(("copied_bytes", "learnt"), [(1 << 22, True), (1 << 10, False)])
def test_a_lane_is_learnt_from_moves_that_are_large(copied_bytes: int, learnt: bool) -> None:
    """A large move that was fast makes the next prediction shorter; a small one, all latency, says nothing."""
    scene = Packed()
    lane(scene, 12_500_000)
    first = scene.order()
    scene.commit(first, copied_bytes=copied_bytes, copy_us=copied_bytes // 100)
    scene.rows = {"a": [("big", 1, 640, 40), ("small", 2, 160, 10)], "b": [("next", 1, 160, 10)]}
    assert (scene.order().predicted_us < first.predicted_us) == learnt


def test_prefill_is_planned_at_the_rate_beside_so_many_decodes() -> None:
    """A target that decodes more prefills less for others; beyond what it measured, as beside the most."""

    def predicted_us(running: int, profile: tuple[tuple[int, int], ...]) -> int:
        scene = Packed(modes=("tokens",))
        record = scene.core.ledger.workers["a"]
        batches, rates = zip(*profile, strict=True)
        told = {"profiled_batches": list(batches), "profiled_tokens_per_s": list(rates)}
        record.spec = record.spec.model_copy(update=told)
        scene.rows["a"] = [(f"big{row}", 1, 640 // running, 40 // running) for row in range(running)]
        return scene.order().predicted_us

    profile = ((1, 1_000), (4, 500))
    alone_us = predicted_us(1, profile)
    assert alone_us == pytest.approx(predicted_us(1, ((1, 500),)) / 2, rel=0.01)
    assert predicted_us(4, profile) == pytest.approx(2 * alone_us, rel=0.01)
    assert predicted_us(5, profile) == pytest.approx(2 * alone_us, rel=0.01)
