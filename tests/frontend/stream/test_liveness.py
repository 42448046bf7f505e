import pytest

from mell_frontend.stream.commands import AskPlacement, AskResend, CancelSequence, FailSequence
from mell_frontend.stream.events import (
    CancelAnswered,
    CancelFailed,
    ConnectionLost,
    ConnectionRestored,
    ResendAnswered,
    ResendFailed,
    SequenceClosed,
    SequenceOpened,
    StoodStill,
    SubmitFailed,
    Ticked,
)
from mell_frontend.stream.limits import StreamLimits
from mell_shared.messages.frontend import Refused, StreamStatusReply
from tests.frontend.stream.builders import SECOND_US, Bench, delivered, placement, request, resends, status, tokens
from tests.frontend.stream.test_control import claim


def streaming() -> Bench:
    """Return a bench whose sequence streams on w1 with one token accepted."""
    bench = Bench()
    bench.stream()
    bench.handle(tokens("w1", 0, [5]))
    return bench


def test_a_silent_owner_is_asked_for_a_sign_of_life_once() -> None:
    """Any answer counts as one: its sequences stay."""
    bench = streaming()
    assert bench.handle(Ticked(), after_us=2 * SECOND_US - 1) == []
    assert resends(bench.handle(Ticked(), after_us=1)) == [("w1", 1)]
    assert bench.handle(Ticked(), after_us=SECOND_US) == []
    assert bench.handle(ResendAnswered("s", 1, known=True)) == []
    assert resends(bench.handle(Ticked(), after_us=2 * SECOND_US)) == [("w1", 1)]


def test_an_owner_that_nobody_hears_of_is_gone_at_once() -> None:
    """No listener on its subject: all its sequences go on elsewhere."""
    bench = streaming()
    bench.stream("w1", "other")
    bench.handle(Ticked(), after_us=2 * SECOND_US)
    commands = bench.handle(ResendFailed("s", 1, "no_responder"))
    asked = [command.message for command in commands if isinstance(command, AskPlacement)]
    assert [(message.sequence, message.generation) for message in asked] == [("s", 2), ("other", 2)]


def test_a_sign_of_life_that_stays_away_proves_nothing_yet() -> None:
    """Only silence of the full length does: then the owner is told to stop and the sequence goes on elsewhere."""
    bench = streaming()
    bench.handle(Ticked(), after_us=2 * SECOND_US)
    assert bench.handle(ResendFailed("s", 1, "timeout")) == []
    commands = bench.handle(Ticked(), after_us=3 * SECOND_US)
    assert [type(c) for c in commands if isinstance(c, CancelSequence | AskResend)] == [CancelSequence]
    assert bench.place("w2", commands).message.output_ids == [5]


def test_whatever_an_owner_says_ends_its_silence() -> None:
    """Tokens, statuses, claims, also about other sequences or in vain."""
    bench = streaming()
    bench.handle(Ticked(), after_us=4 * SECOND_US)
    bench.handle(tokens("w1", 0, [9], sequence="unknown"))
    bench.handle(Ticked(), after_us=4 * SECOND_US)
    assert bench.ask(claim("w3", "w1"))[0] == Refused(reason="owner")
    bench.handle(Ticked(), after_us=4 * SECOND_US)
    bench.ask(status("w1", ("s", 1, 1, False)))
    bench.handle(Ticked(), after_us=4 * SECOND_US)
    assert delivered(bench.handle(tokens("w1", 1, [6]))) == [6]


def test_silence_counts_only_while_we_are_connected() -> None:
    """After our own reconnection everybody gets the full time again."""
    bench = streaming()
    bench.handle(ConnectionLost(), after_us=SECOND_US)
    bench.handle(ConnectionLost(), after_us=SECOND_US)
    assert bench.handle(Ticked(), after_us=20 * SECOND_US) == []
    assert bench.handle(ConnectionRestored()) == []
    assert bench.handle(Ticked(), after_us=SECOND_US) == []
    assert placement(bench.handle(Ticked(), after_us=4 * SECOND_US)).message.generation == 2


def test_silence_counts_only_while_we_run_ourselves() -> None:
    """Whose process was paused, with its machine or alone, takes nobody for dead because of it."""
    bench = streaming()
    assert bench.handle(StoodStill(), after_us=20 * SECOND_US) == []
    assert bench.handle(Ticked()) == []
    assert placement(bench.handle(Ticked(), after_us=5 * SECOND_US)).message.generation == 2


def test_streams_fail_when_the_broker_stays_away() -> None:
    """Nothing hangs for ever; the owner is told to stop as soon as it can be."""
    bench = streaming()
    bench.handle(ConnectionLost())
    assert bench.handle(Ticked(), after_us=60 * SECOND_US - 1) == []
    cancel, failure = bench.handle(Ticked(), after_us=1)
    assert isinstance(cancel, CancelSequence)
    assert isinstance(failure, FailSequence)
    assert failure.failure == "unavailable"
    assert bench.handle(CancelFailed("s", 1, "disconnected")) == []
    assert bench.handle(Ticked(), after_us=2 * SECOND_US) == []
    bench.handle(ConnectionRestored())
    assert bench.handle(Ticked()) == [cancel]


