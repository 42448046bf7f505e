import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_gpu_worker.core.sequence import Order, Phase, accept
from mell_gpu_worker.core.step import SampledToken, StepResult
from mell_gpu_worker.engine.fake import expected_output
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.worker import Submit
from mell_shared.models import FAKE_EOS_ID

from .worlds import BLOCK_TOKENS, BatchWorld, submit


def outputs_of(message: Submit, count: int) -> list[int]:
    """What the sequence must generate, undisturbed."""
    return expected_output(message.prompt_ids, message.sampling, count)


def test_a_prompt_is_computed_and_sampled_in_one_step_if_it_fits() -> None:
    """Prefill of a short prompt samples the first token at once, then each step decodes one."""
    world = BatchWorld()
    sequence = world.take(submit(prompt=b"hello", max_tokens=3))
    assert [world.shape() for _ in range(4)] == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)], []]
    assert sequence.output_ids() == outputs_of(submit(prompt=b"hello"), 3)
    assert world.ended == {"a": "length"}
    assert world.batcher.pool.used_blocks == 0


def test_a_long_prompt_is_computed_in_chunks_without_stalling_decodes() -> None:
    """Decodes come first in every step, the prefill gets what is left of the budget."""
    world = BatchWorld(max_step_tokens=8)
    world.take(submit("a", b"abcde", max_tokens=8))
    world.shape()
    world.take(submit("b", b"0123456789012345678", max_tokens=2))
    assert world.shape() == [("a", 5, 1), ("b", 0, 7)]
    assert world.shape() == [("a", 6, 1), ("b", 7, 7)]
    assert world.shape() == [("a", 7, 1), ("b", 14, 5)]
    assert world.shape() == [("a", 8, 1), ("b", 19, 1)]


def test_only_the_row_that_reaches_the_end_samples() -> None:
    """A chunk in the middle of a prompt has no sampling parameters."""
    world = BatchWorld(max_step_tokens=8)
    world.take(submit("a", b"0123456789"))
    assert [row.sampling is None for row in world.step()] == [True]
    assert [row.sampling is None for row in world.step()] == [False]


def test_prefill_goes_by_priority_then_by_arrival() -> None:
    """The higher priority first; equal ones in the order in which they came."""
    world = BatchWorld(max_step_tokens=8)
    for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        world.take(submit(name, name.encode() * 6, priority=priority))
    assert [row[0] for row in world.shape()] == ["b", "d"]
    assert [row[0] for row in world.shape()] == ["b", "d", "a"]


def test_admission_needs_blocks_for_all_tokens_and_one_more() -> None:
    """Seven tokens fit two blocks of four; eight need a third for the next token."""
    assert BatchWorld(kv_blocks=2).offer(submit(prompt=b"1234567")) is not None
    assert BatchWorld(kv_blocks=2).offer(submit(prompt=b"12345678")) is None


def test_a_refused_sequence_leaves_no_trace() -> None:
    """Refusal changes neither blocks nor queue."""
    world = BatchWorld(kv_blocks=3)
    world.take(submit("a", b"123456"))
    assert world.offer(submit("b", b"123456")) is None
    assert world.batcher.pool.used_blocks == 2
    world.run()
    assert world.offer(submit("b", b"123456")) is not None


def test_no_more_sequences_than_allowed() -> None:
    """`max_sequences` bounds admission also when blocks are free."""
    world = BatchWorld(max_sequences=1)
    world.take(submit("a"))
    assert world.offer(submit("b")) is None


def test_a_repeated_prompt_is_found_in_the_cache() -> None:
    """All full blocks before the last token are shared; at least one token is computed."""
    world = BatchWorld()
    world.take(submit("a", b"01234567"))
    world.run()
    sequence = world.take(submit("b", b"01234567"))
    assert sequence.cached_tokens == 4, "the second block holds the last token"
    assert world.shape() == [("b", 4, 4)]
    world.run()
    assert sequence.output_ids() == outputs_of(submit("b", b"01234567"), 4)


