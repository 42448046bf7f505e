"""What operators order, by hand: drains, moves of single requests, pauses; and what each refusal says."""

import pytest

from mell_scheduler.core import Answer, Command, LeadershipEnded, LeadershipTaken, OperatorAsked, OrderDrain, Tick
from mell_scheduler.core.status import move_statuses, sequence_statuses, worker_statuses
from mell_scheduler.core.values import OperatorRequest
from mell_shared.messages.admin import (
    AdminRefused,
    AdminReply,
    DrainReply,
    DrainRequest,
    MigrateReply,
    MigrateRequest,
    ModeAsked,
    MovingReply,
    MovingRequest,
    UndrainRequest,
)
from mell_shared.messages.worker import Drain, Undrain
from tests.scheduler.script import SECOND
from tests.scheduler.test_core_moves import Packed, orders

ALL = ("kv", "tokens", "hybrid")


class Operated(Packed):
    """Two workers, one almost empty, and nothing is planned unless a test says so; `c` stands by."""

    def __init__(self, *, modes: tuple[str, ...] = ALL, paused: bool = True, **settings: int) -> None:
        super().__init__(modes=modes, **settings)
        self.rows["c"] = []
        self.join("c", migration_modes=modes)
        for _ in range(2):
            self.second_without_moves()
        if paused:
            self.tell(MovingRequest(paused=True))

    def second_without_moves(self) -> None:
        """Everybody reports; time passes, but not to the first epoch."""
        for worker in self.rows:
            self.report(worker, *self.rows[worker])
        self.now_us += SECOND
        self.asks = 0

    def order_of(self, request: OperatorRequest) -> tuple[list[AdminReply], list[Command]]:
        """The answers to an order, and what else is done."""
        self._handles += 1
        said = self.send(OperatorAsked(f"op#{self._handles}", request))
        return [command.reply for command in said if isinstance(command, Answer)], said

    def tell(self, request: OperatorRequest) -> AdminReply:
        """The one answer that an order gets at once."""
        (reply,), _ = self.order_of(request)
        return reply

    def migrate(self, request: str, target: str, mode: ModeAsked = "auto") -> tuple[list[AdminReply], list[Command]]:
        """Order a move under a new ask."""
        self.asks += 1
        return self.order_of(MigrateRequest(ask=f"ask{self.asks}", request=request, target=target, mode=mode))

    def refused(self, request: str, target: str, mode: ModeAsked = "auto") -> str:
        """Why a move is refused at once."""
        (reply,), said = self.migrate(request, target, mode)
        assert isinstance(reply, AdminRefused), f"not refused but {reply}"
        assert reply.message
        assert not orders(said)
        return reply.reason

    def states(self) -> dict[str, str]:
        """How operators see each worker."""
        return {status.worker: status.state for status in worker_statuses(self.core, self.now_us)}


# --- drains


def test_a_drain_is_ordered_and_its_plan_is_told() -> None:
    """The order carries term and deadline; the answer, sent once the worker obeys, says where each would go."""
    scene = Operated(paused=False)
    answers, said = scene.order_of(DrainRequest(worker="b", deadline_s=30.0))
    (order,) = [command for command in said if isinstance(command, OrderDrain)]
    assert answers == []
    assert (order.worker, order.order) == ("b", Drain(term=7, deadline_s=30.0))
    assert isinstance(order.reply, DrainReply)
    assert [(row.sequence, row.target, row.blocks) for row in order.reply.sequences] == [("small", "a", 12)]


def test_a_rehearsed_drain_changes_nothing() -> None:
    """The plan is told at once, the worker is not; room is as before."""
    scene = Operated(paused=False)
    before = [scene.free(worker) for worker in "abc"], scene.states()
    reply = scene.tell(DrainRequest(worker="b", dry_run=True))
    assert isinstance(reply, DrainReply)
    assert reply.dry_run
    assert [(row.sequence, row.target) for row in reply.sequences] == [("small", "a")]
    assert ([scene.free(worker) for worker in "abc"], scene.states()) == before


def test_the_plan_says_what_finds_no_room() -> None:
    """Each sequence gets a target or the reason why there is none; room is counted once."""
    scene = Operated(paused=False)
    scene.rows = {"a": [("big", 1, 640, 40)], "b": [("x", 1, 800, 50), ("y", 1, 720, 45)], "c": [("z", 1, 1_280, 80)]}
    scene.second_without_moves()
    scene.report("b", *scene.rows["b"])
    reply = scene.tell(DrainRequest(worker="b", dry_run=True))
    assert isinstance(reply, DrainReply)
    assert [(row.sequence, row.target, bool(row.why)) for row in reply.sequences] == [
        ("x", "a", False),
        ("y", "", True),
    ]


