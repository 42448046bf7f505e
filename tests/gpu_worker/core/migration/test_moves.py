"""Moves that are refused, called off, outrun, repeated; what is held for them, and what is left."""

from typing import Any

import pytest

from mell_gpu_worker.core.commands import (
    AskFrontend,
    AskPeer,
    CloseLink,
    OfferKv,
    OpenLink,
    PublishEvent,
    Reply,
    SendBlocks,
)
from mell_gpu_worker.core.events import (
    AskFailure,
    BlocksSent,
    CommandReceived,
    FrontendAnswered,
    FrontendUnanswered,
    KvOffered,
    LinkClosed,
    LinkOpened,
    PeerAnswered,
    PeerUnanswered,
    RoundArrived,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.migration.limits import MoveLimits
from mell_shared.messages.frontend import Granted, Refused
from mell_shared.messages.scheduler import MigrationFailed, SequenceFinished, WorkerReport
from mell_shared.messages.worker import (
    Cancel,
    CancelDone,
    CaughtUp,
    CommandInvalid,
    CommitGranted,
    CommitMigration,
    CommitRefused,
    Drain,
    ExtendKv,
    KvRefused,
    KvReleased,
    KvReserved,
    Migrate,
    MigrateAccepted,
    MigrateRefused,
    ReleaseKv,
    Resend,
    ResendDone,
    ReserveKv,
    Submit,
    SubmitAccepted,
    SubmitRefused,
)
from mell_shared.models import FAKE_MODEL
from tests.gpu_worker.core.worlds import SECOND_US, CoreWorld, only, submit

from .cluster import ALL_MODES, STEP_US, Asker, Cluster
from .network import MS_US, Flight, Verdict, undisturbed

LONG = bytes(range(65, 91)) * 3
MODES = pytest.mark.parametrize("mode", ALL_MODES)


def world(**changes: Any) -> CoreWorld:
    """One worker that moves sequences in every mode."""
    return CoreWorld(**({"migration_modes": ALL_MODES} | changes))


def migrate(migration: str = "m1", **changes: Any) -> Migrate:
    """An order to move "a" to "w2"."""
    fields = {"sequence": "a", "generation": 1, "target": "w2", "mode": "kv", "reason": "manual", "term": 1}
    return Migrate(migration=migration, **(fields | changes))


def reserve(migration: str = "m1", **changes: Any) -> ReserveKv:
    """A request to hold room for "a", which has two output tokens."""
    own = {name: changes.pop(name) for name in list(changes) if name in ReserveKv.model_fields}
    message = submit("a", changes.pop("prompt", b"hello, my dear"), **changes)
    fields = {
        "sequence": "a",
        "generation": 1,
        "source": "w9",
        "frontend": "f1",
        "model": FAKE_MODEL,
        "kv_layout": "fake-1-4",
        "block_tokens": 4,
        "prompt_ids": message.prompt_ids,
        "output_ids": [65, 66],
        "sampling": message.sampling,
        "max_outputs": 20,
        "mode": "kv",
        "growth_tokens": 8,
    }
    return ReserveKv(migration=migration, **(fields | own))


def held(target: CoreWorld, message: ReserveKv | None = None) -> tuple[OfferKv, KvReserved]:
    """Let a worker hold room and make its offer; returns the offer and the answer."""
    message = message or reserve()
    (offer,) = only(OfferKv, target.tell(CommandReceived(message, "reserve")))
    (reply,) = only(Reply, target.tell(KvOffered(message.migration, "there", b"secret", 4 * len(offer.blocks))))
    assert reply.reply_to == "reserve"
    assert isinstance(reply.message, KvReserved)
    return offer, reply.message


def commit(migration: str = "m1", **changes: Any) -> CommitMigration:
    """The end of the move that `held` began: four blocks were sent."""
    fields = {"first_index": 2, "output_ids": [67], "computed_tokens": 16, "sent_slots": [0, 1, 2, 3], "mode": "kv"}
    return CommitMigration(migration=migration, **(fields | changes))


def free(target: CoreWorld) -> int:
    """Free blocks."""
    return target.core.batcher.pool.free_blocks


def failures(source: CoreWorld) -> list[str]:
    """Why moves from here have failed."""
    events = [command.message for command in only(PublishEvent, source.commands)]
    return [event.reason for event in events if isinstance(event, MigrationFailed)]


@pytest.mark.parametrize(("planned_tokens", "growth_tokens"), [(0, 39), (36, 20), (17, 8), (4_000, 39)])
def test_a_source_asks_for_the_room_that_was_planned(planned_tokens: int, growth_tokens: int) -> None:
    """What its 16 tokens need to get there, at least a few steps; where the plan does not say, a fixed amount."""
    source = world()
    source.ask(submit(prompt=b"hello, my dear", max_tokens=41))
    source.finish_step()
    source.finish_step()
    source.ask(migrate(planned_tokens=planned_tokens))
    (question,) = (c.message for c in only(AskPeer, source.commands) if isinstance(c.message, ReserveKv))
    assert question.growth_tokens == growth_tokens


# --- orders that are refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sequence": "b"}, "unknown"),
        ({"generation": 2}, "superseded"),
        ({"target": "w1"}, "unsupported"),
    ],
)
def test_orders_that_cannot_be_obeyed(changes: dict[str, Any], reason: str) -> None:
    """Refused with a reason of `MigrationFailed`'s and words; the sequence is left as it is."""
    source = world()
    source.ask(submit(max_tokens=40))
    reply = source.ask(migrate(**changes))
    assert isinstance(reply, MigrateRefused)
    assert (reply.reason, bool(reply.message), reply.term) == (reason, True, 1)
    assert not source.core.moves


def test_a_worker_that_cannot_move_says_so() -> None:
    """In no mode, or not in this one."""
    for modes in ((), ("tokens",)):
        source = world(migration_modes=modes)
        source.ask(submit(max_tokens=40))
        reply = source.ask(migrate())
        assert isinstance(reply, MigrateRefused)
        assert reply.reason == "unsupported"