def test_without_a_prefix_cache_every_prompt_is_computed() -> None:
    """`--no-prefix-cache` means that nothing is reused."""
    world = BatchWorld(prefix_cache=False)
    world.take(submit("a", b"01234567"))
    world.run()
    assert world.take(submit("b", b"01234567")).cached_tokens == 0
    assert world.shape() == [("b", 0, 8)]


def test_choices_of_one_prompt_wait_for_the_first_to_compute_it() -> None:
    """Of two equal prompts in one step only one is computed; the other shares it a step later."""
    world = BatchWorld(max_step_tokens=32)
    first = world.take(submit("a", b"0123456789", seed=1))
    second = world.take(submit("b", b"0123456789", seed=2))
    assert world.shape() == [("a", 0, 10)]
    assert world.shape() == [("a", 10, 1), ("b", 8, 2)]
    assert second.cached_tokens == 8
    world.run()
    assert first.output_ids() == outputs_of(submit(prompt=b"0123456789", seed=1), 4)
    assert second.output_ids() == outputs_of(submit(prompt=b"0123456789", seed=2), 4)


def test_whoever_waited_for_a_cancelled_prompt_computes_it_itself() -> None:
    """Waiting for another row's blocks never outlasts that row."""
    world = BatchWorld(max_step_tokens=32)
    first = world.take(submit("a", b"0123456789"))
    second = world.take(submit("b", b"0123456789"))
    world.plan()
    world.batcher.end(first)
    world.finish_step()
    assert world.shape() == [("b", 0, 10)]
    world.run()
    assert second.output_ids() == outputs_of(submit(prompt=b"0123456789"), 4)


def test_when_blocks_run_out_the_latest_arrival_gives_way_and_comes_back_first() -> None:
    """The preempted sequence waits, nothing new is admitted meanwhile, and its output is as if undisturbed."""
    world = BatchWorld(kv_blocks=5, max_step_tokens=16)
    early = world.take(submit("a", b"abcdef", max_tokens=8))
    late = world.take(submit("b", b"ghijkl", max_tokens=8))
    while late.phase is Phase.RUNNING:
        world.step()
    assert early.phase is Phase.RUNNING
    assert world.batcher.preemptions == 1
    assert world.offer(submit("c", b"x")) is None, "the preempted one comes first"
    world.run()
    assert early.output_ids() == outputs_of(submit(prompt=b"abcdef"), 8)
    assert late.output_ids() == outputs_of(submit(prompt=b"ghijkl"), 8)
    assert world.offer(submit("c", b"x")) is not None


def test_the_lowest_priority_gives_way_even_if_it_came_first() -> None:
    """Priority beats arrival when somebody must be preempted, oneself included."""
    world = BatchWorld(kv_blocks=5, max_step_tokens=16)
    low = world.take(submit("a", b"abcdef", max_tokens=8, priority=-1))
    high = world.take(submit("b", b"ghijkl", max_tokens=8))
    while world.batcher.preemptions == 0:
        world.step()
    assert (low.phase, high.phase) == (Phase.WAITING, Phase.RUNNING)
    world.run()
    assert low.output_ids() == outputs_of(submit(prompt=b"abcdef"), 8)


def test_a_resumed_sequence_reuses_what_the_cache_still_holds() -> None:
    """Its own sealed blocks are found again, and its cached prompt tokens are reported as at first."""
    world = BatchWorld(kv_blocks=8, max_step_tokens=32)
    early = world.take(submit("a", b"abcdef", max_tokens=24))
    late = world.take(submit("b", b"ghijklmnopqr", max_tokens=8))
    while late.phase is Phase.RUNNING:
        world.step()
    world.batcher.end(early)
    rows = {row.sequence: row.start for row in world.step()}
    assert rows["b"] > 0, "the head of its chain was evicted last"
    assert late.cached_tokens == 0
    world.run()
    assert late.output_ids() == outputs_of(submit(prompt=b"ghijklmnopqr"), 8)