def test_while_moves_are_paused_the_plan_says_so() -> None:
    """Nothing would leave before they are resumed."""
    reply = Operated().tell(DrainRequest(worker="b", dry_run=True))
    assert isinstance(reply, DrainReply)
    assert [(row.target, "paused" in row.why) for row in reply.sequences] == [("", True)]


def test_where_nothing_moves_the_plan_says_that_it_ends_there() -> None:
    """Workers without modes of moving."""
    reply = Operated(modes=()).tell(DrainRequest(worker="b", dry_run=True))
    assert isinstance(reply, DrainReply)
    assert "moves nothing" in reply.sequences[0].why


def test_a_draining_worker_is_emptied_and_stays_out_until_undrained() -> None:
    """Its sequences leave at the next epoch, for a drain; empty it is `drained`; undrained it stands by."""
    scene = Operated(paused=False)
    scene.report("b", *scene.rows["b"], draining=True)
    assert scene.states()["b"] == "draining"
    (order,) = orders(scene.wait(1))
    assert (order.source, order.order.reason, order.order.sequence) == ("b", "drain", "small")
    scene.commit(order)
    scene.report("b", draining=True)
    assert scene.states()["b"] == "drained"
    (command,) = scene.order_of(UndrainRequest(worker="b"))[1]
    assert isinstance(command, OrderDrain)
    assert command.order == Undrain(term=7)
    scene.report("b")
    assert scene.states()["b"] == "standby"


def test_a_drain_goes_on_after_a_failure() -> None:
    """A move that fails comes back as an event; the sequence rests and is moved then."""
    scene = Operated(paused=False)
    scene.rows["b"] = [("small", 1, 160, 10)]
    tried = []
    for _ in range(6):
        scene.report("a", *scene.rows["a"])
        scene.report("c")
        scene.report("b", *scene.rows["b"], draining=True)
        for order in orders(scene.wait(1)):
            tried.append(order.order.migration)
            if len(tried) < 3:
                scene.fail(order, "no_room")
            else:
                scene.commit(order)
                scene.rows["b"] = []
    assert len(tried) == 3
    assert scene.states()["b"] == "drained"


def test_a_drain_wakes_a_standby_where_nobody_else_has_room() -> None:
    """What fits on no worker in use goes to one that stands by."""
    scene = Operated(paused=False)
    scene.rows = {"a": [("big", 1, 1_440, 90)], "b": [("wide", 1, 960, 60)], "c": []}
    for worker in scene.rows:
        scene.report(worker, *scene.rows[worker], draining=worker == "b")
    assert scene.states()["c"] == "standby"
    (order,) = orders(scene.wait(1))
    assert (order.order.sequence, order.order.target) == ("wide", "c")
    assert scene.states()["c"] == "active"


def test_an_overfull_worker_wakes_a_standby() -> None:
    """Overload that no worker in use can take is relieved by one that stands by."""
    scene = Operated(paused=False)
    scene.rows = {"a": [("one", 1, 800, 50), ("two", 1, 784, 49)], "b": [("full", 1, 1_520, 95)], "c": []}
    for worker in scene.rows:
        scene.report(worker, *scene.rows[worker])
    found = orders(scene.wait(1))
    assert [(o.source, o.order.target, o.order.reason) for o in found] == [("a", "c", "overload")]


# --- moves


def test_an_operator_s_move_is_held_at_both_ends_and_its_outcome_told() -> None:
    """It begins at once, in the mode asked for; the answer is held until the move has come out."""
    scene = Operated()
    free = scene.free("a"), scene.free("c")
    answers, said = scene.migrate("big", "c", "tokens")
    (order,) = orders(said)
    told = order.order
    assert answers == []
    assert (order.source, told.target, told.mode, told.reason, told.term) == ("a", "c", "tokens", "manual", 7)
    assert (scene.free("a"), scene.free("c")) == (free[0], free[1] - order.blocks)
    (move,) = move_statuses(scene.core, scene.now_us)
    assert (move.sequence, move.target, move.reason, move.outcome) == ("big", "c", "manual", "moving")
    told_now = [c.reply for c in scene.commit(order, stopped_us=7_000) if isinstance(c, Answer)]
    (reply,) = told_now
    assert isinstance(reply, MigrateReply)
    (result,) = reply.moves
    assert result.state == "committed"
    assert result.move is not None
    assert result.move.stopped_s == 0.007
    assert scene.free("a") == free[0] + order.blocks


