import pytest

from mell_frontend.stream.commands import AskPlacement, TellWaiting
from mell_frontend.stream.events import SequenceClosed, SequenceOpened, SubmitAnswered, SubmitFailed
from mell_frontend.stream.limits import StreamLimits
from mell_shared.messages.frontend import (
    AbortMigration,
    Claim,
    ClaimRefusal,
    Evicted,
    EvictionTaken,
    Granted,
    MigrationAborted,
    Refused,
    StreamStatusReply,
    TokenLogprobs,
)
from mell_shared.messages.worker import SubmitRefused
from tests.frontend.stream.builders import MS_US, SECOND_US, Bench, delivered, placement, request, status, tokens


def claim(
    source: str = "w1", target: str = "w2", *, generation: int = 1, migration: str = "m1", length: int = 2
) -> Claim:
    """Return a target's claim."""
    return Claim(sequence="s", generation=generation, migration=migration, source=source, target=target, length=length)


def abort(source: str = "w1", *, generation: int = 1, migration: str = "m1") -> AbortMigration:
    """Return a source's wish that a claim never be granted."""
    return AbortMigration(sequence="s", generation=generation, migration=migration, source=source)


def evicted(worker: str = "w1", *, generation: int = 1, output_ids: tuple[int, ...] = (5, 6, 7)) -> Evicted:
    """Return a worker's giving up."""
    return Evicted(worker=worker, sequence="s", generation=generation, output_ids=list(output_ids))


def streaming(limits: StreamLimits | None = None, **wanted: int | None) -> Bench:
    """Return a bench whose sequence streams on w1 with two tokens accepted."""
    bench = Bench(limits or StreamLimits())
    bench.stream(**wanted)
    if "logprobs" not in wanted:
        bench.handle(tokens("w1", 0, [5, 6]))
    return bench


def test_a_claim_that_holds_passes_the_sequence_to_the_target() -> None:
    """From then on the target's tokens count, in the new generation, and the source's do not."""
    bench = streaming()
    assert bench.ask(claim()) == (Granted(generation=2, accepted=2), [])
    assert bench.handle(tokens("w1", 2, [9])) == []
    assert delivered(bench.handle(tokens("w2", 2, [7], generation=2))) == [7]


def test_the_claim_last_granted_gets_the_same_reply_when_repeated() -> None:
    """Its reply may have been lost; nothing changes by asking again, even after its first tokens."""
    bench = streaming()
    granted, _ = bench.ask(claim())
    assert bench.ask(claim()) == (granted, [])
    bench.handle(tokens("w2", 2, [7], generation=2))
    assert bench.ask(claim()) == (granted, [])
    assert bench.core.stats.claims_granted == 1


def test_a_claim_whose_grant_is_history_is_refused() -> None:
    """Another move, or a loss, has taken the sequence from its target since."""
    bench = streaming()
    bench.ask(claim())
    bench.ask(claim("w2", "w3", generation=2, migration="m2"))
    assert bench.ask(claim()) == (Refused(reason="generation"), [])


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (claim(generation=2), "generation"),
        (claim("w3"), "owner"),
        (claim(length=1), "length"),
    ],
)
def test_a_claim_that_does_not_hold_is_refused(asked: Claim, reason: ClaimRefusal) -> None:
    """Not the present generation, not copied from the owner, or shorter than what was accepted."""
    bench = streaming()
    assert bench.ask(asked) == (Refused(reason=reason), [])
    assert delivered(bench.handle(tokens("w1", 2, [7]))) == [7]


def test_a_claim_on_a_sequence_that_is_over_is_refused() -> None:
    """Unknown means ended; a remembered end is called so."""
    bench = streaming()
    bench.handle(SequenceClosed("s"))
    assert bench.ask(claim()) == (Refused(reason="ended"), [])
    unknown = claim().model_copy(update={"sequence": "never"})
    assert bench.ask(unknown) == (Refused(reason="unknown"), [])


def test_a_claim_while_nobody_owns_the_sequence_is_refused() -> None:
    """The source had already lost it."""
    bench = Bench()
    bench.handle(SequenceOpened(request()))
    assert bench.ask(claim(length=0)) == (Refused(reason="owner"), [])