def test_what_has_ended_is_not_moved_and_what_was_preempted_not_by_its_kv() -> None:
    """One that has ended has nothing to move, one that was preempted no KV."""
    source = world(kv_blocks=6)
    source.ask(submit("a", b"1234567", max_tokens=12, priority=1))
    source.ask(submit("b", b"abcdefg", max_tokens=12))
    while not source.core.batcher.waiting:
        source.finish_step()
    reply = source.ask(migrate(sequence="b"))
    assert isinstance(reply, MigrateRefused)
    assert reply.reason == "preempted"
    while source.core.batcher.waiting:
        source.finish_step()
    reply = source.ask(migrate("m2"))
    assert isinstance(reply, MigrateRefused)
    assert reply.reason == "ended"


def test_only_the_newest_schedulers_orders_are_obeyed() -> None:
    """A lower term is refused, and the highest known is told."""
    source = world()
    source.ask(submit(max_tokens=40))
    source.ask(Drain(term=7))
    reply = source.ask(migrate(term=6))
    assert reply == MigrateRefused(reason="term", message=reply.message, term=7)
    assert source.ask(migrate("m2", term=7)) == MigrateAccepted()


def test_one_move_at_a_time_and_several_sequences_at_once() -> None:
    """A moving sequence is busy, and so is a worker with as many moves as it may have."""
    source = world(moves=MoveLimits(max_outgoing=2))
    for name in "abc":
        source.ask(submit(name, name.encode() * 5, max_tokens=20))
    assert source.ask(migrate("m1")) == MigrateAccepted()
    assert source.ask(migrate("m1")) == MigrateAccepted(), "a repeat gets the first reply"
    assert len(source.core.moves.source.moving) == 1
    for order in (migrate("m2"), migrate("m4", sequence="c")):
        source.ask(migrate("m3", sequence="b"))
        reply = source.ask(order)
        assert isinstance(reply, MigrateRefused)
        assert reply.reason == "busy"


def test_replies_are_remembered_for_a_minute() -> None:
    """A refusal too is repeated, even if by then the order could be obeyed; later it is judged anew."""
    source = world()
    assert isinstance(source.ask(migrate()), MigrateRefused)
    source.ask(submit(max_tokens=40))
    assert isinstance(source.ask(migrate()), MigrateRefused)
    source.tell(TimePassed(), after_us=61 * SECOND_US)
    source.ask(submit("a", generation=2, max_tokens=40))
    assert source.ask(migrate(generation=2)) == MigrateAccepted()


# --- reservations that are refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 99}, "unsupported"),
        ({"model": "another"}, "unsupported"),
        ({"kv_layout": "fake-1-16"}, "unsupported"),
        ({"block_tokens": 16}, "unsupported"),
        ({"source": "w1"}, "unsupported"),
        ({"prompt_ids": [70_000]}, "unsupported"),
        ({"output_ids": [70_000]}, "unsupported"),
        ({"prompt_ids": []}, "unsupported"),
        ({"mode": "hybrid", "split_tokens": 6}, "unsupported"),
        ({"mode": "hybrid", "split_tokens": 16}, "unsupported"),
        ({"max_outputs": 2}, "ended"),
        ({"max_outputs": 51}, "no_room"),
        ({"growth_tokens": 400, "max_outputs": 50}, "no_room"),
    ],
)
def test_reservations_that_are_never_held(changes: dict[str, Any], reason: str) -> None:
    """Another protocol, model, layout, ids that are none, a limit beyond this worker: refused, and nothing is held."""
    target = world(kv_blocks=16)
    if reason == "no_room":
        target.ask(submit("other", b"123", max_tokens=40))
    before = free(target)
    reply = target.ask(reserve(**changes))
    assert isinstance(reply, KvRefused)
    assert (reply.reason, bool(reply.message)) == (reason, True)
    assert free(target) == before
    assert not target.core.moves


def test_a_grammar_that_the_engine_cannot_use_is_refused() -> None:
    """Before anything is held, with the engine's words."""
    reply = world().ask(reserve(), "no such grammar")
    assert reply == KvRefused(reason="unsupported", message="no such grammar")


def test_a_worker_that_is_drained_or_stops_takes_nothing_in() -> None:
    """Refused as stopping; after the end of a drain it takes sequences in again."""
    target = world()
    target.ask(Drain(term=1))
    reply = target.ask(reserve())
    assert isinstance(reply, KvRefused)
    assert reply.reason == "stopping"


def test_an_older_generation_or_a_second_move_of_a_sequence_is_refused() -> None:
    """What is known here in this generation or a newer one is not taken in; nor twice at once."""
    target = world()
    target.ask(Cancel(sequence="a", generation=1))
    reply = target.ask(reserve())
    assert isinstance(reply, KvRefused)
    assert reply.reason == "superseded"
    held(target, reserve("m2", generation=2))
    reply = target.ask(reserve("m3", generation=2))
    assert isinstance(reply, KvRefused)
    assert reply.reason == "busy"


def test_no_more_come_at_once_than_may() -> None:
    """One more is refused as busy."""
    target = world(kv_blocks=40, moves=MoveLimits(max_incoming=1))
    held(target)
    reply = target.ask(reserve("m2", sequence="b"))
    assert isinstance(reply, KvRefused)
    assert reply.reason == "busy"


def test_an_older_copy_makes_room() -> None:
    """A generation that another worker has superseded is given up when the newer one comes."""
    target = world()
    target.ask(submit("a", LONG[:20], max_tokens=10))
    target.run()
    target.ask(submit("a", LONG[:20], generation=2, max_tokens=14))
    held(target, reserve(generation=3))
    assert target.core.streams.find("a", 2) is None


# --- strangers and repeats at the target