@pytest.mark.parametrize(("heard", "stopped_s"), [(True, 0.007), (False, 0.0)])
def test_who_ordered_a_move_is_told_its_cost_also_where_a_report_is_quicker(heard: bool, stopped_s: float) -> None:
    """The answer waits for the news; if they never come it is given without."""
    scene = Operated()
    (order,) = orders(scene.migrate("big", "c")[1])
    said = scene.report("c", ("big", 2, 641, 41))
    said += scene.commit(order, stopped_us=7_000) if heard else scene.wait(4)
    if not heard:
        said += scene.order_of(MigrateRequest(ask="ask1", request="big", target="c"))[1]
    reply = [command.reply for command in said if isinstance(command, Answer)][-1]
    assert isinstance(reply, MigrateReply)
    assert reply.moves[0].state == "committed"
    assert reply.moves[0].move is not None
    assert reply.moves[0].move.stopped_s == stopped_s


def test_a_failed_move_is_told_with_its_reason() -> None:
    """The sequence stays, the target is free."""
    scene = Operated()
    (order,) = orders(scene.migrate("big", "c")[1])
    (reply,) = [c.reply for c in scene.fail(order, "link") if isinstance(c, Answer)]
    assert isinstance(reply, MigrateReply)
    assert (reply.moves[0].state, reply.moves[0].reason) == ("failed", "link")
    assert scene.free("c") == 100


def test_a_long_move_is_answered_as_it_stands_and_asked_again() -> None:
    """Each ask gets one answer within a second; the same ask again begins nothing."""
    scene = Operated()
    answers, said = scene.migrate("big", "c")
    (order,) = orders(said)
    answers = [command.reply for command in scene.wait(1) if isinstance(command, Answer)]
    (reply,) = answers
    assert isinstance(reply, MigrateReply)
    assert reply.moves[0].state == "moving"
    again, said = scene.order_of(MigrateRequest(ask="ask1", request="big", target="c"))
    assert (again, orders(said)) == ([], [])
    scene.commit(order)
    (reply,), said = scene.order_of(MigrateRequest(ask="ask1", request="big", target="c"))
    assert isinstance(reply, MigrateReply)
    assert reply.moves[0].state == "committed"
    assert not orders(said)


def test_a_delivery_that_comes_twice_is_answered_once() -> None:
    """The broker may do that; the asker has one reply subject."""
    scene = Operated()
    event = OperatorAsked("op", MigrateRequest(ask="x", request="big", target="c"))
    assert len(orders(scene.send(event))) == 1
    assert scene.send(event) == []


def test_an_ask_belongs_to_one_order() -> None:
    """Another order under its name is refused."""
    scene = Operated()
    scene.migrate("big", "c")
    reply = scene.tell(MigrateRequest(ask="ask1", request="small", target="c"))
    assert isinstance(reply, AdminRefused)
    assert reply.reason == "invalid"


def test_all_choices_of_a_request_move() -> None:
    """By the request's id; one of them, by its own."""
    scene = Operated()
    scene.rows["b"] = [("chatcmpl-1.0.0", 1, 160, 10), ("chatcmpl-1.0.1", 1, 160, 10), ("chatcmpl-10.0.0", 1, 160, 10)]
    scene.second_without_moves()
    assert [o.order.sequence for o in orders(scene.migrate("chatcmpl-1.0.1", "c")[1])] == ["chatcmpl-1.0.1"]
    _, said = scene.migrate("chatcmpl-1", "c")
    assert [o.order.sequence for o in orders(said)] == ["chatcmpl-1.0.0"]
    answers = [c.reply for c in scene.wait(1) if isinstance(c, Answer)]
    last = answers[-1]
    assert isinstance(last, MigrateReply)
    assert [(m.sequence, m.state) for m in last.moves] == [
        ("chatcmpl-1.0.0", "moving"),
        ("chatcmpl-1.0.1", "moving"),
    ]