def test_a_claim_proves_that_an_unanswered_submission_was_taken() -> None:
    """The source runs it, or could not have moved it; the late answer changes nothing."""
    bench = Bench()
    submission = bench.place("w1", bench.handle(SequenceOpened(request())))
    assert bench.ask(claim(length=0)) == (Granted(generation=2, accepted=0), [])
    assert bench.handle(SubmitFailed("s", submission.ask, "timeout")) == []
    late = SubmitRefused(reason="no_room", message="")
    assert bench.handle(SubmitAnswered("s", submission.ask, late)) == []


def test_an_aborted_migration_is_never_granted() -> None:
    """The source goes on in the same generation; other migrations may still be granted."""
    bench = streaming()
    assert bench.ask(abort()) == (MigrationAborted(owned=True), [])
    assert bench.ask(claim()) == (Refused(reason="aborted"), [])
    assert delivered(bench.handle(tokens("w1", 2, [7]))) == [7]
    assert bench.ask(claim(migration="m2", length=3)) == (Granted(generation=2, accepted=3), [])


def test_an_abort_after_the_grant_comes_too_late() -> None:
    """The source hears that it owns the sequence no more, however often it asks."""
    bench = streaming()
    bench.ask(claim())
    assert bench.ask(abort()) == (MigrationAborted(owned=False), [])
    assert delivered(bench.handle(tokens("w2", 2, [7], generation=2))) == [7]
    bench.handle(SequenceClosed("s"))
    assert bench.ask(abort()) == (MigrationAborted(owned=False), [])


def test_when_no_more_aborts_can_be_remembered_nothing_is_granted() -> None:
    """Bounded memory must not forget a promise; a new generation begins with an empty one."""
    bench = streaming(StreamLimits(max_aborted=1))
    bench.ask(abort(migration="m1"))
    assert bench.ask(abort(migration="m2")) == (MigrationAborted(owned=True), [])
    assert bench.ask(claim(migration="m3")) == (Refused(reason="aborted"), [])
    _, commands = bench.ask(evicted())
    bench.move_to("w3", commands)
    asked = claim("w3", generation=2, migration="m4", length=3)
    assert bench.ask(asked) == (Granted(generation=3, accepted=3), [])


def test_an_evicted_sequence_goes_on_elsewhere_from_its_last_token() -> None:
    """The tokens that the eviction brings are delivered and go to the next owner."""
    bench = streaming()
    reply, commands = bench.ask(evicted())
    assert reply == EvictionTaken()
    assert delivered(commands) == [7]
    assert TellWaiting("s", 0) in commands
    assert placement(commands).message.excluded == ("w1",)
    submission = bench.place("w2", commands)
    assert submission.message.output_ids == [5, 6, 7]
    assert submission.message.generation == 2


def test_a_repeated_eviction_gets_the_same_reply() -> None:
    """Its reply was lost; the sequence is not placed a second time."""
    bench = streaming()
    bench.ask(evicted())
    assert bench.ask(evicted()) == (EvictionTaken(), [])


def test_an_eviction_without_log_probabilities_is_made_again_elsewhere() -> None:
    """Its reader was promised one for each token, so only tokens that came with them count."""
    bench = streaming(logprobs=0)
    bench.handle(tokens("w1", 0, [5], logprobs=(TokenLogprobs(logprob=-1.0),)))
    _, commands = bench.ask(evicted())
    assert delivered(commands) == []
    assert bench.place("w2", commands).message.output_ids == [5]


def test_an_eviction_that_reaches_the_limit_ends_the_sequence() -> None:
    """Nothing is left to make."""
    bench = streaming(max_tokens=3)
    _, commands = bench.ask(evicted())
    assert delivered(commands) == [7]
    assert not any(isinstance(command, AskPlacement) for command in commands)
    assert bench.core.open_sequences == 0


def test_an_eviction_by_anybody_but_the_owner_is_refused() -> None:
    """It has nothing to give up."""
    bench = streaming()
    assert bench.ask(evicted("w2")) == (Refused(reason="owner"), [])
    assert bench.ask(evicted(generation=2)) == (Refused(reason="generation"), [])
    bench.handle(SequenceClosed("s"))
    assert bench.ask(evicted()) == (Refused(reason="ended"), [])


def test_a_status_that_agrees_asks_nothing() -> None:
    """The reply is empty and nothing else happens."""
    bench = streaming()
    assert bench.ask(status("w1", ("s", 1, 2, False))) == (StreamStatusReply(), [])