def test_who_names_no_known_migration_gets_nothing() -> None:
    """Neither room nor a sequence, whatever they ask."""
    target = world()
    extend = ExtendKv(migration="m1", number=1, first_index=0, prefill_tokens=4)
    for question, kind in ((extend, KvRefused), (commit(), CommitRefused)):
        reply = target.ask(question)
        assert isinstance(reply, kind)
        assert reply.reason == "unknown"
    assert target.ask(ReleaseKv(migration="m1")) == KvReleased()
    assert not target.core.moves


def test_a_reservation_that_its_release_overtook_is_refused() -> None:
    """Late messages must not hold anything for nobody."""
    target = world()
    target.ask(ReleaseKv(migration="m1"))
    assert isinstance(target.ask(reserve()), KvRefused)
    assert free(target) == 16


def test_a_repeated_reservation_gets_the_first_answer() -> None:
    """While the offer is being made it waits for it too; then it gets it at once; room is held once."""
    target = world()
    (offer,) = only(OfferKv, target.tell(CommandReceived(reserve(), "first")))
    assert not only(Reply, target.tell(CommandReceived(reserve(), "second")))
    (reply,) = only(Reply, target.tell(KvOffered("m1", "there", b"secret", 4 * len(offer.blocks))))
    assert reply.reply_to == "second"
    assert target.ask(reserve()) == reply.message
    assert len(target.core.batcher.arriving) == 1


def test_ids_that_do_not_continue_what_is_held_are_refused() -> None:
    """A gap, more than there is room for, no token of the vocabulary: the source hears of it, and asks its frontend."""
    target = world()
    held(target)
    for changes in ({"first_index": 4}, {"output_ids": [65] * 30}, {"output_ids": [70_000]}):
        reply = target.ask(commit(**changes))
        assert isinstance(reply, CommitRefused)
        assert reply.reason == "unsupported"
    extend = ExtendKv(migration="m1", number=1, first_index=9, output_ids=[1], prefill_tokens=4)
    assert isinstance(target.ask(extend), KvRefused)


def test_a_commit_waits_for_the_last_round_and_for_nothing_else() -> None:
    """The commit may overtake the news of the last blocks; then the frontend is asked, once all is there."""
    target = world()
    held(target)
    target.tell(RoundArrived("m1", (0, 1)))
    assert not target.tell(CommandReceived(commit(), "commit"))
    (ask,) = only(AskFrontend, target.tell(RoundArrived("m1", (2, 3))))
    assert (ask.message.length, ask.message.source, ask.message.target) == (3, "w9", "w1")
    assert target.step is not None, "its first step begins at once"
    assert target.step.rows[0].start == 16


def test_kv_is_valid_as_far_as_its_source_had_computed() -> None:
    """The last block sent may be full of anything beyond: moved in mid-prompt, the rest is computed here."""
    target = world()
    held(target)
    target.tell(RoundArrived("m1", (0, 1, 2, 3)))
    target.tell(CommandReceived(commit(computed_tokens=14), "commit"))
    assert target.step is not None
    assert [(row.start, row.count) for row in target.step.rows] == [(14, 3)]


def test_a_commit_waits_for_the_step_under_way() -> None:
    """While the target prefills for it, its blocks are being written: it runs from the next step on."""
    target = world(max_step_tokens=8)
    held(target, reserve(mode="tokens"))
    assert target.step is not None
    assert not target.tell(CommandReceived(commit(sent_slots=[]), "commit"))
    assert only(AskFrontend, target.finish_step())
    assert [(row.start, row.count) for row in target.step.rows] == [(8, 8)]


def test_a_commit_waits_for_prefill_before_what_was_sent() -> None:
    """A hole before the blocks that came would make them worthless: the part split off is computed first."""
    target = world(max_step_tokens=8, kv_blocks=20)
    held(target, reserve(mode="hybrid", split_tokens=12, prompt=LONG[:22]))
    target.tell(RoundArrived("m1", (3, 4, 5)))
    told = target.tell(CommandReceived(commit(sent_slots=[3, 4, 5], computed_tokens=24), "commit"))
    assert not only(AskFrontend, told + target.finish_step())
    assert only(AskFrontend, target.finish_step())
    assert [(row.start, row.count) for row in target.step.rows] == [(24, 1)]


def test_a_repeated_commit_gets_the_same_answer() -> None:
    """While the frontend is asked the last one waits; afterwards each gets what was decided."""
    target = world()
    held(target)
    target.tell(RoundArrived("m1", (0, 1, 2, 3)))
    (ask,) = only(AskFrontend, target.tell(CommandReceived(commit(), "first")))
    assert not only(Reply, target.tell(CommandReceived(commit(), "second")))
    told = target.tell(FrontendAnswered("f1", ask.message, Granted(generation=2, accepted=3)))
    assert only(Reply, told) == [Reply("second", CommitGranted(generation=2))]
    assert target.ask(commit()) == CommitGranted(generation=2)
    target.tell(LinkClosed("m1"))
    target.run()
    assert target.ask(commit()) == CommitGranted(generation=2)


def test_a_release_does_not_drop_a_claim_under_way() -> None:
    """It may have been granted already: only the frontend's answer decides."""
    target = world()
    held(target)
    target.tell(RoundArrived("m1", (0, 1, 2, 3)))
    (ask,) = only(AskFrontend, target.tell(CommandReceived(commit(), "commit")))
    assert target.ask(ReleaseKv(migration="m1")) == KvReleased()
    target.tell(FrontendAnswered("f1", ask.message, Granted(generation=2, accepted=3)))
    target.tell(LinkClosed("m1"))
    target.run()
    assert len(target.output(generation=2)) == 17, "it has three of its twenty outputs from its source"


def test_a_refused_claim_frees_everything_and_publishes_nothing() -> None:
    """However far it was computed by then."""
    target = world()
    held(target)
    target.tell(RoundArrived("m1", (0, 1, 2, 3)))
    (ask,) = only(AskFrontend, target.tell(CommandReceived(commit(), "commit")))
    target.finish_step()
    target.finish_step()
    (reply,) = only(Reply, target.tell(FrontendAnswered("f1", ask.message, Refused(reason="owner"))))
    assert isinstance(reply.message, CommitRefused)
    assert isinstance(target.ask(commit()), CommitRefused)
    target.tell(LinkClosed("m1"))
    target.run()
    assert free(target) == 16
    assert target.output() == []


