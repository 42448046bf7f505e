import pytest

from mell_frontend.stream.commands import (
    AskPlacement,
    CancelSequence,
    FailSequence,
    SubmitSequence,
    TellWaiting,
)
from mell_frontend.stream.events import (
    AskFailure,
    ConnectionLost,
    PlaceAnswered,
    PlaceFailed,
    SequenceClosed,
    SequenceOpened,
    SubmitAnswered,
    SubmitFailed,
    SubmitTooLong,
    Ticked,
)
from mell_frontend.stream.limits import StreamLimits
from mell_shared.messages.scheduler import Placed, PlaceReply, Queued, Rejected, RejectReason
from mell_shared.messages.worker import CommandInvalid, SubmitRefusal, SubmitRefused
from tests.frontend.stream.builders import MS_US, SECOND_US, Bench, delivered, placement, request, tokens


def opened(bench: Bench, sequence: str = "s") -> AskPlacement:
    """Open a sequence and return the placement it asks for."""
    return placement(bench.handle(SequenceOpened(request(sequence))))


def answer(asked: AskPlacement, reply: PlaceReply) -> PlaceAnswered:
    """Return the scheduler's answer."""
    return PlaceAnswered(asked.message.sequence, asked.ask, reply)


def refused(submission: SubmitSequence, reason: SubmitRefusal) -> SubmitAnswered:
    """Return the worker's refusal."""
    return SubmitAnswered("s", submission.ask, SubmitRefused(reason=reason, message="why"))


def test_a_new_sequence_is_placed_by_its_size_alone() -> None:
    """The scheduler learns lengths, never the prompt."""
    asked = opened(Bench())
    assert asked.message.model_dump() == {
        "kind": "place",
        "sequence": "s",
        "generation": 1,
        "frontend": "f",
        "model": "fake",
        "prompt_tokens": 3,
        "max_output_tokens": 20,
        "priority": 0,
        "waited_s": 0.0,
        "excluded": (),
        "request_id": "",
        "traceparent": "",
    }


def test_a_placed_sequence_is_submitted_to_the_worker_named() -> None:
    """The worker gets prompt and parameters, in the generation that was placed."""
    bench = Bench()
    (command,) = bench.handle(answer(opened(bench), Placed(worker="w1")))
    assert isinstance(command, SubmitSequence)
    assert command.worker == "w1"
    assert command.message.prompt_ids == [1, 2, 3]
    assert command.message.output_ids == []
    assert command.message.generation == 1
    assert command.message.frontend == "f"


def test_a_queued_sequence_asks_again_at_once_and_says_so() -> None:
    """The scheduler held its reply, so the next ask follows immediately, with the time waited."""
    bench = Bench()
    tell, again = bench.handle(answer(opened(bench), Queued(position=4)), after_us=800 * MS_US)
    assert tell == TellWaiting("s", 4)
    assert isinstance(again, AskPlacement)
    assert again.message.waited_s == 0.8
    assert again.message.generation == 1


def test_a_scheduler_that_does_not_hold_its_reply_is_not_asked_in_a_tight_loop() -> None:
    """`Queued` that came at once is followed by a short pause."""
    bench = Bench()
    assert bench.handle(answer(opened(bench), Queued(position=0))) == [TellWaiting("s", 0)]
    assert bench.handle(Ticked(), after_us=49 * MS_US) == []
    assert placement(bench.handle(Ticked(), after_us=1 * MS_US)).message.generation == 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("queue_full", "queue_full"),
        ("no_worker", "unavailable"),
        ("too_large", "too_large"),
        ("unknown_model", "unknown_model"),
    ],
)
def test_a_rejected_sequence_fails_with_what_the_scheduler_said(reason: RejectReason, kind: str) -> None:
    """Reason, message, limit and time to retry reach the reader; nothing is retried."""
    bench = Bench()
    reply = Rejected(reason=reason, message="no", retry_after_s=2.5, limit_tokens=99)
    (failure,) = bench.handle(answer(opened(bench), reply))
    assert failure == FailSequence("s", kind, "no", 2.5, 99)  # type: ignore[arg-type]
    assert bench.core.open_sequences == 0


