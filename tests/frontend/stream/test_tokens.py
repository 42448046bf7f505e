from mell_frontend.stream.commands import CancelSequence, DeliverTokens, FailSequence
from mell_frontend.stream.events import SequenceClosed, TokensArrived
from mell_frontend.stream.limits import StreamLimits
from mell_shared.messages.frontend import TokenLogprobs, TokensGenerated
from tests.frontend.stream.builders import MS_US, Bench, delivered, placement, resends, tokens


def logprobs(*values: float) -> tuple[TokenLogprobs, ...]:
    """Return log-probabilities without alternatives."""
    return tuple(TokenLogprobs(logprob=value) for value in values)


def test_tokens_are_delivered_in_order_as_they_come() -> None:
    """What the owner says next is handed on at once."""
    bench = Bench()
    bench.stream()
    assert bench.handle(tokens("w1", 0, [5, 6])) == [DeliverTokens("s", [5, 6])]
    assert bench.handle(tokens("w1", 2, [7])) == [DeliverTokens("s", [7])]


def test_repeated_tokens_are_dropped() -> None:
    """Indices that were accepted are not delivered again, whatever their ids now are."""
    bench = Bench()
    bench.stream()
    bench.handle(tokens("w1", 0, [5, 6]))
    assert delivered(bench.handle(tokens("w1", 0, [5, 6]))) == []
    assert delivered(bench.handle(tokens("w1", 1, [9, 7, 8]))) == [7, 8]
    assert bench.core.stats.tokens_repeated == 3


def test_a_gap_asks_for_the_missing_tokens_once() -> None:
    """Nothing after a gap is taken; the resend is asked for at once and not again within the pause."""
    bench = Bench()
    bench.stream()
    bench.handle(tokens("w1", 0, [5]))
    assert resends(bench.handle(tokens("w1", 2, [7]))) == [("w1", 1)]
    assert bench.handle(tokens("w1", 3, [8]), after_us=249 * MS_US) == []
    assert resends(bench.handle(tokens("w1", 4, [9]), after_us=1 * MS_US)) == [("w1", 1)]
    assert delivered(bench.handle(tokens("w1", 1, [6, 7, 8, 9]))) == [6, 7, 8, 9]


def test_a_new_gap_after_a_mended_one_is_asked_for_at_once() -> None:
    """The pause is between two asks for the same gap."""
    bench = Bench()
    bench.stream()
    bench.handle(tokens("w1", 1, [6]))
    bench.handle(tokens("w1", 0, [5, 6]))
    assert resends(bench.handle(tokens("w1", 3, [8]))) == [("w1", 2)]


def test_an_owner_whose_tokens_never_arrive_is_given_up() -> None:
    """Gap upon gap without a token between: after so many resends another worker gets the sequence."""
    bench = Bench(StreamLimits(max_resends=3))
    bench.stream()
    bench.handle(tokens("w1", 0, [5]))
    for _ in range(3):
        assert resends(bench.handle(tokens("w1", 2, [7]), after_us=250 * MS_US)) == [("w1", 1)]
    commands = bench.handle(tokens("w1", 2, [7]), after_us=250 * MS_US)
    assert isinstance(commands[0], CancelSequence)
    assert bench.place("w2", commands).message.output_ids == [5]


def test_tokens_from_anybody_but_the_owner_are_dropped() -> None:
    """Other workers, other generations, unknown and ended sequences: none counts."""
    bench = Bench()
    bench.stream()
    bench.stream("w2", "other")
    assert bench.handle(tokens("w2", 0, [5])) == []
    assert bench.handle(tokens("w9", 0, [5])) == []
    assert bench.handle(tokens("w1", 0, [5], generation=2)) == []
    assert bench.handle(tokens("w1", 0, [5], sequence="unknown")) == []
    bench.handle(SequenceClosed("s"))
    assert bench.handle(tokens("w1", 0, [5])) == []
    assert bench.core.stats.rows_stale == 5


def test_a_message_holds_rows_of_many_sequences() -> None:
    """Each row is judged alone; ids are cut by the counts."""
    bench = Bench()
    bench.stream("w1", "a")
    bench.stream("w1", "b")
    bench.stream("w1", "c")
    bench.handle(SequenceClosed("b"))
    message = TokensGenerated(
        worker="w1",
        sequences=("a", "b", "c", "a"),
        generations=[1, 1, 1, 1],
        first_indices=[0, 0, 1, 2],
        counts=[2, 1, 1, 1],
        token_ids=[1, 2, 3, 4, 5],
        finished={3: "stop"},
    )
    first, gap, last = bench.handle(TokensArrived(message))
    assert first == DeliverTokens("a", [1, 2])
    assert resends([gap]) == [("w1", 0)]
    assert last == DeliverTokens("a", [5], (), "stop")


def test_the_end_counts_when_all_tokens_before_it_do() -> None:
    """A finish behind a gap waits for the resend; then the sequence has ended and its worker is not cancelled."""
    bench = Bench()
    bench.stream()
    assert resends(bench.handle(tokens("w1", 1, [6], finish="stop"))) == [("w1", 0)]
    assert bench.handle(tokens("w1", 0, [5, 6], finish="stop")) == [DeliverTokens("s", [5, 6], (), "stop")]
    assert bench.core.open_sequences == 0
    assert bench.handle(SequenceClosed("s")) == []