def test_a_submission_on_its_way_has_its_own_timeout() -> None:
    """A worker that is silent from the first is not suspected: the submission fails, or does not."""
    bench = Bench()
    submission = bench.place("w1", bench.handle(SequenceOpened(request())))
    assert bench.handle(Ticked(), after_us=2 * SECOND_US) == []
    assert bench.handle(Ticked(), after_us=10 * SECOND_US) == []
    assert placement(bench.handle(SubmitFailed("s", submission.ask, "timeout"))).message.generation == 2


def test_a_worker_that_does_not_know_what_it_owns_has_lost_it() -> None:
    """A resend that finds nothing there is answered by placing the sequence again."""
    bench = streaming()
    bench.handle(tokens("w1", 2, [7]))
    commands = bench.handle(ResendAnswered("s", 1, known=False))
    assert bench.place("w2", commands).message.output_ids == [5]
    assert bench.handle(ResendAnswered("s", 1, known=False)) == []
    assert bench.handle(ResendFailed("s", 1, "no_responder")) == []


def test_a_cancel_is_repeated_until_the_worker_confirms_it() -> None:
    """Each failure is followed by another after a second; a confirmation ends it."""
    bench = streaming()
    (cancel,) = bench.handle(SequenceClosed("s"))
    assert bench.handle(Ticked(), after_us=5 * SECOND_US) == []
    for _ in range(3):
        bench.handle(CancelFailed("s", 1, "timeout"))
        assert bench.handle(Ticked(), after_us=SECOND_US - 1) == []
        assert bench.handle(Ticked(), after_us=1) == [cancel]
    bench.handle(CancelAnswered("s", 1))
    bench.handle(CancelFailed("s", 1, "timeout"))
    assert bench.handle(Ticked(), after_us=2 * SECOND_US) == []


def test_a_cancel_is_settled_by_a_status_without_the_sequence() -> None:
    """The worker holds nothing of it; a status that lists it, or another worker's, settles nothing."""
    bench = streaming()
    (cancel,) = bench.handle(SequenceClosed("s"))
    bench.handle(CancelFailed("s", 1, "timeout"))
    assert bench.ask(status("w1", ("s", 1, 1, False)))[0] == StreamStatusReply(cancel=[0])
    bench.ask(status("w2"))
    assert bench.handle(Ticked(), after_us=SECOND_US) == [cancel]
    bench.handle(CancelFailed("s", 1, "timeout"))
    bench.ask(status("w1"))
    assert bench.handle(Ticked(), after_us=SECOND_US) == []


def test_a_cancel_to_a_worker_that_is_gone_is_not_repeated() -> None:
    """Nobody is there to hold anything."""
    bench = streaming()
    bench.handle(SequenceClosed("s"))
    bench.handle(CancelFailed("s", 7, "timeout"))
    bench.handle(CancelFailed("s", 1, "no_responder"))
    assert bench.handle(Ticked(), after_us=2 * SECOND_US) == []


def test_ended_sequences_are_remembered_for_a_minute() -> None:
    """Then they are unknown, which means the same; an unconfirmed cancel is forgotten with them."""
    bench = streaming()
    bench.handle(SequenceClosed("s"))
    bench.handle(CancelFailed("s", 1, "timeout"), after_us=59 * SECOND_US + SECOND_US // 2)
    assert bench.ask(claim())[0] == Refused(reason="ended")
    bench.handle(Ticked(), after_us=SECOND_US)
    assert bench.ask(claim())[0] == Refused(reason="unknown")
    assert bench.handle(Ticked(), after_us=2 * SECOND_US) == []


def test_the_memory_of_ended_sequences_is_bounded() -> None:
    """The oldest is forgotten first."""
    bench = Bench(StreamLimits(max_ended=2))
    for name in ("a", "b", "s"):
        bench.stream("w1", name)
        bench.handle(SequenceClosed(name))
    assert bench.ask(claim())[0] == Refused(reason="ended")
    assert bench.ask(claim().model_copy(update={"sequence": "a"}))[0] == Refused(reason="unknown")


def test_a_name_can_be_used_once() -> None:
    """The HTTP side makes names; the same one twice is a bug there."""
    bench = streaming()
    with pytest.raises(AssertionError, match="open already"):
        bench.core.handle(SequenceOpened(request()), bench.now_us)
    bench.handle(SequenceClosed("s"))
    with pytest.raises(AssertionError, match="used before"):
        bench.core.handle(SequenceOpened(request()), bench.now_us)