def test_a_sequence_alone_may_fill_the_whole_pool_and_ends_with_length() -> None:
    """The pool's size is the longest sequence; nothing waits for more."""
    world = BatchWorld(kv_blocks=3)
    sequence = world.take(submit("a", b"hello", max_tokens=None))
    world.run()
    assert world.ended == {"a": "length"}
    assert len(sequence.token_ids) == 3 * BLOCK_TOKENS


def test_cancelling_during_a_step_frees_blocks_only_after_it() -> None:
    """The engine may still write to them."""
    world = BatchWorld()
    sequence = world.take(submit("a", b"hello"))
    world.plan()
    world.batcher.end(sequence)
    assert world.batcher.pool.used_blocks == 2
    assert world.finish_step() == []
    assert world.batcher.pool.used_blocks == 0


def test_a_failed_row_ends_its_sequence_and_no_other() -> None:
    """The engine's reason concerns one row."""
    world = BatchWorld(max_step_tokens=16)
    world.take(submit("a", b"abc"))
    world.take(submit("b", b"def"))
    world.plan()
    progress = world.batcher.commit(StepResult((None, SampledToken(65)), 1, failed={0: "no way on"}))
    assert [(step.sequence.sequence, step.sampled, step.end) for step in progress] == [
        ("a", False, "error"),
        ("b", True, None),
    ]
    assert [sequence.sequence for sequence in world.batcher.running] == ["b"]
    world.batcher.check()


def test_an_answer_for_other_rows_is_a_bug() -> None:
    """The engine must answer for each row it got."""
    world = BatchWorld()
    world.take(submit())
    world.plan()
    with pytest.raises(AssertionError, match="other rows"):
        world.batcher.commit(StepResult((), 1))


def test_planning_twice_is_a_bug() -> None:
    """One step at a time."""
    world = BatchWorld()
    world.take(submit())
    world.plan()
    with pytest.raises(AssertionError, match="not committed"):
        world.batcher.plan()


@pytest.mark.parametrize(
    ("sampling", "tokens", "ends"),
    [
        ({"ignore_eos": False, "max_tokens": 9}, [65, FAKE_EOS_ID], [None, "stop"]),
        ({"ignore_eos": True, "max_tokens": 9}, [FAKE_EOS_ID, 65], [None, None]),
        ({"stop_token_ids": (66,), "max_tokens": 9}, [65, 66], [None, "stop"]),
        ({"stop_token_ids": (66,), "min_tokens": 2, "max_tokens": 9}, [66, 66, 66], [None, None, "stop"]),
        ({"max_tokens": 2}, [65, 65], [None, "length"]),
        ({"max_tokens": 1, "stop_token_ids": (65,)}, [65], ["stop"]),
    ],
)
def test_what_ends_a_sequence(sampling: dict[str, object], tokens: list[int], ends: list[str | None]) -> None:
    """End tokens, stop ids and limits, each as its parameters say."""
    world = BatchWorld()
    world.take(submit("a", b"abc", **sampling))
    found = []
    for token in tokens:
        world.plan()
        (step,) = world.batcher.commit(StepResult((SampledToken(token),), 1))
        found.append(step.end)
    assert found == ends


@st.composite
def workloads(draw: st.DrawFn) -> list[Submit]:
    """Submissions with common beginnings, few priorities, outputs of various lengths, some partly done elsewhere."""
    messages = []
    for number in range(draw(st.integers(2, 12))):
        prompt = b"0123456789abcdefghij"[: draw(st.sampled_from([0, 0, 9, 20]))] + draw(
            st.binary(min_size=1, max_size=6)
        )
        sampling = SamplingParams(
            seed=draw(st.integers(0, 3)),
            max_tokens=draw(st.sampled_from([1, 7, 16, 24])),
            ignore_eos=draw(st.booleans()),
        )
        done = draw(st.integers(0, sampling.max_tokens - 1 if sampling.max_tokens else 0))
        message = submit(f"s{number}", prompt, sampling=sampling, priority=draw(st.integers(0, 2)))
        outputs = outputs_of(message, done)
        if FAKE_EOS_ID not in outputs:
            message = message.model_copy(update={"output_ids": outputs})
        messages.append(message)
    return messages