def test_an_end_without_tokens_counts() -> None:
    """A row may hold only the finish reason, also repeated with tokens that were accepted before."""
    bench = Bench()
    bench.stream(sequence="a")
    bench.stream(sequence="b")
    for name in ("a", "b"):
        bench.handle(tokens("w1", 0, [5, 6], sequence=name))
    assert bench.handle(tokens("w1", 2, [], sequence="a", finish="length")) == [DeliverTokens("a", [], (), "length")]
    assert bench.handle(tokens("w1", 0, [5, 6], sequence="b", finish="stop")) == [DeliverTokens("b", [], (), "stop")]


def test_an_end_before_what_was_accepted_is_not_believed() -> None:
    """The owner sent more than that already."""
    bench = Bench()
    bench.stream()
    bench.handle(tokens("w1", 0, [5, 6]))
    assert bench.handle(tokens("w1", 0, [5], finish="stop")) == []
    assert delivered(bench.handle(tokens("w1", 2, [7]))) == [7]


def test_an_engine_that_cannot_go_on_fails_the_sequence_after_its_tokens() -> None:
    """What was made is delivered first; the worker, which has ended it, is not cancelled."""
    bench = Bench()
    bench.stream()
    delta, failure = bench.handle(tokens("w1", 0, [5], finish="error"))
    assert delta == DeliverTokens("s", [5])
    assert isinstance(failure, FailSequence)
    assert failure.failure == "failed"
    assert bench.core.open_sequences == 0


def test_a_sequence_that_its_owner_cancelled_unasked_goes_on_elsewhere() -> None:
    """Its tokens so far go to the next owner."""
    bench = Bench()
    bench.stream()
    commands = bench.handle(tokens("w1", 0, [5, 6], finish="cancelled"))
    assert delivered(commands) == [5, 6]
    submission = bench.place("w2", commands)
    assert submission.message.output_ids == [5, 6]
    assert submission.message.generation == 2


def test_the_limit_ends_a_sequence_whose_owner_goes_beyond_it() -> None:
    """The reader gets the limit's worth, the owner is stopped: what is kept for a slow reader is bounded."""
    bench = Bench()
    bench.stream(max_tokens=3)
    cancel, last = bench.handle(tokens("w1", 0, [5, 6, 7, 8]))
    assert isinstance(cancel, CancelSequence)
    assert last == DeliverTokens("s", [5, 6, 7], (), "length")


def test_a_sequence_without_limit_is_bounded_too() -> None:
    """Also a worker that never stops cannot fill our memory."""
    bench = Bench(StreamLimits(max_output_tokens=2))
    bench.stream(max_tokens=None)
    assert delivered(bench.handle(tokens("w1", 0, [5, 6]))) == [5, 6]
    _, last = bench.handle(tokens("w1", 2, [7]))
    assert last == DeliverTokens("s", [], (), "length")


def test_log_probabilities_follow_their_tokens() -> None:
    """Of a row that is partly repeated only the fresh tokens' are delivered."""
    bench = Bench()
    bench.stream(logprobs=0)
    one, two, three = logprobs(-1.0, -2.0, -3.0)
    assert bench.handle(tokens("w1", 0, [5], logprobs=(one,))) == [DeliverTokens("s", [5], (one,))]
    commands = bench.handle(tokens("w1", 0, [5, 6, 7], logprobs=(one, two, three)))
    assert commands == [DeliverTokens("s", [6, 7], (two, three))]


def test_log_probabilities_that_are_missing_fail_the_sequence() -> None:
    """The reader was promised one for each token; the worker, which is wrong, is stopped."""
    bench = Bench()
    bench.stream(logprobs=2)
    cancel, failure = bench.handle(tokens("w1", 0, [5, 6], logprobs=logprobs(-1.0)))
    assert isinstance(cancel, CancelSequence)
    assert isinstance(failure, FailSequence)
    assert failure.failure == "failed"


def test_log_probabilities_that_nobody_asked_for_are_left_out() -> None:
    """Their reader would not expect them."""
    bench = Bench()
    bench.stream()
    assert bench.handle(tokens("w1", 0, [5], logprobs=logprobs(-1.0))) == [DeliverTokens("s", [5])]


def test_cached_tokens_are_those_of_the_first_prefill() -> None:
    """The submission's answer says how many, the first row corrects it, later owners do not change it."""
    bench = Bench()
    opened = bench.stream()
    assert opened.message.sequence == "s"
    (first,) = bench.handle(tokens("w1", 0, [5], cached_tokens=2))
    assert first == DeliverTokens("s", [5], (), None, 2)
    lost = bench.handle(tokens("w1", 1, [], finish="cancelled"))
    bench.accept(bench.place("w2", lost), cached_tokens=9)
    (second,) = bench.handle(tokens("w2", 1, [6], generation=2, cached_tokens=9))
    assert second == DeliverTokens("s", [6], (), None, 2)


def test_a_new_owner_goes_on_after_the_accepted_tokens() -> None:
    """It is placed with the room that is left and begins at the next index; a limit reached needs no owner."""
    bench = Bench()
    bench.stream(max_tokens=4)
    bench.handle(tokens("w1", 0, [5, 6, 7]))
    lost = bench.handle(tokens("w1", 3, [], finish="cancelled"))
    assert placement(lost).message.prompt_tokens == 6
    assert placement(lost).message.max_output_tokens == 1
    bench.move_to("w2", lost)
    commands = bench.handle(tokens("w2", 3, [8], generation=2))
    assert delivered(commands) == [8]
    (last,) = bench.handle(tokens("w2", 4, [], generation=2, finish="cancelled"))
    assert last == DeliverTokens("s", [], (), "length")
