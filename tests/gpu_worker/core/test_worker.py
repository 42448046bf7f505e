import pytest

from mell_gpu_worker.core.commands import (
    AskStatus,
    Exit,
    PublishEvent,
    PublishTokens,
    Reply,
    RunStep,
    SendEvicted,
)
from mell_gpu_worker.core.events import (
    CommandReceived,
    ConnectionLost,
    ConnectionRestored,
    EngineFailed,
    EvictionAnswered,
    EvictionUnanswered,
    StatusAnswered,
    StatusUnanswered,
    StepFinished,
    StoodStill,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.step import SampledToken, StepResult
from mell_gpu_worker.core.tokens import RESEND_TOKENS
from mell_gpu_worker.engine.fake import expected_output
from mell_shared.messages.frontend import StreamStatusReply, TokenLogprobs
from mell_shared.messages.sampling import Grammar
from mell_shared.messages.scheduler import SequenceFinished, WorkerJoined, WorkerLeft, WorkerReport
from mell_shared.messages.worker import (
    Cancel,
    CancelDone,
    Migrate,
    MigrateRefused,
    Report,
    Resend,
    ResendDone,
    Submit,
    SubmitAccepted,
    SubmitRefused,
)
from mell_shared.models import FAKE_EOS_ID

from .worlds import SECOND_US, CoreWorld, asked, only, rows_of, submit


def refusal(world: CoreWorld, message: Submit, grammar_fault: str | None = None) -> str:
    """The reason why a submission is refused, which must come with words."""
    reply = world.ask(message, grammar_fault)
    assert isinstance(reply, SubmitRefused)
    assert reply.message
    return reply.reason


def finished(world: CoreWorld) -> list[tuple[str, int, str]]:
    """The ends told to the schedulers so far."""
    events = [command.message for command in only(PublishEvent, world.commands)]
    return [(e.sequence, e.generation, e.reason) for e in events if isinstance(e, SequenceFinished)]


def status(world: CoreWorld, reply: StreamStatusReply, frontend: str = "f1") -> list[object]:
    """Let the next status be asked and answered; returns what the answer led to."""
    question = asked(world.tell(TimePassed(), after_us=SECOND_US))[frontend]
    return list(world.tell(StatusAnswered(frontend, question.message, reply)))


# --- a sequence's life


def test_a_submission_is_answered_before_its_tokens_and_runs_to_its_end() -> None:
    """Accepted, generated in order, ended with its reason, told to the schedulers; its step begins before all else."""
    world = CoreWorld()
    commands = world.tell(CommandReceived(submit("a", max_tokens=3), "inbox"))
    step, reply, *_ = commands
    assert isinstance(step, RunStep)
    assert reply == Reply("inbox", SubmitAccepted(cached_tokens=0))
    world.run()
    assert world.output() == expected_output(b"hello", submit().sampling, 3)
    last = only(PublishTokens, world.commands)[-1].message
    assert (last.worker, last.finished) == ("w1", {0: "length"})
    assert finished(world) == [("a", 1, "length")]


def test_one_message_for_each_step_and_frontend() -> None:
    """Whatever the batch, a frontend gets one message a step, with a row for each of its sequences."""
    world = CoreWorld()
    for name, frontend in (("a", "f1"), ("b", "f2"), ("c", "f1")):
        world.ask(submit(name, name.encode() * 3, frontend=frontend, max_tokens=8))
    world.finish_step()
    world.finish_step()
    messages = {command.frontend: command.message for command in only(PublishTokens, world.finish_step())}
    assert messages["f1"].sequences == ("a", "c")
    assert messages["f1"].first_indices == [2, 1]
    assert messages["f2"].sequences == ("b",)


def test_cached_tokens_are_told_in_the_reply_and_with_the_first_row_only() -> None:
    """The frontend learns once how much of the prompt needed no prefill."""
    world = CoreWorld()
    world.ask(submit("a", b"0123456789", max_tokens=2))
    world.run()
    assert world.ask(submit("b", b"0123456789", max_tokens=3)) == SubmitAccepted(cached_tokens=8)
    told = [command.message.cached_tokens for command in only(PublishTokens, world.run())]
    assert told == [{0: 8}, {}, {}]


def test_logprobs_travel_with_their_tokens() -> None:
    """As many log-probabilities as tokens in each row of a sequence that asked for them, none for others."""
    world = CoreWorld()
    world.ask(submit("a", b"xyz", logprobs=2, max_tokens=2))
    world.ask(submit("b", b"uvw", max_tokens=2))
    for command in only(PublishTokens, world.run()):
        rows = [row for row, name in enumerate(command.message.sequences) if name == "a"]
        assert sorted(command.message.logprobs) == rows
        for row in rows:
            (entry,) = command.message.logprobs[row]
            assert isinstance(entry, TokenLogprobs)
            assert len(entry.top_ids) == 2


def test_a_resubmission_goes_on_after_the_output_it_brings() -> None:
    """The first new token has the next index, and the text is as if nothing had happened."""
    world = CoreWorld()
    wanted = expected_output(b"hello", submit().sampling, 6)
    world.ask(submit("a", generation=3, output_ids=wanted[:4], max_tokens=6))
    world.run()
    assert world.output("a", 3) == wanted[4:]
    assert rows_of(only(PublishTokens, world.commands)[0], "a", 3)[0][0] == 4


@pytest.mark.parametrize(
    ("output", "sampling", "reason"),
    [([65, 66], {"max_tokens": 2}, "length"), ([65, FAKE_EOS_ID], {"ignore_eos": False, "max_tokens": 9}, "stop")],
)
def test_a_resubmission_whose_output_is_complete_ends_at_once(
    output: list[int], sampling: dict[str, object], reason: str
) -> None:
    """Nothing is computed; the end is published without tokens and waits to be acknowledged."""
    world = CoreWorld()
    commands = world.tell(CommandReceived(submit("a", output_ids=output, **sampling), "inbox"))
    assert commands[0] == Reply("inbox", SubmitAccepted()), "the reply comes before the end"
    assert world.step is None
    (command,) = only(PublishTokens, world.commands)
    assert (command.message.counts, command.message.finished) == ([0], {0: reason})
    assert finished(world) == [("a", 1, reason)]
    status(world, StreamStatusReply(ack_end=[0]))
    assert len(world.core.streams) == 0


def test_a_failed_row_ends_with_an_error_and_the_rest_goes_on() -> None:
    """The engine's verdict on one row reaches its frontend as a finish reason."""
    world = CoreWorld()
    world.ask(submit("a", b"abc", max_tokens=9))
    world.step = None
    world.tell(StepFinished(StepResult((None,), 5, failed={0: "no way on"})))
    (command,) = only(PublishTokens, world.commands)
    assert (command.message.counts, command.message.finished) == ([0], {0: "error"})
    assert finished(world) == [("a", 1, "error")]


# --- refusals


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (submit(protocol=99), "protocol"),
        (submit(protocol=0), "protocol"),
        (submit(model="other"), "wrong_model"),
        (submit(prompt=[]), "bad_request"),
        (submit(prompt=[258]), "bad_request"),
        (submit(output_ids=[300]), "bad_request"),
        (submit(logit_bias={258: 1.0}), "bad_request"),
        (submit(prompt=[1] * 64), "too_large"),
    ],
)
def test_what_can_never_run_here_is_refused_by_name(message: Submit, reason: str) -> None:
    """Each refusal names its reason, and nothing is kept of the submission but the key."""
    world = CoreWorld()
    assert refusal(world, message) == reason
    assert len(world.core.streams) == 0
    assert world.step is None


