import json
import math
import subprocess
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.factory import make_engine
from mell_gpu_worker.engine.fake import ALPHABET, FakeEngine, expected_output
from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.messages.sampling import Grammar, SamplingParams
from mell_shared.models import FAKE_EOS_ID, FAKE_MODEL

PROMPT = b"The quick brown fox jumps over the lazy dog, again and again."


def options(**changes: object) -> EngineOptions:
    """A small fake engine's options."""
    fields = {"engine": "fake", "model": FAKE_MODEL, "model_dir": Path(), "kv_blocks": 32, "block_tokens": 4}
    return EngineOptions(**(fields | changes))  # type: ignore[arg-type]


def sampling(**changes: object) -> SamplingParams:
    """Parameters that never end by themselves."""
    return SamplingParams(**({"seed": 7, "ignore_eos": True} | changes))  # type: ignore[arg-type]


class Runner:
    """One sequence on an engine, its block table chosen by the test."""

    def __init__(self, engine: FakeEngine, prompt: Sequence[int], table: Sequence[int], params: SamplingParams) -> None:
        self.engine = engine
        self.token_ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.table = list(table)
        self.params = params
        self.computed = 0

    def step(self, count: int | None = None) -> int | None:
        """Compute `count` tokens (all that are left if None); returns the sampled token, if any."""
        left = len(self.token_ids) - self.computed
        count = left if count is None else min(count, left)
        params = self.params if count == left else None
        row = StepRow("s", self.token_ids, self.prompt_tokens, self.computed, count, self.table, params)
        (sampled,) = self.engine.execute([row]).sampled
        self.computed += count
        if sampled is not None:
            self.token_ids.append(sampled.token_id)
        return None if sampled is None else sampled.token_id

    def generate(self, count: int) -> list[int]:
        """Run until `count` tokens are sampled."""
        while len(self.token_ids) - self.prompt_tokens < count:
            self.step()
        return self.token_ids[self.prompt_tokens :]


def test_the_output_is_the_expected_one_whatever_the_blocks_and_chunks() -> None:
    """Neither the order of blocks nor the size of prefill chunks matters."""
    wanted = expected_output(PROMPT, sampling(), 40)
    for table, chunk in ((range(32), 100), (range(31, -1, -1), 1), ([*range(0, 32, 2), *range(1, 32, 2)], 7)):
        runner = Runner(FakeEngine(options()), PROMPT, list(table), sampling())
        while runner.step(chunk) is None:
            pass
        assert runner.generate(40) == wanted


def test_text_is_printable() -> None:
    """Every token but the end is a letter of the alphabet."""
    output = expected_output(PROMPT, sampling(), 500)
    assert set(output) <= set(ALPHABET)
    assert len(ALPHABET) == 64
    assert bytes(output).decode("ascii").isprintable()


def test_sampled_output_depends_on_seed_and_choice_and_greedy_on_neither() -> None:
    """As with any model."""
    seeds = {
        tuple(expected_output(PROMPT, sampling(seed=seed, choice=choice), 20)) for seed in (1, 2) for choice in (0, 1)
    }
    assert len(seeds) == 4
    greedy = {tuple(expected_output(PROMPT, sampling(seed=seed, temperature=0), 20)) for seed in (1, 2)}
    assert len(greedy) == 1