def test_a_status_stops_what_nobody_waits_for() -> None:
    """Unknown, ended, superseded, another's: running ones are cancelled, ended ones acknowledged."""
    bench = streaming()
    bench.stream("w1", "over")
    bench.handle(SequenceClosed("over"))
    rows = [("unknown", 1, 0, False), ("over", 1, 4, False), ("s", 7, 2, False), ("s", 1, 2, False)]
    reply, commands = bench.ask(status("w1", *rows))
    assert reply == StreamStatusReply(cancel=[0, 1, 2])
    reply, _ = bench.ask(status("w2", ("s", 1, 2, False)))
    assert reply == StreamStatusReply(cancel=[0])
    ended = [(name, generation, index, True) for name, generation, index, _ in rows[:3]]
    assert bench.ask(status("w1", *ended, ("s", 1, 2, False)))[0] == StreamStatusReply(ack_end=[0, 1, 2])
    assert commands == []


def test_a_status_asks_for_tokens_that_do_not_come() -> None:
    """A status may overtake tokens, so only what stays away is asked for."""
    bench = streaming()
    ahead = status("w1", ("s", 1, 5, False))
    assert bench.ask(ahead, after_us=249 * MS_US)[0] == StreamStatusReply()
    assert bench.ask(ahead, after_us=1 * MS_US)[0] == StreamStatusReply(resend={0: 2})


def test_an_owner_whose_tokens_a_status_names_but_never_come_is_given_up() -> None:
    """After so many resends in vain another worker gets the sequence, and the first is told to stop."""
    bench = streaming(StreamLimits(max_resends=3))
    ahead = status("w1", ("s", 1, 5, False))
    for _ in range(3):
        assert bench.ask(ahead, after_us=SECOND_US)[0] == StreamStatusReply(resend={0: 2})
    reply, commands = bench.ask(ahead, after_us=SECOND_US)
    assert reply == StreamStatusReply(cancel=[0])
    assert bench.place("w2", commands).message.output_ids == [5, 6]


def test_a_status_asks_for_an_end_that_does_not_come() -> None:
    """The last message was lost: the end is sent again, and acknowledged once it was accepted."""
    bench = streaming()
    over = status("w1", ("s", 1, 2, True))
    assert bench.ask(over, after_us=SECOND_US)[0] == StreamStatusReply(resend={0: 2})
    bench.handle(tokens("w1", 2, [], finish="stop"))
    assert bench.ask(over, after_us=SECOND_US)[0] == StreamStatusReply(ack_end=[0])


def test_a_status_that_contradicts_what_its_worker_sent_loses_it_the_sequence() -> None:
    """An end before the accepted length can never be reached by resending."""
    bench = streaming()
    reply, commands = bench.ask(status("w1", ("s", 1, 1, True)))
    assert reply == StreamStatusReply(ack_end=[0])
    assert bench.place("w2", commands).message.output_ids == [5, 6]


def test_a_sequence_missing_from_two_statuses_is_placed_again() -> None:
    """The worker has lost it; one status may have been sent before it came."""
    bench = streaming()
    assert bench.ask(status("w1"))[1] == []
    _, commands = bench.ask(status("w1"), after_us=SECOND_US)
    assert placement(commands).message.generation == 2
    assert bench.place("w1", commands).message.output_ids == [5, 6]


def test_statuses_that_come_in_a_burst_count_as_one() -> None:
    """They were all sent before the sequence was taken, and only read late."""
    bench = streaming()
    for _ in range(5):
        assert bench.ask(status("w1"), after_us=100 * MS_US - 1)[1] == []


def test_a_sequence_that_is_listed_again_is_not_missing() -> None:
    """Only two in a row count; being listed in another generation is being missing."""
    bench = streaming()
    bench.ask(status("w1"))
    bench.ask(status("w1", ("s", 1, 2, False)), after_us=SECOND_US)
    assert bench.ask(status("w1"), after_us=SECOND_US)[1] == []
    _, commands = bench.ask(status("w1", ("s", 2, 2, False)), after_us=SECOND_US)
    assert placement(commands)


def test_a_sequence_on_its_way_is_not_missing() -> None:
    """Until its owner answers, statuses without it say nothing; one that lists it proves that it was taken."""
    bench = Bench()
    submission = bench.place("w1", bench.handle(SequenceOpened(request())))
    for _ in range(3):
        assert bench.ask(status("w1"), after_us=SECOND_US)[1] == []
    assert bench.ask(status("w1", ("s", 1, 0, False)))[1] == []
    assert bench.handle(SubmitFailed("s", submission.ask, "timeout")) == []