def test_a_prompt_one_token_below_the_limit_is_taken() -> None:
    """One token of output still fits, and ends it."""
    world = CoreWorld()
    assert isinstance(world.ask(submit(prompt=[1] * 63, max_tokens=None)), SubmitAccepted)
    world.run()
    assert len(world.output()) == 1
    assert finished(world) == [("a", 1, "length")]


def test_a_grammar_that_the_engine_cannot_use_is_a_bad_request() -> None:
    """The engine's own words reach the frontend."""
    world = CoreWorld()
    reply = world.ask(submit(grammar=Grammar(text="?")), grammar_fault="no such grammar")
    assert reply == SubmitRefused(reason="bad_request", message="no such grammar")


def test_what_does_not_fit_now_is_refused_and_fits_later() -> None:
    """`no_room` is about this moment: under a new generation it may be taken."""
    world = CoreWorld(kv_blocks=2)
    world.ask(submit("a", b"12345", max_tokens=2))
    assert refusal(world, submit("b", b"12345")) == "no_room"
    world.run()
    assert isinstance(world.ask(submit("b", b"12345", generation=2, max_tokens=2)), SubmitAccepted)


# --- idempotence


def test_a_repeated_submission_gets_the_first_reply_and_starts_nothing() -> None:
    """While it runs, after its end, and after it is forgotten."""
    world = CoreWorld()
    first = world.ask(submit("a", max_tokens=2))
    assert world.ask(submit("a", max_tokens=2)) == first
    world.run()
    assert world.ask(submit("a", max_tokens=2)) == first
    status(world, StreamStatusReply(ack_end=[0]))
    assert len(world.core.streams) == 0
    assert world.ask(submit("a", max_tokens=2)) == first
    assert world.step is None
    assert finished(world) == [("a", 1, "length")]