def test_a_request_goes_by_its_client_s_name_too() -> None:
    """As the log and the response header call it; a name of several requests is refused, naming them."""
    scene = Operated()
    scene.ask("cmpl-a.0.0", request_id="mine")
    worker = scene.core.ledger.sequences["cmpl-a.0.0"].worker.worker_id
    scene.report(worker, *scene.rows[worker], ("cmpl-a.0.0", 1, 161, 11))
    assert [o.order.sequence for o in orders(scene.migrate("mine", "c")[1])] == ["cmpl-a.0.0"]
    scene.ask("cmpl-b.0.0", request_id="mine")
    assert scene.refused("mine", "c") == "ambiguous"


def test_where_it_is_already_nothing_moves() -> None:
    """A repeat of an order that was carried out is as good as done."""
    scene = Operated()
    (reply,), said = scene.migrate("big", "a")
    assert isinstance(reply, MigrateReply)
    assert (reply.moves[0].state, orders(said)) == ("there", [])


def test_what_cannot_be_moved_is_refused_by_name() -> None:
    """Unknown names, another model, no room, silence, a drain, a move under way, a request that waits or is over."""
    scene = Operated()
    scene.join("other", model="n", migration_modes=ALL)
    scene.report("other")
    scene.join("mute", migration_modes=ALL)
    assert scene.refused("nobody", "c") == "unknown_request"
    assert scene.refused("big", "nowhere") == "unknown_worker"
    assert scene.refused("big", "other") == "wrong_model"
    assert scene.refused("big", "mute") == "silent"
    scene.report("c", draining=True)
    assert scene.refused("big", "c") == "draining"
    scene.report("c", ("wide", 1, 1_120, 70))
    assert scene.refused("big", "c") == "no_room"
    orders(scene.migrate("small", "c")[1])
    assert scene.refused("small", "a") == "already_moving"
    scene.ask("fresh", 16, 16)
    assert scene.refused("fresh", "b") == "not_running"
    scene.ask("waits", 1_550, 16)
    assert scene.core.waiting.get("waits") is not None
    assert scene.refused("waits", "c") == "not_running"
    scene.finish("a", "big")
    assert scene.refused("big", "c") == "over"


def test_a_mode_that_the_workers_lack_is_refused() -> None:
    """And so is any move between workers that differ, or that move nothing."""
    scene = Operated(modes=("kv",))
    assert scene.refused("big", "c", "hybrid") == "unsupported"
    scene.join("else", migration_modes=ALL)
    scene.report("else")
    assert scene.refused("big", "else") == "unsupported"
    assert Operated(modes=()).refused("big", "c") == "unsupported"
    scene = Operated()
    scene.join("few", migration_modes=("tokens",))
    scene.report("few")
    assert scene.refused("big", "few", "kv") == "unsupported"
    (order,) = orders(scene.migrate("big", "few")[1])
    assert order.order.mode == "tokens"


@pytest.mark.parametrize("mode", ["kv", "tokens", "hybrid"])
def test_the_mode_asked_for_is_taken_whatever_the_boundaries(mode: ModeAsked) -> None:
    """Also where neither link nor prefill has room for it; a hybrid has something of each."""
    scene = Operated(link_bytes_per_s=1, prefill_tokens_per_s=0)
    (order,) = orders(scene.migrate("big", "c", mode)[1])
    assert order.order.mode == mode
    assert (0 < order.order.split_tokens < 640) == (mode == "hybrid")
    assert order.order.split_tokens % 16 == 0


def test_auto_does_as_the_scheduler_would() -> None:
    """Over a fast link a copy, over a slow one a prefill; where neither has room the quicker one."""
    fast, slow = {"link_bytes_per_s": 1 << 40}, {"link_bytes_per_s": 1_000_000, "prefill_tokens_per_s": 4_000}
    for settings, mode in ((fast, "kv"), (slow, "tokens"), ({"link_bytes_per_s": 1, "prefill_tokens_per_s": 0}, "kv")):
        (order,) = orders(Operated(**settings).migrate("big", "c")[1])
        assert order.order.mode == mode


def test_a_new_leader_moves_nothing_yet() -> None:
    """It may not have heard everybody; the operator asks again. Whom it knows it drains at once."""
    scene = Packed()
    scene.second()
    requests = (
        MigrateRequest(ask="x", request="small", target="a"),
        DrainRequest(worker="unheard", deadline_s=None, dry_run=False),
        UndrainRequest(worker="unheard"),
    )
    for request in requests:
        (answer,) = scene.send(OperatorAsked("op", request))
        assert isinstance(answer, Answer)
        assert isinstance(answer.reply, AdminRefused)
        assert answer.reply.reason == "not_ready"
    (order,) = scene.send(OperatorAsked("op", DrainRequest(worker="a", deadline_s=None, dry_run=False)))
    assert not isinstance(order, Answer)