@settings(max_examples=150, deadline=None)
@given(
    workloads(),
    st.integers(13, 16),
    st.integers(8, 24),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_everything_ends_as_if_alone(
    messages: list[Submit], kv_blocks: int, max_step_tokens: int, prefix_cache: bool, random: object
) -> None:
    """Whatever is mixed, preempted, cancelled, resumed or cached: every output is right and no block leaks."""
    world = BatchWorld(kv_blocks, max_step_tokens, max_sequences=8, prefix_cache=prefix_cache)
    pending, admitted, cancelled = list(messages), {}, set()
    for _ in range(3000):
        while pending and random.random() < 0.7:  # type: ignore[attr-defined]
            sequence = world.offer(pending[0])
            if sequence is None:
                break
            admitted[sequence.sequence] = (pending.pop(0), sequence)
        rows = world.plan()
        live = [sequence for _, sequence in admitted.values() if sequence.live]
        if live and random.random() < 0.03:  # type: ignore[attr-defined]
            victim = random.choice(live)  # type: ignore[attr-defined]
            world.batcher.end(victim)
            cancelled.add(victim.sequence)
            world.batcher.check()
        if rows:
            world.finish_step()
        elif not pending:
            break
    assert not pending, "somebody is never admitted"
    assert world.batcher.pool.used_blocks == 0
    for name, (message, sequence) in admitted.items():
        wanted = outputs_of(message, message.sampling.max_tokens or 0)
        made = sequence.output_ids()
        if name in cancelled:
            assert made == wanted[: len(made)]
        else:
            assert made == wanted
            assert world.ended[name] == (
                "stop" if wanted[-1] == FAKE_EOS_ID and not message.sampling.ignore_eos else "length"
            )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 1)), min_size=2, max_size=8))
def test_first_tokens_come_in_order_of_arrival(prompts: list[tuple[int, int]]) -> None:
    """Within one priority nobody overtakes: first in, first out of prefill."""
    world = BatchWorld(kv_blocks=80, max_step_tokens=8, prefix_cache=False)
    for number, (length, priority) in enumerate(prompts):
        world.take(submit(f"s{number}", [number] * length, priority=priority, max_tokens=2))
    started: list[int] = []
    while rows := world.plan():
        world.finish_step()
        started += [
            int(row.sequence[1:]) for row in rows if row.sampling and row.start + row.count == row.prompt_tokens
        ]
    for priority in (0, 1):
        own = [number for number in started if prompts[number][1] == priority]
        assert own == sorted(own)


def test_who_stands_still_is_neither_computed_nor_preempted() -> None:
    """Its blocks are about to move, or it is about to go on: whoever needs a block waits instead, and comes back."""
    world = BatchWorld(kv_blocks=6)
    first = world.take(submit("a", b"12345678", max_tokens=9))
    still = world.take(submit("b", b"abcdefgh", max_tokens=9))
    world.step()
    still.halted = True
    while not world.batcher.waiting:
        assert "b" not in [row.sequence for row in world.step()]
    assert world.batcher.waiting == [first]
    assert len(still.blocks) == 3
    still.halted = False
    world.run()
    assert world.ended == {"a": "length", "b": "length"}


def test_who_waits_comes_back_only_among_as_many_as_may_run() -> None:
    """One that ended before it was claimed may have to run again when another has its place already."""
    world = BatchWorld(max_step_tokens=2, max_sequences=2)
    for name in ("a", "b"):
        world.take(submit(name, b"1"))
    late = accept(submit("c", b"1"), Order(0, 0, 2), world.limits)
    world.batcher.wait(late)
    while not world.ended:
        assert len(world.step()) <= 2
        assert late.phase is Phase.WAITING
    world.run()
    assert world.ended == dict.fromkeys("abc", "length")