@pytest.mark.parametrize("damage", ["zero", "stale", "swap"])
@given(position=st.integers(0, len(PROMPT) - 1))
@settings(max_examples=40, deadline=None)
def test_any_damage_to_the_pool_changes_the_text(damage: str, position: int) -> None:
    """A block lost, left from another sequence, or exchanged for another is noticed within a turn over all blocks."""
    engine = FakeEngine(options(kv_blocks=64))
    stale = Runner(engine, bytes(reversed(PROMPT)), range(32, 64), sampling())
    stale.step()
    runner = Runner(engine, PROMPT, range(32), sampling())
    runner.generate(2)
    block = position // 4
    if damage == "zero":
        engine.pool[block * 4 : block * 4 + 4] = array("Q", [0] * 4)
    elif damage == "stale":
        runner.table[block] = 32 + block
    else:
        other = (block + 1) % (len(PROMPT) // 4)
        runner.table[block], runner.table[other] = runner.table[other], runner.table[block]
    # Four stretches of 16 tokens, two probed a step, each of 16 offsets in turn: all positions in 64 steps.
    assert runner.generate(40 + 26) != expected_output(PROMPT, sampling(), 66)


def test_a_missing_tail_changes_the_very_next_token() -> None:
    """KV that was never computed at the target of a move cannot be mistaken for KV that was."""
    wanted = expected_output(PROMPT, sampling(), 12)
    for missing in (1, 2, 3):
        runner = Runner(FakeEngine(options()), [*PROMPT, *wanted[:4]], range(32), sampling())
        runner.prompt_tokens = len(PROMPT)
        runner.step(len(runner.token_ids) - 1 - missing)
        runner.computed += missing
        assert runner.step() != wanted[4]


def test_the_end_comes_on_average_after_some_hundred_tokens() -> None:
    """About one token in 512 ends the text; with `ignore_eos` none does."""
    lengths = [len(expected_output(PROMPT, SamplingParams(seed=seed), 4000)) for seed in range(40)]
    assert 250 < sum(lengths) / len(lengths) < 1000
    assert all(FAKE_EOS_ID not in expected_output(PROMPT, sampling(seed=seed), 2000) for seed in range(5))


def test_min_tokens_keeps_the_end_away() -> None:
    """The end token is never sampled below the minimum."""
    early = next(s for s in range(1000) if len(expected_output(PROMPT, SamplingParams(seed=s), 60)) < 50)
    output = expected_output(PROMPT, SamplingParams(seed=early, min_tokens=200), 200)
    assert len(output) == 200
    assert FAKE_EOS_ID not in output


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [({65: 100.0}, [65]), ({65: 90.0, 66: 100.0}, [66]), ({FAKE_EOS_ID: 100.0}, [FAKE_EOS_ID])],
)
def test_a_strong_bias_forces_its_token(bias: dict[int, float], wanted: list[int]) -> None:
    """The greatest bias wins; the end token too."""
    assert expected_output(PROMPT, SamplingParams(seed=1, logit_bias=bias), 1) == wanted


def test_a_bias_cannot_force_the_end_below_min_tokens() -> None:
    """`min_tokens` is stronger."""
    params = SamplingParams(seed=1, logit_bias={FAKE_EOS_ID: 100.0}, min_tokens=3)
    output = expected_output(PROMPT, params, 10)
    assert output.index(FAKE_EOS_ID) == 3


def test_banned_tokens_never_come() -> None:
    """A strong negative bias removes a token, the end token included."""
    banned = dict.fromkeys((*b"abcdefghij ", FAKE_EOS_ID), -100.0)
    output = expected_output(PROMPT, SamplingParams(seed=1, logit_bias=banned), 3000)
    assert len(output) == 3000
    assert not set(output) & set(banned)


def test_a_weak_bias_changes_nothing() -> None:
    """Only a bias that would decide alone is honoured."""
    assert expected_output(PROMPT, sampling(logit_bias={65: 1.0}), 50) == expected_output(PROMPT, sampling(), 50)


@pytest.mark.parametrize("alternatives", [0, 1, 5, 20])
def test_logprobs_are_plausible(alternatives: int) -> None:
    """The chosen token leads, the rest falls, all of it at most one; the same each time."""
    runner = Runner(FakeEngine(options()), PROMPT, range(32), sampling(logprobs=alternatives))
    row = StepRow("s", runner.token_ids, len(PROMPT), 0, len(PROMPT), runner.table, runner.params)
    (sampled,) = runner.engine.execute([row]).sampled
    assert sampled is not None
    assert sampled.logprobs is not None
    assert runner.engine.execute([row]).sampled[0] == sampled
    top = sampled.logprobs
    assert len(top.top_ids) == len(set(top.top_ids)) == len(top.top_logprobs) == alternatives
    assert list(top.top_logprobs) == sorted(top.top_logprobs, reverse=True)
    assert sum(math.exp(p) for p in top.top_logprobs) <= 1
    if alternatives:
        assert (top.top_ids[0], top.top_logprobs[0]) == (sampled.token_id, top.logprob)


def test_nothing_is_sampled_in_the_middle_of_a_prompt() -> None:
    """A chunk without parameters gives no token."""
    runner = Runner(FakeEngine(options()), PROMPT, range(32), sampling())
    assert runner.step(5) is None
    assert runner.computed == 5