def test_a_repeated_refusal_stays_a_refusal() -> None:
    """A late repeat must not start what its sender has long placed elsewhere."""
    world = CoreWorld(kv_blocks=2)
    world.ask(submit("a", b"12345", max_tokens=2))
    first = world.ask(submit("b", b"12345"))
    world.run()
    assert world.ask(submit("b", b"12345")) == first


def test_keys_are_forgotten_after_a_minute() -> None:
    """Memory of ended keys is bounded by time."""
    world = CoreWorld()
    assert refusal(world, submit("a", model="other")) == "wrong_model"
    world.tell(TimePassed(), after_us=59 * SECOND_US)
    assert world.core.streams.newest_generation("a") == 1
    world.tell(TimePassed(), after_us=2 * SECOND_US)
    assert world.core.streams.newest_generation("a") == 0


def test_a_higher_generation_supersedes_the_older_one() -> None:
    """The old one stops, holds nothing and says nothing more; the new one runs."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=9))
    world.finish_step()
    assert isinstance(world.ask(submit("a", generation=2, max_tokens=3)), SubmitAccepted)
    assert finished(world) == [("a", 1, "cancelled")]
    before = len(world.output("a", 1))
    world.run()
    assert len(world.output("a", 1)) == before
    assert world.output("a", 2) == expected_output(b"hello", submit().sampling, 3)


def test_a_lower_generation_is_refused_also_after_the_newer_one_is_over() -> None:
    """A late submission never starts again what was superseded."""
    world = CoreWorld()
    world.ask(submit("a", generation=5, max_tokens=1))
    assert refusal(world, submit("a", generation=4)) == "superseded"
    world.run()
    status(world, StreamStatusReply(ack_end=[0]))
    assert refusal(world, submit("a", generation=4)) == "superseded"
    assert world.step is None


# --- cancel


def test_cancel_frees_at_once_between_steps() -> None:
    """Its blocks are free, its key is over, no tokens follow."""
    world = CoreWorld(max_step_tokens=8)
    world.ask(submit("a", [1] * 40, max_tokens=9))
    world.finish_step()
    assert world.ask(Cancel(sequence="a", generation=1)) == CancelDone()
    world.run()
    assert world.core.batcher.pool.used_blocks == 0
    assert world.output() == []
    assert finished(world) == [("a", 1, "cancelled")]


def test_cancel_during_a_step_drops_that_step_s_token() -> None:
    """What the engine was computing for it is thrown away."""
    world = CoreWorld()
    world.ask(submit("a"))
    world.ask(submit("b", b"other"))
    world.ask(Cancel(sequence="a", generation=1))
    world.run()
    assert world.output("a") == []
    assert len(world.output("b")) == 4


def test_cancel_of_an_unknown_or_other_generation_changes_nothing() -> None:
    """It is answered all the same."""
    world = CoreWorld()
    world.ask(submit("a", generation=2))
    assert world.ask(Cancel(sequence="a", generation=1)) == CancelDone()
    assert world.ask(Cancel(sequence="nobody", generation=1)) == CancelDone()
    world.run()
    assert len(world.output("a", 2)) == 4


def test_a_cancel_that_overtakes_its_submission_still_counts() -> None:
    """The late submission is refused."""
    world = CoreWorld()
    world.ask(Cancel(sequence="a", generation=1))
    assert refusal(world, submit("a")) == "superseded"
    assert isinstance(world.ask(submit("a", generation=2)), SubmitAccepted)


def test_a_cancel_that_overtook_counts_also_when_an_older_generation_ends_after_it() -> None:
    """What is remembered of an id is never older than what was heard of it."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=1))
    world.ask(Cancel(sequence="a", generation=2))
    world.run()
    status(world, StreamStatusReply(ack_end=[0]))
    assert refusal(world, submit("a", generation=2)) == "superseded"