def test_a_silent_scheduler_is_asked_again_with_growing_pauses_until_the_deadline() -> None:
    """Pauses double up to a second; after the deadline the sequence is unavailable."""
    bench = Bench(StreamLimits(place_deadline_us=4 * SECOND_US))
    asked = opened(bench)
    pauses_us = []
    while True:
        commands = bench.handle(PlaceFailed("s", asked.ask, "timeout"))
        if commands:
            break
        failed_us = bench.now_us
        while not (commands := bench.handle(Ticked(), after_us=10 * MS_US)):
            pass
        asked = placement(commands)
        pauses_us.append(bench.now_us - failed_us)
    assert pauses_us == [100 * MS_US, 200 * MS_US, 400 * MS_US, 800 * MS_US, SECOND_US, SECOND_US]
    (failure,) = commands
    assert isinstance(failure, FailSequence)
    assert failure.failure == "unavailable"


def test_an_answer_that_helps_ends_the_count_to_the_deadline() -> None:
    """Only unanswered time in a row counts: being queued for long is not being unanswered."""
    bench = Bench(StreamLimits(place_deadline_us=2 * SECOND_US))
    asked = opened(bench)
    for _ in range(5):
        assert bench.handle(PlaceFailed("s", asked.ask, "no_responder")) == []
        asked = placement(bench.handle(Ticked(), after_us=SECOND_US))
        asked = placement(bench.handle(answer(asked, Queued(position=1)), after_us=800 * MS_US))


def test_a_place_that_came_to_nothing_was_an_answer_too() -> None:
    """What was unanswered before it does not count when, after a submission that was lost, one more ask is."""
    bench = Bench(StreamLimits(place_deadline_us=2 * SECOND_US))
    asked = opened(bench)
    bench.handle(PlaceFailed("s", asked.ask, "no_responder"))
    submission = bench.place("w1", bench.handle(Ticked(), after_us=SECOND_US))
    asked = placement(bench.handle(SubmitFailed("s", submission.ask, "timeout"), after_us=SECOND_US))
    assert bench.handle(PlaceFailed("s", asked.ask, "timeout"), after_us=SECOND_US) == []
    assert placement(bench.handle(Ticked(), after_us=SECOND_US)).message.generation == 2


@pytest.mark.parametrize("reason", ["no_room", "stopping"])
def test_a_worker_without_room_is_excluded_from_the_next_placement(reason: SubmitRefusal) -> None:
    """The next placement is a new generation, so the refused worker's can never be taken for it."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    tell, again = bench.handle(refused(submission, reason))
    assert tell == TellWaiting("s", 0)
    assert isinstance(again, AskPlacement)
    assert again.message.excluded == ("w1",)
    assert again.message.generation == 2


def test_exclusions_add_up_and_end_when_the_scheduler_says_to_wait() -> None:
    """Each refusal excludes one more; once the sequence has waited, all may be tried again."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    submission = bench.place("w2", bench.handle(refused(submission, "no_room")))
    again = placement(bench.handle(refused(submission, "no_room")))
    assert again.message.excluded == ("w1", "w2")
    waited = placement(bench.handle(answer(again, Queued(position=0)), after_us=SECOND_US))
    assert waited.message.excluded == ()


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("too_large", "too_large"),
        ("wrong_model", "unknown_model"),
        ("bad_request", "refused"),
        ("protocol", "failed"),
    ],
)
def test_a_refusal_that_others_would_repeat_fails_the_sequence(reason: SubmitRefusal, kind: str) -> None:
    """No other worker is tried, and the worker, which holds nothing, is not cancelled."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    assert bench.handle(refused(submission, reason)) == [FailSequence("s", kind, "why")]  # type: ignore[arg-type]


def test_a_command_that_the_worker_cannot_read_fails_the_sequence() -> None:
    """It would be unreadable elsewhere too."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    (failure,) = bench.handle(SubmitAnswered("s", submission.ask, CommandInvalid(message="bad field")))
    assert isinstance(failure, FailSequence)
    assert failure.failure == "failed"
    assert "bad field" in failure.message