def test_a_cancellation_that_overtakes_the_grant_wins() -> None:
    """The frontend granted, its client left at once, and its second word came first: nothing runs on."""
    target = world()
    held(target)
    target.tell(RoundArrived("m1", (0, 1, 2, 3)))
    (ask,) = only(AskFrontend, target.tell(CommandReceived(commit(), "commit")))
    target.ask(Cancel(sequence="a", generation=2))
    told = target.tell(FrontendAnswered("f1", ask.message, Granted(generation=2, accepted=3)))
    assert only(Reply, told) == [Reply("commit", CommitGranted(generation=2))], "its source must free it"
    target.tell(LinkClosed("m1"))
    target.run()
    assert free(target) == 16
    assert not target.core.moves
    assert target.output(generation=2) == []


def test_a_sequence_that_ends_before_its_grant_ends_with_it() -> None:
    """Its last tokens and its end are published when the frontend has granted it, not before."""
    target = world()
    held(target, reserve(max_tokens=4, max_outputs=4))
    target.tell(RoundArrived("m1", (0, 1, 2, 3)))
    (ask,) = only(AskFrontend, target.tell(CommandReceived(commit(), "commit")))
    target.run()
    assert not [c for c in only(PublishEvent, target.commands) if isinstance(c.message, SequenceFinished)]
    target.tell(FrontendAnswered("f1", ask.message, Granted(generation=2, accepted=1)))
    assert len(target.output(generation=2)) == 3
    ends = [c.message for c in only(PublishEvent, target.commands) if isinstance(c.message, SequenceFinished)]
    assert [(end.generation, end.reason) for end in ends] == [(2, "length")]
    target.tell(LinkClosed("m1"))
    assert free(target) == 16


# --- what is held, and for how long


def test_blocks_are_free_only_when_the_transfer_is_closed() -> None:
    """A release drops the reservation at once; its blocks may be written until the link is closed."""
    target = world()
    offer, _ = held(target)
    assert free(target) == 16 - len(offer.blocks)
    told = target.tell(CommandReceived(ReleaseKv(migration="m1"), "release"))
    assert only(CloseLink, told) == [CloseLink("m1")]
    assert free(target) == 16 - len(offer.blocks)
    target.tell(LinkClosed("m1"))
    assert free(target) == 16


def test_a_reservation_whose_source_falls_silent_expires() -> None:
    """What is heard of a source keeps its reservation; silence ends it."""
    target = world(moves=MoveLimits(idle_us=3 * SECOND_US))
    held(target)
    target.tell(RoundArrived("m1", (0,)), after_us=2 * SECOND_US)
    target.tell(TimePassed(), after_us=2 * SECOND_US)
    assert target.core.moves.target.coming
    assert target.core.wake_us <= target.now_us + SECOND_US
    assert only(CloseLink, target.tell(TimePassed(), after_us=SECOND_US)) == [CloseLink("m1")]
    target.tell(LinkClosed("m1"))
    assert free(target) == 16
    reply = target.ask(commit())
    assert isinstance(reply, CommitRefused)
    assert reply.reason == "timeout"


def test_reports_count_what_is_held_and_list_only_what_is_owned() -> None:
    """The scheduler must not give the same room away twice, nor see a sequence at two workers."""
    target = world()
    offer, _ = held(target)
    target.tell(TimePassed(), after_us=SECOND_US)
    report = [c.message for c in only(PublishEvent, target.commands) if isinstance(c.message, WorkerReport)][-1]
    assert report.used_blocks == report.reserved_blocks == len(offer.blocks)
    assert report.sequences == ()


def test_short_of_blocks_a_reservation_goes_before_anybody_is_preempted() -> None:
    """Its source still has everything. Until the link is closed the decode that needs a block sits out."""
    target = world(kv_blocks=12)
    target.ask(submit("own", LONG[:20], max_tokens=26))
    target.finish_step()
    offer, _ = held(target, reserve(growth_tokens=4, max_outputs=4))
    assert len(offer.blocks) == 5
    closed = False
    while target.core.batcher.running:
        if target.step is not None:
            told = target.finish_step()
        if only(CloseLink, told):
            closed = True
            assert target.step is None, "nobody can be computed before blocks are back"
            told = target.tell(LinkClosed("m1"))
    assert closed
    assert target.core.batcher.preemptions == 0
    assert len(target.output("own")) == 26
    assert free(target) == 12


def test_what_arrives_is_prefilled_after_the_workers_own() -> None:
    """A worker's own prompts come first in each step's budget; the rest of it goes to what is on its way here."""
    target = world(kv_blocks=40, max_step_tokens=16, max_model_len=150, max_sequences=4)
    target.ask(submit("own", LONG[:24], max_tokens=20))
    held(target, reserve(mode="tokens", prompt=LONG[:30:-1]))
    steps = []
    while target.step is not None and len(steps) < 4:
        steps.append([(row.sequence, row.count) for row in target.step.rows])
        target.finish_step()
    assert steps == [[("own", 16)], [("own", 8), ("a", 8)], [("own", 1), ("a", 15)], [("own", 1), ("a", 15)]]


# --- what the source makes of answers


def asked_of_peer(source: CoreWorld) -> list[AskPeer]:
    """All questions to other workers so far."""
    return only(AskPeer, source.commands)