def test_the_next_leader_orders_the_very_same_move_for_the_same_ask() -> None:
    """So a source in the midst of it goes on with it; another ask, or another sequence, is another move."""
    names = []
    for term, ask, request in ((1, "x", "big"), (2, "x", "big"), (2, "y", "big"), (2, "x", "small")):
        scene = Operated()
        scene.send(LeadershipTaken(term))
        (order,) = orders(scene.order_of(MigrateRequest(ask=ask, request=request, target="c"))[1])
        assert order.order.term == term
        names.append(order.order.migration)
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_who_waits_hears_that_the_leader_has_gone() -> None:
    """Nobody is left without an answer."""
    scene = Operated()
    scene.migrate("big", "c")
    (reply,) = [c.reply for c in scene.send(LeadershipEnded()) if isinstance(c, Answer)]
    assert isinstance(reply, AdminRefused)
    assert reply.reason == "not_leader"


def test_asks_are_forgotten_after_a_while() -> None:
    """Their number is bounded: the oldest that is over makes room; while all are under way no more are taken."""
    scene = Operated(migration_timeout_us=1_000 * SECOND)
    for _ in range(300):
        scene.migrate("big", "a")
    assert len(scene.core._operator._asks) == 256
    for _ in range(256):
        scene.migrate("big", "c")
    assert scene.refused("small", "c") == "overloaded"
    scene.now_us += 121 * SECOND
    scene.send(Tick())
    assert not scene.core._operator._asks


# --- pauses


def test_paused_nothing_is_planned_but_operators_move() -> None:
    """Until it is resumed; the next epoch plans again."""
    scene = Packed()
    assert scene.send(OperatorAsked("op", MovingRequest(paused=True))) == [Answer("op", MovingReply(paused=True))]
    assert not orders([command for _ in range(6) for command in scene.second()])
    (order,) = orders(scene.send(OperatorAsked("op2", MigrateRequest(ask="x", request="big", target="b"))))
    scene.fail(order, "no_room")
    assert scene.core.moves_paused
    scene.send(OperatorAsked("op3", MovingRequest(paused=False)))
    assert scene.order().order.sequence == "small"


# --- names, and what a status shows


def test_a_worker_goes_by_its_name_where_that_is_unique() -> None:
    """Of a restarted one the incarnation that is heard; else the ids are listed."""
    scene = Operated()
    scene.join("a-2", name="a", migration_modes=ALL)
    reply = scene.tell(MovingRequest(paused=True))
    assert isinstance(reply, MovingReply)
    assert scene.tell(DrainRequest(worker="a", dry_run=True)).worker == "a"  # type: ignore[union-attr]
    scene.join("x-1", name="x", migration_modes=ALL)
    scene.join("x-2", name="x", migration_modes=ALL)
    scene.report("x-2")
    assert scene.tell(DrainRequest(worker="x", dry_run=True)).worker == "x-2"  # type: ignore[union-attr]
    scene.report("x-1")
    reply = scene.tell(DrainRequest(worker="x", dry_run=True))
    assert isinstance(reply, AdminRefused)
    assert reply.reason == "ambiguous"
    assert "x-1" in reply.message
    assert "x-2" in reply.message


def test_a_status_lists_sequences_and_counts_moves_at_both_ends() -> None:
    """So that one can be picked, and a worker's load be understood."""
    scene = Operated()
    scene.migrate("big", "c")
    scene.ask("waits", 1_550, 16, request_id="r")
    scene.ask("fresh", 16, 16)
    rows = {row.sequence: (row.state, row.worker, row.target, row.request_id) for row in sequence_statuses(scene.core)}
    assert rows["big"] == ("moving", "a", "c", "")
    assert rows["small"] == ("running", "b", "", "")
    assert rows["waits"] == ("waiting", "", "", "r")
    assert rows["fresh"][0] == "placed"
    counts = {s.worker: (s.sequences, s.leaving, s.coming) for s in worker_statuses(scene.core, scene.now_us)}
    assert (counts["a"][1:], counts["c"][1:]) == ((1, 0), (0, 1))


def test_the_term_of_orders_is_the_leader_s() -> None:
    """A later leader's drains carry its own."""
    scene = Operated()
    scene.send(LeadershipTaken(9))
    (command,) = [c for c in scene.order_of(DrainRequest(worker="a"))[1] if isinstance(c, OrderDrain)]
    assert command.order.term == 9