def test_a_cancel_of_an_ended_sequence_forgets_it() -> None:
    """Nobody waits for its acknowledgement any more."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=1))
    world.run()
    world.ask(Cancel(sequence="a", generation=1))
    assert len(world.core.streams) == 0
    assert finished(world) == [("a", 1, "length")], "it ended once"


# --- resend


def test_resend_publishes_again_from_an_index_with_the_end() -> None:
    """All tokens from the index on, and the finish reason if it has ended."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=5))
    world.run()
    published = len(world.commands)
    assert world.ask(Resend(sequence="a", generation=1, first_index=2)) == ResendDone(known=True)
    (command,) = only(PublishTokens, world.commands[published:])
    assert rows_of(command, "a") == [(2, world.output()[2:])]
    assert command.message.finished == {0: "length"}


def test_resend_of_an_end_alone_sends_the_reason() -> None:
    """A frontend that has all tokens may still lack the end."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=2))
    world.run()
    world.ask(Resend(sequence="a", generation=1, first_index=2))
    last = only(PublishTokens, world.commands)[-1].message
    assert (last.counts, last.first_indices, last.finished) == ([0], [2], {0: "length"})


def test_resend_of_what_is_not_here_says_so() -> None:
    """Unknown, and known under another generation."""
    world = CoreWorld()
    world.ask(submit("a", generation=2))
    assert world.ask(Resend(sequence="a", generation=1, first_index=0)) == ResendDone(known=False)
    assert world.ask(Resend(sequence="x", generation=1, first_index=0)) == ResendDone(known=False)


def test_resend_starts_at_what_was_made_here_and_brings_its_logprobs_and_cached_tokens() -> None:
    """Output that the frontend submitted itself is not sent back; the rest is complete."""
    world = CoreWorld()
    world.ask(submit("a", output_ids=[65, 66], max_tokens=5, logprobs=1))
    world.run()
    world.ask(Resend(sequence="a", generation=1, first_index=0))
    last = only(PublishTokens, world.commands)[-1].message
    assert (last.first_indices, last.counts) == ([2], [3])
    assert len(last.logprobs[0]) == 3
    assert last.cached_tokens == {0: 0}


def test_a_long_resend_is_cut_into_messages() -> None:
    """No message grows with the output."""
    tokens = 2 * RESEND_TOKENS + 10
    world = CoreWorld(kv_blocks=1024, max_model_len=4096)
    world.ask(submit("a", max_tokens=tokens))
    world.run()
    before = len(world.commands)
    world.ask(Resend(sequence="a", generation=1, first_index=0))
    messages = [command.message for command in only(PublishTokens, world.commands[before:])]
    assert [message.counts for message in messages] == [[RESEND_TOKENS], [RESEND_TOKENS], [10]]
    assert [message.finished for message in messages] == [{}, {}, {0: "length"}]


# --- status


def test_each_frontend_is_asked_every_second_about_its_own_sequences() -> None:
    """Rows say generation, next index and whether it has ended."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=2))
    world.ask(submit("b", b"12", frontend="f2", max_tokens=9, generation=4))
    for _ in range(3):
        world.finish_step()
    questions = asked(world.tell(TimePassed(), after_us=SECOND_US))
    first, second = questions["f1"].message, questions["f2"].message
    assert (first.worker, first.sequences, first.ended, first.next_indices) == ("w1", ("a",), [1], [2])
    assert (second.sequences, second.generations, second.ended, second.next_indices) == (("b",), [4], [0], [2])


def test_no_second_status_while_one_is_under_way() -> None:
    """A slow frontend is not flooded."""
    world = CoreWorld()
    world.ask(submit("a"))
    assert asked(world.tell(TimePassed(), after_us=SECOND_US))
    assert not asked(world.tell(TimePassed(), after_us=SECOND_US))
    world.tell(StatusUnanswered("f1"))
    assert asked(world.tell(TimePassed(), after_us=SECOND_US))