def test_a_submission_over_the_brokers_limit_fails_as_too_large() -> None:
    """The reader learns how many tokens would fit."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    (failure,) = bench.handle(SubmitTooLong("s", submission.ask, 1000))
    assert isinstance(failure, FailSequence)
    assert (failure.failure, failure.limit_tokens) == ("too_large", 1000)


@pytest.mark.parametrize("failure", ["timeout", "invalid"])
def test_a_worker_that_may_run_an_unanswered_submission_is_told_to_stop(failure: AskFailure) -> None:
    """The sequence is placed elsewhere under a new generation; the old one is cancelled at the worker."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    cancel, tell, again = bench.handle(SubmitFailed("s", submission.ask, failure))
    assert isinstance(cancel, CancelSequence)
    assert (cancel.worker, cancel.message.generation) == ("w1", 1)
    assert tell == TellWaiting("s", 0)
    assert isinstance(again, AskPlacement)
    assert again.message.generation == 2
    assert again.message.excluded == ("w1",)


@pytest.mark.parametrize("failure", ["no_responder", "disconnected"])
def test_a_submission_that_nobody_got_is_placed_elsewhere(failure: AskFailure) -> None:
    """There is nobody to tell to stop."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    commands = bench.handle(SubmitFailed("s", submission.ask, failure))
    assert [type(command) for command in commands] == [TellWaiting, AskPlacement]


def test_tokens_of_the_old_generation_do_not_count_after_an_unanswered_submission() -> None:
    """The worker ran it after all: its tokens are dropped, the new owner's taken."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    again = bench.handle(SubmitFailed("s", submission.ask, "timeout"))
    assert bench.handle(tokens("w1", 0, [5])) == []
    bench.move_to("w1", again)
    assert bench.handle(tokens("w1", 0, [6], generation=1)) == []
    assert delivered(bench.handle(tokens("w1", 0, [7], generation=2))) == [7]


def test_tokens_prove_that_an_unanswered_submission_was_taken() -> None:
    """The reply was slower than the first tokens: they count, and the late failure changes nothing."""
    bench = Bench()
    submission = bench.place("w1", [opened(bench)])
    assert delivered(bench.handle(tokens("w1", 0, [5]))) == [5]
    assert bench.handle(SubmitFailed("s", submission.ask, "timeout")) == []
    assert delivered(bench.handle(tokens("w1", 1, [6]))) == [6]


def test_late_answers_change_nothing() -> None:
    """Only the answer to the outstanding ask counts, and only once."""
    bench = Bench()
    first = opened(bench)
    second = placement(bench.handle(answer(first, Queued(position=0)), after_us=SECOND_US))
    assert bench.handle(answer(first, Placed(worker="w9"))) == []
    assert bench.handle(PlaceFailed("s", first.ask, "timeout")) == []
    submission = bench.place("w1", [second])
    assert bench.handle(answer(second, Placed(worker="w9"))) == []
    bench.accept(submission)
    assert bench.accept(submission) == []
    assert bench.handle(refused(submission, "no_room")) == []
    assert bench.handle(SubmitTooLong("s", submission.ask, 1)) == []


def test_a_sequence_that_was_admitted_outlives_the_loss_of_its_last_worker() -> None:
    """Rejections while its worker is being replaced are retried; the reader hears the last of them at the deadline."""
    bench = Bench(StreamLimits(place_deadline_us=2 * SECOND_US))
    submission = bench.place("w1", [opened(bench)])
    asked = placement(bench.handle(SubmitFailed("s", submission.ask, "no_responder")))
    rejection = Rejected(reason="no_worker", message="no worker for fake", retry_after_s=1.0)
    assert bench.handle(answer(asked, rejection)) == []
    asked = placement(bench.handle(Ticked(), after_us=SECOND_US))
    assert asked.message.excluded == ()
    (failure,) = bench.handle(answer(asked, rejection), after_us=2 * SECOND_US)
    assert failure == FailSequence("s", "unavailable", "no worker for fake", 1.0)