def test_the_latency_model_adds_up() -> None:
    """A fixed part, a part for each sequence, a part for each token of prefill; the engine is then not instant."""
    engine = FakeEngine(options(fake_step_us=100, fake_sequence_us=10, fake_prefill_token_us=1))
    prefill = StepRow("s", PROMPT, len(PROMPT), 0, 60, list(range(32)), None)
    decode = StepRow("t", PROMPT, 1, 5, 1, list(range(32)), None)
    assert engine.step_us([prefill, decode]) == 100 + 20 + 60
    assert engine.execute([prefill, decode]).step_us == 180
    assert not engine.spec.instant
    assert FakeEngine(options()).spec.instant


def test_the_spec_follows_the_options() -> None:
    """Sizes asked for are the sizes there are; zero means the engine's own."""
    spec = FakeEngine(options(max_model_len=100)).spec
    assert (spec.kv_blocks, spec.block_tokens, spec.max_model_len) == (32, 4, 100)
    own = FakeEngine(options(kv_blocks=0)).spec
    assert own.kv_blocks > 1000
    assert own.max_model_len > 1000
    assert FakeEngine(options(block_tokens=8)).spec.kv_layout != spec.kv_layout


@pytest.mark.parametrize(("change", "words"), [({"model": "gpt2"}, "--model"), ({"device": "cuda"}, "--device")])
def test_what_it_cannot_be_is_refused_with_a_way_out(change: dict[str, object], words: str) -> None:
    """A wrong model or device is an error that says what to set."""
    with pytest.raises(EngineError, match=words):
        make_engine(options(**change))


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_a_grammar_holds_the_text_to_it(seed: int) -> None:
    """With a JSON schema the text is JSON of that schema, followed by the end."""
    grammar = Grammar(text=LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA)))
    params = SamplingParams(seed=seed, grammar=grammar)
    engine = FakeEngine(options(kv_blocks=1024))
    assert engine.check_grammar(grammar.text) is None
    runner = Runner(engine, PROMPT, range(1024), params)
    while runner.step() != FAKE_EOS_ID:
        assert len(runner.token_ids) < 4000, "the text does not end"
    value = json.loads(bytes(runner.token_ids[len(PROMPT) : -1]))
    assert {"name", "age"} <= value.keys() <= SCHEMA["properties"].keys()
    assert isinstance(value["age"], int)


@pytest.mark.parametrize("output", [[65], [*b"ab", FAKE_EOS_ID]])
def test_output_that_a_grammar_cannot_go_on_from_fails_its_row_alone(output: list[int]) -> None:
    """Wrong or complete output: the row says why, the others are good."""
    grammar = Grammar(text='start: "ab"')
    engine = FakeEngine(options())
    rows = [
        StepRow(
            "s", [*PROMPT, *output], len(PROMPT), 0, len(PROMPT) + len(output), range(32), sampling(grammar=grammar)
        ),
        StepRow("t", PROMPT, len(PROMPT), 0, len(PROMPT), range(32), sampling()),
    ]
    result = engine.execute(rows)
    assert result.sampled[0] is None
    assert result.sampled[1] is not None
    assert list(result.failed) == [0]
    assert "grammar" in result.failed[0]


@pytest.mark.parametrize(("text", "token"), [(r"start: /\n/", 10), (r"start: /[\x01]/", None)])
def test_unprintable_text_is_only_a_line_break_that_the_grammar_demands(text: str, token: int | None) -> None:
    """Where only a line break is allowed it comes; where only control characters are, the row fails."""
    row = StepRow("s", PROMPT, len(PROMPT), 0, len(PROMPT), range(32), sampling(grammar=Grammar(text=text)))
    result = FakeEngine(options()).execute([row])
    (sampled,) = result.sampled
    assert (None if sampled is None else sampled.token_id) == token
    assert list(result.failed) == ([] if token else [0])


def test_a_grammar_that_is_none_is_refused_with_its_fault() -> None:
    """A request with it gets a reason, not wrong text."""
    assert "Expected" in (FakeEngine(options()).check_grammar("garbage {{") or "")


def test_closing_twice_is_safe() -> None:
    """`close` frees the pool."""
    engine = FakeEngine(options())
    engine.close()
    engine.close()
    assert len(engine.pool) == 0


def test_the_fake_engine_needs_no_torch() -> None:
    """Building and running it imports neither torch nor transformers nor numpy."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from mell_gpu_worker.__main__ import main\n"
        "from mell_gpu_worker.engine.factory import make_engine\n"
        "from mell_gpu_worker.engine.options import EngineOptions\n"
        "make_engine(EngineOptions(engine='fake', model='fake', model_dir=Path())).close()\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'llguidance') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