def test_a_frontend_without_sequences_is_not_asked() -> None:
    """Once all ends are acknowledged there is nothing to ask about."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=1))
    world.run()
    status(world, StreamStatusReply(ack_end=[0]))
    assert not asked(world.tell(TimePassed(), after_us=SECOND_US))


def test_the_answer_resends_cancels_and_forgets_by_row() -> None:
    """Each of the three verdicts acts on the row of the status it answers."""
    world = CoreWorld(kv_blocks=64)
    for name in ("a", "b", "c"):
        world.ask(submit(name, name.encode() * 3, max_tokens=2 if name == "c" else 20))
    for _ in range(4):
        world.finish_step()
    done = status(world, StreamStatusReply(resend={0: 1}, cancel=[1], ack_end=[2]))
    (again,) = [c for c in done if isinstance(c, PublishTokens)]
    assert rows_of(again, "a")[0][0] == 1
    assert [sequence.sequence for sequence in world.core.streams] == ["a"]
    assert ("b", 1, "cancelled") in finished(world)


def test_a_late_answer_does_not_touch_a_newer_generation() -> None:
    """Rows are matched by key, not by position or name."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=20))
    question = asked(world.tell(TimePassed(), after_us=SECOND_US))["f1"].message
    world.ask(submit("a", generation=2, max_tokens=20))
    world.tell(StatusAnswered("f1", question, StreamStatusReply(cancel=[0], ack_end=[0], resend={0: 0})))
    assert [sequence.generation for sequence in world.core.streams] == [2]


def test_rows_that_do_not_exist_are_ignored() -> None:
    """A wrong answer harms nobody."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=20))
    status(world, StreamStatusReply(resend={7: 0}, cancel=[8], ack_end=[0, 9]))
    assert [sequence.sequence for sequence in world.core.streams] == ["a"], "a live row is not acknowledged away"


def test_a_silent_frontend_loses_its_sequences_and_no_other_does() -> None:
    """Thirty seconds without an answer while connected."""
    world = CoreWorld(kv_blocks=64)
    world.ask(submit("a", max_tokens=40))
    world.ask(submit("b", b"12", frontend="f2", max_tokens=40))
    for _ in range(30):
        for frontend, question in asked(world.tell(TimePassed(), after_us=SECOND_US)).items():
            silent = frontend == "f1"
            answer = StatusUnanswered(frontend) if silent else StatusAnswered(frontend, question.message, NOTHING)
            world.tell(answer)
    assert [sequence.sequence for sequence in world.core.streams] == ["b"]
    assert finished(world) == [("a", 1, "cancelled")]


NOTHING = StreamStatusReply()


def test_silence_does_not_count_while_our_own_connection_is_down() -> None:
    """After the reconnection a frontend has its full time again, and is asked at once."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=40))
    world.tell(ConnectionLost())
    for _ in range(60):
        assert not asked(world.tell(TimePassed(), after_us=SECOND_US)), "nobody can be asked"
    commands = world.tell(ConnectionRestored())
    assert set(asked(commands)) == {"f1"}
    events = [command.message for command in only(PublishEvent, commands)]
    assert [type(event) for event in events] == [WorkerJoined, WorkerReport]
    for _ in range(29):
        world.tell(TimePassed(), StatusUnanswered("f1"), after_us=SECOND_US)
    assert len(world.core.streams) == 1
    world.tell(TimePassed(), after_us=SECOND_US)
    assert len(world.core.streams) == 0