def test_a_sequence_that_no_longer_fits_anywhere_waits_for_its_worker_to_return() -> None:
    """The worker that was large enough may be restarting: only after the deadline the reader hears what would fit."""
    bench = Bench(StreamLimits(place_deadline_us=2 * SECOND_US))
    submission = bench.place("w1", [opened(bench)])
    asked = placement(bench.handle(SubmitFailed("s", submission.ask, "no_responder")))
    rejection = Rejected(reason="too_large", message="no", limit_tokens=8)
    assert bench.handle(answer(asked, rejection)) == []
    asked = placement(bench.handle(Ticked(), after_us=SECOND_US))
    (failure,) = bench.handle(answer(asked, rejection), after_us=2 * SECOND_US)
    assert failure == FailSequence("s", "too_large", "no", None, 8)


def test_submissions_that_come_to_nothing_are_bounded() -> None:
    """A sequence that kills every worker it meets is given up."""
    bench = Bench(StreamLimits(max_setbacks=3))
    commands = [opened(bench)]
    for _ in range(4):
        submission = bench.place("w1", list(commands))
        commands = bench.handle(SubmitFailed("s", submission.ask, "no_responder"))  # type: ignore[assignment]
    (failure,) = commands
    assert isinstance(failure, FailSequence)
    assert failure.failure == "unavailable"


def test_closing_before_placement_needs_nobody() -> None:
    """No worker knows of it; a late answer is dropped."""
    bench = Bench()
    asked = opened(bench)
    assert bench.handle(SequenceClosed("s")) == []
    assert bench.handle(answer(asked, Placed(worker="w1"))) == []
    assert bench.handle(SequenceClosed("s")) == []


def test_closing_during_a_pause_ends_the_asking() -> None:
    """No placement is asked for when the pause would be over."""
    bench = Bench()
    bench.handle(PlaceFailed("s", opened(bench).ask, "timeout"))
    assert bench.handle(SequenceClosed("s")) == []
    assert bench.handle(Ticked(), after_us=10 * SECOND_US) == []


def test_closing_during_a_submission_cancels_it() -> None:
    """The worker may have it; the cancel follows the submission on the same subject."""
    bench = Bench()
    bench.place("w1", [opened(bench)])
    (cancel,) = bench.handle(SequenceClosed("s"))
    assert isinstance(cancel, CancelSequence)
    assert (cancel.worker, cancel.message.sequence, cancel.message.generation) == ("w1", "s", 1)


def test_more_sequences_than_the_limit_are_turned_away() -> None:
    """The reader is told to come back; the others are untouched."""
    bench = Bench(StreamLimits(max_sequences=1))
    opened(bench, "a")
    (failure,) = bench.handle(SequenceOpened(request("b")))
    assert isinstance(failure, FailSequence)
    assert (failure.failure, failure.retry_after_s) == ("queue_full", 1.0)
    assert bench.handle(SequenceClosed("b")) == []
    bench.handle(SequenceClosed("a"))
    assert opened(bench, "c")


def test_a_lost_broker_makes_placing_unavailable_at_the_deadline() -> None:
    """Each ask fails as disconnected; the deadline holds as for a silent scheduler."""
    bench = Bench(StreamLimits(place_deadline_us=SECOND_US))
    bench.handle(ConnectionLost())
    asked = opened(bench)
    bench.handle(PlaceFailed("s", asked.ask, "disconnected"))
    asked = placement(bench.handle(Ticked(), after_us=SECOND_US))
    (failure,) = bench.handle(PlaceFailed("s", asked.ask, "disconnected"))
    assert isinstance(failure, FailSequence)
    assert failure.failure == "unavailable"