def test_only_the_answer_to_the_open_question_counts() -> None:
    """Late ones, to a question that was given up or to none, change nothing."""
    source = world()
    source.ask(submit(max_tokens=40))
    source.finish_step()
    source.ask(migrate(mode="tokens"))
    room = KvReserved(held_tokens=0, slots=14, address="", secret=b"", size_bytes=0, step_tokens=8)
    (reserving,) = asked_of_peer(source)
    source.tell(PeerAnswered("w2", reserving.message, room))
    (_, extending) = asked_of_peer(source)
    assert isinstance(extending.message, ExtendKv)
    old = extending.message.model_copy(update={"number": 99})
    for late in (PeerAnswered("w2", old, CaughtUp(computed_tokens=5)), PeerAnswered("w2", reserving.message, room)):
        source.tell(late)
        source.tell(PeerUnanswered("w2", late.message, "no_responder"))
    assert len(asked_of_peer(source)) == 2
    source.tell(PeerAnswered("w2", extending.message, CaughtUp(computed_tokens=5)))
    source.finish_step()
    assert isinstance(asked_of_peer(source)[-1].message, CommitMigration)


def test_a_target_that_does_not_get_on_is_told_to_stop_and_sent_the_rest() -> None:
    """After a few answers without progress it prefills no further; what it has by then is not sent."""
    source = world()
    source.ask(submit("a", b"1234567890", max_tokens=40))
    source.finish_step()
    source.ask(migrate(mode="tokens"))
    room = KvReserved(held_tokens=0, slots=14, address="there", secret=b"s", size_bytes=99, step_tokens=8)
    source.tell(PeerAnswered("w2", asked_of_peer(source)[0].message, room))
    goals = []
    for computed in (4, 4, 4, 4, 4, 5):
        question = asked_of_peer(source)[-1].message
        assert isinstance(question, ExtendKv)
        goals.append(question.prefill_tokens)
        told = source.tell(PeerAnswered("w2", question, CaughtUp(computed_tokens=computed)))
    assert goals == [10, 10, 10, 10, 10, 0]
    assert only(OpenLink, told) == [OpenLink("m1", "there", b"s", 99, MoveLimits().link_us)]
    (send,) = only(SendBlocks, source.tell(LinkOpened("m1")) + source.finish_step())
    assert [slot for slot, _ in send.blocks] == [1, 2]


@pytest.mark.parametrize(("took_us", "timeout_us"), [(900, 1_000_000), (2_500_000, 4_000_000), (9_000_000, 5_000_000)])
def test_the_last_blocks_are_waited_for_as_long_as_those_before_let_expect(took_us: int, timeout_us: int) -> None:
    """The sequence stands still meanwhile: a target that has just stopped is given up soon."""
    source = world()
    source.ask(submit("a", LONG[:22], max_tokens=40))
    source.finish_step()
    source.ask(migrate())
    room = KvReserved(held_tokens=0, slots=14, address="there", secret=b"s", size_bytes=99, step_tokens=8)
    source.tell(PeerAnswered("w2", asked_of_peer(source)[0].message, room))
    (first,) = only(SendBlocks, source.tell(LinkOpened("m1")) + source.finish_step())
    assert first.timeout_us == MoveLimits().send_us
    told = source.tell(BlocksSent("m1", 24, took_us))
    while not (tail := only(SendBlocks, told)):
        told = source.finish_step()
    assert [(len(send.blocks), send.timeout_us) for send in tail] == [(1, timeout_us)]


def test_where_only_ids_move_a_target_that_does_not_get_on_is_waited_for() -> None:
    """Its progress may not be seen, as at an engine that prefills whole prompts: only the move's own time ends that."""
    source = world(migration_modes=("tokens",))
    source.ask(submit("a", b"1234567890", max_tokens=40))
    source.finish_step()
    source.ask(migrate(mode="tokens"))
    room = KvReserved(held_tokens=0, slots=14, address="", secret=b"", size_bytes=0, step_tokens=8)
    source.tell(PeerAnswered("w2", asked_of_peer(source)[0].message, room))
    for _ in range(12):
        question = asked_of_peer(source)[-1].message
        assert isinstance(question, ExtendKv)
        source.tell(PeerAnswered("w2", question, CaughtUp(computed_tokens=0)))
    assert not failures(source)
    source.tell(TimePassed(), after_us=MoveLimits().move_us)
    assert failures(source) == ["timeout"]


@pytest.mark.parametrize("failure", ["timeout", "no_responder", "disconnected", "invalid"])
def test_a_target_that_does_not_answer_a_reservation_may_hold_one(failure: AskFailure) -> None:
    """It is told to release it; the sequence never stopped."""
    source = world()
    source.ask(submit(max_tokens=40))
    source.ask(migrate())
    told = source.tell(PeerUnanswered("w2", asked_of_peer(source)[0].message, failure))
    assert [ask.message for ask in only(AskPeer, told)] == [ReleaseKv(migration="m1")]
    assert failures(source) in (["timeout"], ["unreachable"], ["unsupported"])
    again = source.ask(migrate())
    assert isinstance(again, MigrateRefused), "whoever leads only now has not heard of the failure"
    assert [again.reason] == failures(source)
    source.run()
    assert len(source.output()) == 40


def test_a_release_is_repeated_a_few_times() -> None:
    """Then the reservation's expiry has to do."""
    source = world()
    source.ask(submit(max_tokens=40))
    source.ask(migrate())
    source.tell(PeerUnanswered("w2", asked_of_peer(source)[0].message, "timeout"))
    for _ in range(5):
        source.tell(PeerUnanswered("w2", ReleaseKv(migration="m1"), "timeout"))
    assert [ask.message.kind for ask in asked_of_peer(source)] == ["reserve_kv"] + ["release_kv"] * 3


def test_a_target_whose_answer_makes_no_sense_gets_nothing() -> None:
    """Room that no sequence fits into, or an answer to another question: called off, and released."""
    for nonsense in (
        KvReserved(held_tokens=3, slots=4, address="", secret=b"", size_bytes=0, step_tokens=1),
        KvReserved(held_tokens=400, slots=4, address="", secret=b"", size_bytes=0, step_tokens=1),
        CommandInvalid(message="what is reserve_kv?"),
        KvReleased(),
    ):
        source = world()
        source.ask(submit(max_tokens=40))
        source.ask(migrate())
        source.tell(PeerAnswered("w2", asked_of_peer(source)[0].message, nonsense))
        assert failures(source) == ["unsupported"]
        assert isinstance(asked_of_peer(source)[-1].message, ReleaseKv)
        source.run()
        assert len(source.output()) == 40