def test_silence_does_not_count_while_we_stood_still_ourselves() -> None:
    """After a pause of the machine a frontend has its full time again."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=40))
    world.tell(StoodStill(), TimePassed(), after_us=60 * SECOND_US)
    for _ in range(29):
        world.tell(TimePassed(), StatusUnanswered("f1"), after_us=SECOND_US)
    assert len(world.core.streams) == 1
    world.tell(TimePassed(), after_us=SECOND_US)
    assert len(world.core.streams) == 0


# --- reports


def reports(world: CoreWorld) -> list[WorkerReport]:
    """All reports so far."""
    return [c.message for c in only(PublishEvent, world.commands) if isinstance(c.message, WorkerReport)]


def test_the_first_event_announces_the_worker() -> None:
    """A join and a full report, numbered from zero."""
    world = CoreWorld()
    events = [command.message for command in only(PublishEvent, world.tell(TimePassed()))]
    assert events[0] == WorkerJoined(spec=world.core.config.spec)
    assert isinstance(events[1], WorkerReport)
    assert (events[1].number, events[1].free_blocks, events[1].used_blocks) == (0, 16, 0)


def test_reports_keep_their_rhythm_whenever_the_core_is_woken() -> None:
    """Late wake-ups neither shift the rhythm nor bring two reports at once."""
    world = CoreWorld()
    world.tell(TimePassed())
    assert world.core.wake_us == SECOND_US
    world.tell(TimePassed(), after_us=1_400_000)
    assert world.core.wake_us == 2 * SECOND_US
    world.tell(TimePassed(), after_us=3_100_000)
    assert world.core.wake_us == 5 * SECOND_US
    assert [report.number for report in reports(world)] == [0, 1, 2]


def test_the_join_is_repeated_with_every_tenth_report() -> None:
    """A join that was lost is made good."""
    world = CoreWorld()
    world.tell(TimePassed())
    for _ in range(20):
        world.tell(TimePassed(), after_us=SECOND_US)
    joins = [c for c in only(PublishEvent, world.commands) if isinstance(c.message, WorkerJoined)]
    assert len(joins) == 3


def test_a_report_lists_every_live_sequence_with_what_it_holds() -> None:
    """Prompt and output tokens, blocks, state; ended ones are left out."""
    world = CoreWorld(kv_blocks=5)
    world.ask(submit("a", b"abcdef", max_tokens=9))
    world.ask(submit("b", b"ghijkl", max_tokens=9, generation=2))
    while not world.core.batcher.waiting:
        world.finish_step()
    world.tell(TimePassed(), after_us=SECOND_US)
    report = reports(world)[-1]
    assert (report.sequences, report.generations, report.states) == (("a", "b"), [1, 2], [0, 1])
    tokens = [len(sequence.token_ids) for sequence in world.core.streams]
    assert report.tokens == tokens
    assert report.blocks == [-(-tokens[0] // 4), 0]
    assert (report.used_blocks, report.free_blocks, report.preemptions) == (report.blocks[0], 5 - report.blocks[0], 1)
    world.run()
    world.tell(TimePassed(), after_us=SECOND_US)
    assert reports(world)[-1].sequences == ()


def test_shared_blocks_count_once_in_use_and_with_every_holder() -> None:
    """`used_blocks` is unique blocks."""
    world = CoreWorld()
    for name, seed in (("a", 1), ("b", 2)):
        world.ask(submit(name, b"0123456789", seed=seed, max_tokens=9))
    world.finish_step()
    world.finish_step()
    world.tell(TimePassed(), after_us=SECOND_US)
    report = reports(world)[-1]
    assert report.blocks == [3, 3]
    assert report.used_blocks == 4


def test_step_time_is_a_mean_of_decode_steps() -> None:
    """Prefill does not count; the mean moves slowly."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=9))
    for step_us in (5000, 100, 200):
        world.step = None
        world.tell(StepFinished(StepResult((SampledToken(65),), step_us)))
    world.tell(CommandReceived(Report()))
    assert reports(world)[-1].step_us == 110


def test_report_is_answered_with_a_join_and_a_report_and_no_reply() -> None:
    """A new leader asks all workers at once."""
    world = CoreWorld()
    commands = world.tell(CommandReceived(Report(), "inbox"))
    assert [type(command.message) for command in only(PublishEvent, commands)][:2] == [WorkerJoined, WorkerReport]
    assert not only(Reply, commands)


def test_a_command_without_a_reply_subject_is_obeyed_silently() -> None:
    """Nobody waits, nobody is answered."""
    world = CoreWorld()
    assert not only(Reply, world.tell(CommandReceived(submit("a"))))
    world.run()
    assert len(world.output()) == 4


# --- the end


def stages(world: CoreWorld) -> list[object]:
    """What was said to all in the end."""
    return [
        c.message if isinstance(c, PublishEvent) else c
        for c in world.commands
        if isinstance(c, Exit) or (isinstance(c, PublishEvent) and isinstance(c.message, WorkerLeft))
    ]


LEFT = [WorkerLeft(worker="w1", reason="stopped"), Exit()]


def test_an_idle_worker_leaves_at_once() -> None:
    """Nothing runs, nothing waits to be acknowledged."""
    world = CoreWorld()
    world.tell(StopRequested())
    assert stages(world) == LEFT
    assert world.tell(TimePassed(), after_us=SECOND_US) == [], "afterwards it is silent"