# --- what happens to the sequence meanwhile


def at(cluster: Cluster, what: str) -> None:
    """Let things happen until a message of this kind has been sent."""
    start = len(cluster.network.flights)
    cluster.run_until(lambda: any(flight.what == what for flight in cluster.network.flights[start:]))


MOMENTS = ["ReserveKv", "KvReserved", "SendBlocks", "CommitMigration", "Claim", "Granted", "CommitGranted"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_client_that_leaves_in_mid_move_leaves_nothing_behind(moment: str) -> None:
    """Whenever it leaves, both workers are empty soon."""
    cluster = Cluster()
    cluster.open("a", LONG, max_tokens=40)
    cluster.tokens(5)
    cluster.migrate("a", "w2", "hybrid")
    at(cluster, moment)
    cluster.close("a")
    del cluster.readers["a"]
    cluster.finish()
    ends = [event for event in cluster.events if isinstance(event, SequenceFinished)]
    assert all(end.reason == "cancelled" for end in ends)
    if moment in {"CommitMigration", "Claim"}:
        assert not any(end.worker == "w1" for end in ends), "it might have been granted: not its source's to tell"


@pytest.mark.parametrize(
    ("mode", "slow"),
    [
        *(("kv", slow) for slow in ("KvReserved", "OpenLink", "SendBlocks")),
        *(("hybrid", slow) for slow in ("KvReserved", "OpenLink", "SendBlocks", "CaughtUp")),
    ],
)
def test_a_sequence_that_is_preempted_in_mid_copy_stays(mode: str, slow: str) -> None:
    """The move is called off, blocks being sent come free a moment later, and the sequence comes back where it was."""
    cluster = Cluster(kv_blocks=40, max_step_tokens=8)
    cluster.open("first", LONG, priority=1, max_tokens=80)
    cluster.tokens(36, "first")
    cluster.open("a", LONG[::-1][:24], max_tokens=60)
    cluster.tokens(1)
    cluster.network.plan = lambda flight: "delay" if flight.what == slow else "deliver"
    cluster.migrate("a", "w2", mode)
    cluster.finish()
    assert cluster.nodes["w1"].core.batcher.preemptions == 1
    settled = [event.reason for event in cluster.failed()] + [event.mode for event in cluster.committed()]
    assert settled in (["preempted"], [mode]), settled
    if slow == "KvReserved":
        assert settled == ["preempted"]


def test_a_preempted_sequence_is_moved_by_its_tokens_to_where_there_is_room() -> None:
    """It holds nothing here, so it is prefilled there, and goes on long before there is room here again."""
    cluster = Cluster(kv_blocks=40)
    cluster.open("first", LONG, priority=1, max_tokens=80)
    cluster.tokens(36, "first")
    cluster.open("a", LONG[::-1][:24], max_tokens=24)
    waiting = cluster.nodes["w1"].core.batcher.waiting
    cluster.run_until(lambda: bool(waiting))
    cluster.migrate("a", "w2", "tokens")
    cluster.run_until(lambda: cluster.readers["a"].done)
    assert not cluster.readers["first"].done
    assert not waiting
    cluster.finish()
    assert [(event.mode, event.copied_bytes) for event in cluster.committed()] == [("tokens", 0)]


def test_a_move_by_tokens_outlives_the_preemption_of_its_sequence() -> None:
    """Nothing is copied, so losing its blocks in mid-move takes nothing from the move."""
    cluster = Cluster(kv_blocks=40, max_step_tokens=8)
    cluster.open("first", LONG, priority=1, max_tokens=80)
    cluster.tokens(36, "first")
    cluster.open("a", LONG[::-1][:24], max_tokens=24)
    cluster.tokens(1)
    cluster.network.plan = lambda flight: "delay" if flight.what == "CaughtUp" else "deliver"
    cluster.migrate("a", "w2", "tokens")
    cluster.run_until(lambda: cluster.nodes["w1"].core.batcher.preemptions > 0)
    assert cluster.nodes["w1"].core.moves.source.moving, "it had moved before"
    cluster.finish()
    assert [event.mode for event in cluster.committed()] == ["tokens"]


def test_who_came_by_a_move_does_not_give_way_before_who_came_later() -> None:
    """Its age comes along: at its target it stands before what began there after it had begun elsewhere."""
    cluster = Cluster()
    cluster.place = lambda name: "w2" if name == "late" else "w1"
    cluster.open("a", LONG[:20], max_tokens=40)
    cluster.tokens(5, "a")
    cluster.open("late", LONG[30:10:-1], max_tokens=40)
    cluster.tokens(5, "late")
    cluster.migrate("a", "w2", "kv")
    cluster.run_until(lambda: cluster.owner()[0] == "w2" and len(cluster.nodes["w2"].core.batcher.running) == 2)
    assert [row.sequence for row in cluster.nodes["w2"].core.batcher.running] == ["a", "late"]
    cluster.finish()


def test_a_target_without_room_is_told_from_one_that_fails() -> None:
    """The sequence goes on where it is, and the scheduler hears that it was about room."""
    cluster = Cluster(kv_blocks=24)
    cluster.place = lambda name: "w2" if name == "full" else "w1"
    cluster.open("full", LONG[:70], max_tokens=20)
    cluster.open("a", LONG[::-1][:30], max_tokens=40)
    cluster.tokens(5)
    cluster.migrate("a", "w2")
    cluster.finish()
    assert [event.reason for event in cluster.failed()] == ["no_room"]


def _rows(cluster: Cluster) -> int:
    """How often the target has computed anything of "a"."""
    return sum(name == "a" for name, _, _ in cluster.nodes["w2"].computed)


def test_a_target_that_is_told_to_stop_prefilling_answers_when_it_has() -> None:
    """Not while a step writes to its blocks, which the source is about to send; then nothing more is computed."""
    target = world(max_step_tokens=8, kv_blocks=20)
    held(target, reserve(mode="tokens", prompt=LONG[:22]))
    assert target.step is not None
    stop = ExtendKv(migration="m1", number=1, first_index=2, prefill_tokens=0)
    assert not target.tell(CommandReceived(stop, "stop"))
    assert target.finish_step() == [Reply("stop", CaughtUp(computed_tokens=8))]
    assert target.step is None


def test_a_target_says_how_far_it_is_when_it_takes_long() -> None:
    """A question is held until all is computed, or for half a second; then it is asked again."""
    target = world(max_step_tokens=8, kv_blocks=20)
    held(target, reserve(mode="tokens", prompt=LONG[:22]))
    ask = ExtendKv(migration="m1", number=1, first_index=2, output_ids=[67], prefill_tokens=24)
    assert not target.tell(CommandReceived(ask, "first"))
    target.tell(TimePassed(), after_us=SECOND_US // 2)
    assert only(Reply, target.finish_step()) == [Reply("first", CaughtUp(computed_tokens=8))]
    assert not target.tell(CommandReceived(ask.model_copy(update={"number": 2}), "second"))
    assert not only(Reply, target.finish_step())
    assert only(Reply, target.finish_step()) == [Reply("second", CaughtUp(computed_tokens=24))]
    assert target.step is None, "the last token is left for the step that samples"


def test_a_target_that_does_not_catch_up_gets_kv_instead() -> None:
    """Rounds that do not shrink end in a copy, of what it has not computed by then."""
    cluster = Cluster(kv_blocks=340, max_step_tokens=8)
    cluster.place = lambda name: "w1" if name == "a" else "w2"
    cluster.open("a", LONG, max_tokens=250)
    cluster.tokens(5)
    for number in range(7):
        cluster.open(f"s{number}", LONG[:20], max_tokens=160, seed=number, priority=1)
    cluster.run_for(40 * STEP_US)
    cluster.migrate("a", "w2", "tokens")
    at(cluster, "SendBlocks")
    prefilled = _rows(cluster)
    at(cluster, "CommitMigration")
    assert _rows(cluster) == prefilled, "it prefills what is being sent"
    cluster.finish()
    (committed,) = cluster.committed()
    assert committed.mode == "kv"
    assert cluster.links.copied_blocks > 0


def test_without_a_transport_a_target_that_does_not_catch_up_gets_nothing() -> None:
    """The move fails, and says so."""
    cluster = Cluster(kv_blocks=340, max_step_tokens=8, migration_modes=("tokens",))
    cluster.place = lambda name: "w1" if name == "a" else "w2"
    cluster.open("a", LONG, max_tokens=250)
    cluster.tokens(5)
    for number in range(7):
        cluster.open(f"s{number}", LONG[:20], max_tokens=160, seed=number, priority=1)
    cluster.run_for(40 * STEP_US)
    cluster.migrate("a", "w2", "tokens")
    cluster.finish()
    assert [event.reason for event in cluster.failed()] == ["timeout"]


@MODES
def test_a_sequence_that_outgrows_its_room_stops_early(mode: str) -> None:
    """It decodes more than was asked for while its blocks travel: it stops before they would not fit, and moves."""
    cluster = Cluster(kv_blocks=60, moves=MoveLimits(growth_tokens=8))
    cluster.open("a", LONG, max_tokens=100)
    cluster.tokens(5)
    slow = {"SendBlocks", "CaughtUp"}
    cluster.network.plan = lambda flight: "delay" if flight.what in slow else "deliver"
    cluster.migrate("a", "w2", mode)
    cluster.finish()
    assert len(cluster.committed()) == 1


@pytest.mark.parametrize("mode", ["kv", "hybrid"])
def test_a_sequence_that_outgrew_its_room_before_it_was_given_stays(mode: str) -> None:
    """The answer took so long that the blocks do not fit any more: none is sent, and the move is called off."""
    cluster = Cluster(kv_blocks=60, moves=MoveLimits(growth_tokens=2))
    cluster.open("a", LONG, max_tokens=100)
    cluster.tokens(5)
    cluster.network.plan = lambda flight: "delay" if flight.what in {"ReserveKv", "KvReserved"} else "deliver"
    cluster.migrate("a", "w2", mode)
    cluster.finish()
    assert [event.reason for event in cluster.failed()] == ["no_room"]


def test_tokens_need_no_transport() -> None:
    """A worker that moves by ids alone makes no offer."""
    cluster = Cluster(migration_modes=("tokens",))
    cluster.open("a", LONG, max_tokens=40)
    cluster.tokens(5)
    cluster.migrate("a", "w2", "tokens")
    cluster.finish()
    assert len(cluster.committed()) == 1


def test_late_words_to_where_it_was_change_nothing() -> None:
    """The source still knows the key for a while: repeats and late commands get sensible answers."""
    cluster = Cluster()
    cluster.open("a", LONG, max_tokens=40)
    cluster.tokens(5)
    cluster.migrate("a", "w2")
    cluster.run_until(lambda: cluster.owner()[0] == "w2" and not cluster.nodes["w1"].core.moves)
    replies: list[Any] = []
    late = Submit(
        sequence="a", generation=1, frontend="f1", model=FAKE_MODEL, prompt_ids=[1], sampling=submit().sampling
    )
    old = late.model_copy(update={"generation": 0 + 1})
    for word in (
        old,
        Resend(sequence="a", generation=1, first_index=0),
        Cancel(sequence="a", generation=1),
    ):
        cluster.ask_worker(Asker("f1", replies.append, replies.append), "w1", word, SECOND_US)
        cluster.run_for(5 * MS_US)
    assert [type(reply) for reply in replies] == [SubmitAccepted, ResendDone, CancelDone]
    assert replies[1] == ResendDone(known=False)
    assert not len(cluster.nodes["w1"].core.streams)
    cluster.finish()


# --- when the frontend is not heard


def test_a_source_left_without_any_answer_goes_on_after_a_while() -> None:
    """The claim was granted, but nobody who says so is heard: the source decodes on, and is fenced off."""
    cluster = Cluster()
    cluster.open("a", LONG[:20], max_tokens=80)
    cluster.tokens(5)
    deaf = [True]

    def plan(flight: Flight) -> Verdict:
        lost = {"CommitMigration", "CommitRefused", "CommitGranted", "MigrationAborted"}
        return "lose" if deaf[0] and flight.what in lost else "deliver"

    cluster.network.plan = plan
    source = cluster.nodes["w1"].core
    cluster.migrate("a", "w2")
    cluster.run_until(lambda: any(row.halted for row in source.batcher.running))
    stopped_us = cluster.network.now_us
    cluster.run_until(lambda: not any(row.halted for row in source.batcher.running))
    waited_us = cluster.network.now_us - stopped_us
    limits = MoveLimits()
    assert limits.ask_us <= waited_us <= limits.ask_us + limits.commit_timeout_us + SECOND_US
    deaf[0] = False
    cluster.finish()
    assert len(cluster.readers["a"].ids) == 80


def test_a_granted_move_that_nobody_confirms_is_over_when_the_frontend_says_so() -> None:
    """The target's answer is lost; asked, the frontend says that the source does not own it any more."""
    cluster = Cluster()
    cluster.open("a", LONG[:20], max_tokens=80)
    cluster.tokens(5)
    cluster.network.plan = lambda flight: "lose" if flight.what in {"CommitGranted", "StreamStatus"} else "deliver"
    cluster.migrate("a", "w2")
    cluster.run_for(3 * SECOND_US)
    cluster.network.plan = undisturbed
    cluster.finish()
    assert len(cluster.committed()) == 1
    assert not cluster.failed()
    assert any(flight.what == "AbortMigration" for flight in cluster.network.flights)


def test_a_claim_that_cannot_be_settled_is_repeated_then_given_up() -> None:
    """A frontend that never answers its target: the same claim again and again, past the deadline all is free."""
    target = world(moves=MoveLimits(claim_deadline_us=2 * SECOND_US))
    held(target)
    target.tell(RoundArrived("m1", (0, 1, 2, 3)))
    asked = only(AskFrontend, target.tell(CommandReceived(commit(), "commit")))
    target.tell(LinkClosed("m1"))
    target.run()
    for _ in range(5):
        target.tell(FrontendUnanswered("f1", asked[0].message), after_us=SECOND_US // 5)
        asked += only(AskFrontend, target.tell(TimePassed(), after_us=SECOND_US // 5))
    assert len(asked) == 5
    assert len({ask.message.model_dump_json() for ask in asked}) == 1
    assert free(target) == 16
    assert not target.core.moves
    assert target.output() == []


# --- stopping


def test_moves_go_on_while_a_worker_stops() -> None:
    """On SIGTERM a worker lets its sequences be moved away, and leaves when the last one has gone."""
    cluster = Cluster(max_model_len=600, kv_blocks=150)
    cluster.open("a", LONG, max_tokens=400)
    cluster.tokens(5)
    cluster.nodes["w1"].tell(StopRequested())
    cluster.migrate("a", "w2")
    cluster.run_until(lambda: cluster.nodes["w1"].exited)
    assert cluster.owner() == ("w2", 2)
    assert len(cluster.readers["a"].ids) < 100, "it did not wait for the end"
    cluster.finish()
    assert cluster.frontend.stats.evictions == 0


@pytest.mark.parametrize("moment", ["KvReserved", "SendBlocks", "CommitMigration", "Claim", "Granted"])
def test_a_target_that_stops_keeps_what_is_committed_and_drops_the_rest(moment: str) -> None:
    """Either way the client sees nothing of it."""
    cluster = Cluster()
    cluster.open("a", LONG, max_tokens=40)
    cluster.tokens(5)
    cluster.migrate("a", "w2")
    at(cluster, moment)
    cluster.nodes["w2"].tell(StopRequested())
    cluster.finish()
    assert len(cluster.committed()) + len(cluster.failed()) == 1
    assert bool(cluster.committed()) == (moment in {"Claim", "Granted"})


@pytest.mark.parametrize("moment", ["CommitMigration", "Claim", "Granted"])
def test_what_a_claim_still_brings_to_a_drained_worker_after_the_deadline_is_given_back(moment: str) -> None:
    """It was under way as the deadline came; it does not stay until it ends."""
    cluster = Cluster(max_model_len=600, kv_blocks=150)
    cluster.open("a", LONG, max_tokens=400)
    cluster.tokens(5)
    cluster.migrate("a", "w2")
    at(cluster, moment)
    target = cluster.nodes["w2"]
    target.tell(CommandReceived(Drain(term=1, deadline_s=0.0)))
    cluster.run_until(lambda: not target.core.moves)
    cluster.tokens(len(cluster.readers["a"].ids) + 20)
    assert cluster.owner()[0] == "w1"
    assert not len(target.core.streams)
    cluster.finish()


def test_a_source_at_its_stop_deadline_gives_back_what_is_moving() -> None:
    """The frontend decides whether that was granted before; nothing is lost."""
    cluster = Cluster(stop_deadline_us=0)
    cluster.open("a", LONG, max_tokens=40)
    cluster.tokens(5)
    cluster.migrate("a", "w2")
    at(cluster, "SendBlocks")
    cluster.nodes["w1"].tell(StopRequested())
    cluster.finish()
    assert cluster.nodes["w1"].exited
    assert cluster.frontend.stats.evictions == 1


def test_a_refused_submission_is_no_copy() -> None:
    """A worker that refused an earlier generation takes in a later one."""
    target = world(kv_blocks=10)
    refused = target.ask(submit("a", LONG, max_tokens=4))
    assert isinstance(refused, SubmitRefused)
    held(target, reserve(generation=2))