def test_a_stopping_worker_finishes_what_runs_and_takes_nothing_new() -> None:
    """It says so in a report at once, refuses, and leaves when all ends are acknowledged."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=3))
    world.tell(StopRequested())
    assert reports(world)[-1].draining
    assert refusal(world, submit("b")) == "stopping"
    commands = world.run()
    assert len(world.output()) == 3
    question = asked(commands)["f1"].message
    assert stages(world) == []
    world.tell(StatusAnswered("f1", question, StreamStatusReply(ack_end=[0])))
    assert stages(world) == LEFT


def test_a_frontend_that_acknowledges_nothing_holds_the_stop_up_for_a_moment_only() -> None:
    """Two seconds after the last end the worker leaves."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=3))
    world.tell(StopRequested(), StopRequested())
    world.run()
    world.tell(TimePassed(), after_us=1_900_000)
    assert stages(world) == []
    world.tell(TimePassed(), after_us=100_000)
    assert stages(world) == LEFT


def test_at_the_deadline_the_rest_is_given_back_with_all_its_output() -> None:
    """Running and preempted sequences alike; the worker leaves when the frontends know."""
    world = CoreWorld(kv_blocks=5)
    world.ask(submit("a", b"abcdef", max_tokens=9))
    world.ask(submit("b", b"ghijkl", max_tokens=9))
    while not world.core.batcher.waiting:
        world.finish_step()
    world.tell(StopRequested())
    assert world.core.wake_us <= 10 * SECOND_US
    evictions = only(SendEvicted, world.tell(TimePassed(), after_us=10 * SECOND_US))
    assert [(e.frontend, e.message.sequence, e.message.output_ids) for e in evictions] == [
        ("f1", "a", world.output("a")),
        ("f1", "b", world.output("b")),
    ]
    assert stages(world) == []
    world.tell(EvictionAnswered("a", 1))
    assert stages(world) == []
    world.tell(EvictionAnswered("b", 1))
    assert stages(world) == LEFT
    assert world.core.batcher.pool.used_blocks in (0, len(world.step.rows[0].block_table) if world.step else 0)


def test_an_eviction_is_repeated_and_then_left_to_the_frontend() -> None:
    """Three times; a frontend that never answers finds out by the silence."""
    world = CoreWorld(stop_deadline_us=0)
    world.ask(submit("a", max_tokens=9))
    first = only(SendEvicted, world.tell(StopRequested()))
    assert only(SendEvicted, world.tell(EvictionUnanswered("a", 1))) == first
    assert only(SendEvicted, world.tell(EvictionUnanswered("a", 1))) == first
    assert stages(world) == []
    world.tell(EvictionUnanswered("a", 1))
    assert stages(world) == LEFT


def test_a_failed_engine_gives_everything_back_and_exits_with_its_reason() -> None:
    """The step under way never finishes; no new one is wanted."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=9))
    commands = world.tell(EngineFailed("out of memory"))
    assert [e.message.sequence for e in only(SendEvicted, commands)] == ["a"]
    assert not only(RunStep, commands)
    world.tell(EvictionAnswered("a", 1))
    assert stages(world) == [WorkerLeft(worker="w1", reason="out of memory"), Exit("out of memory")]


def test_a_failed_engine_while_stopping_is_still_a_failure() -> None:
    """Whatever the worker was about to do."""
    world = CoreWorld()
    world.ask(submit("a", max_tokens=9))
    world.tell(StopRequested())
    world.tell(EngineFailed("broken"), EvictionAnswered("a", 1))
    assert stages(world)[-1] == Exit("broken")


def test_time_never_runs_backwards() -> None:
    """A clock that does is a bug of the shell."""
    world = CoreWorld()
    world.tell(TimePassed(), after_us=10)
    with pytest.raises(AssertionError, match="backwards"):
        world.core.handle(TimePassed(), 5)


def test_asking_is_one_command_for_each_frontend() -> None:
    """A frontend with many sequences is asked once."""
    world = CoreWorld()
    world.ask(submit("a"))
    world.ask(submit("b", b"12"))
    questions = only(AskStatus, world.tell(TimePassed(), after_us=SECOND_US))
    assert [question.frontend for question in questions] == ["f1"]
    assert questions[0].message.sequences == ("a", "b")


def test_a_worker_that_moves_nothing_says_so() -> None:
    """An order to move is refused by name, and the sequence goes on."""
    world = CoreWorld()
    world.ask(submit("a"))
    order = Migrate(
        migration="1-1", sequence="a", generation=1, target="other", mode="kv", reason="consolidate", term=1
    )
    reply = world.ask(order)
    assert isinstance(reply, MigrateRefused)
    assert reply.reason == "unsupported"
    assert world.core.config.spec.migration_modes == ()
    assert [row.sequence for row in world.core.batcher.running] == ["a"]
