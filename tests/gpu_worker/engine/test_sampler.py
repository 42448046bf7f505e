import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher

from mell_gpu_worker.core.step import SampledToken, StepRow
from mell_gpu_worker.engine.grammar import GrammarMasks
from mell_gpu_worker.engine.philox import uniforms
from mell_gpu_worker.engine.sampler import Sampler
from mell_shared.messages.sampling import Grammar, SamplingParams
from tests.gpu_worker.engine.test_draw import plain_draw

VOCAB = 259
"""Bytes, then begin, end and one token more; no multiple of 32."""
EOS = 257

DIGITS = LLMatcher.grammar_from_regex("[0-9]{3}")


@pytest.fixture(scope="module")
def sampler(byte_tokenizer: Path) -> Sampler:
    """A sampler over the byte vocabulary."""
    return Sampler(VOCAB, (EOS,), GrammarMasks(byte_tokenizer, VOCAB, (EOS,), most_replays=2))


def row(sampling: SamplingParams, prompt: list[int], output: list[int], name: str = "s") -> StepRow:
    """A row whose next token is sampled after `prompt` and `output`."""
    ids = prompt + output
    return StepRow(name, ids, len(prompt), len(ids) - 1, 1, [0], sampling)


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    """Random logits."""
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def greedy(**changes: Any) -> SamplingParams:
    """Greedy parameters with some changes."""
    return SamplingParams(seed=0, **{"temperature": 0, **changes})


def one(sampler: Sampler, values: torch.Tensor, sampled: StepRow) -> SampledToken:
    """Sample one row that must not fail."""
    tokens, failed = sampler.sample(values, [sampled])
    assert not failed
    return tokens[0]


def test_temperature_zero_takes_the_first_of_the_largest(sampler: Sampler) -> None:
    """Greedy rows take the largest logit, the lowest id of equal ones, whatever seed and top_k say."""
    values = torch.zeros(1, VOCAB)
    values[0, [40, 90]] = 3.0
    assert one(sampler, values, row(greedy(top_k=50), [1], [])).token_id == 40


def test_sampled_rows_use_seed_choice_and_output_index(sampler: Sampler) -> None:
    """The token is the plain definition's under the number of (seed, choice, output index)."""
    values = logits(1)
    for output in ([], [5], [5, 6, 7]):
        sampling = SamplingParams(seed=99, choice=2, temperature=0.8, top_p=0.9, top_k=40)
        uniform = float(uniforms([99], [2], [len(output)])[0])
        expected = plain_draw(values[0].tolist(), 0.8, (40, 0.9, 0.0), uniform)
        assert one(sampler, values, row(sampling, [1, 2], output)).token_id == expected


def test_penalties_and_bias_follow_their_formulas(sampler: Sampler) -> None:
    """Repetition over prompt and output, presence and frequency over the output, then the bias."""
    values = logits(2)
    prompt, output = [3, 4, 4], [4, 5, 5, 5]
    sampling = greedy(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={5: 2.5, 7: 9.0, 4000: 50.0}
    )
    plain = values[0].tolist()
    for token in {*prompt, *output}:
        plain[token] = plain[token] / 1.3 if plain[token] > 0 else plain[token] * 1.3
    for token in set(output):
        plain[token] -= 0.5 + 0.25 * output.count(token)
    plain[5] += 2.5
    plain[7] += 9.0
    uniform = float(uniforms([0], [0], [len(output)])[0])
    warm = sampling.model_copy(update={"temperature": 1.5})
    assert one(sampler, values, row(sampling, prompt, output)).token_id == plain.index(max(plain))
    assert one(sampler, values, row(warm, prompt, output)).token_id == plain_draw(plain, 1.5, (0, 1.0, 0.0), uniform)


def test_edits_do_not_touch_the_logits_or_other_rows(sampler: Sampler) -> None:
    """A row with every edit leaves its neighbour's token, and the logits themselves, as they were."""
    values = logits(3, rows=2)
    before = values.clone()
    neighbour = row(SamplingParams(seed=5), [1], [2], "b")
    alone = one(sampler, values[1:], neighbour)
    edited = greedy(repetition_penalty=2, logit_bias={1: 100}, min_tokens=5, grammar=Grammar(text=DIGITS))
    tokens, failed = sampler.sample(values, [row(edited, [1], []), neighbour])
    assert not failed
    assert tokens[1] == alone
    assert torch.equal(values, before)


@pytest.mark.parametrize(("outputs", "ignore_eos", "banned"), [(0, False, True), (3, False, False), (0, True, False)])
def test_min_tokens_bans_the_end(sampler: Sampler, outputs: int, ignore_eos: bool, banned: bool) -> None:
    """Until min_tokens the end token cannot be chosen, unless it would not end the sequence anyway."""
    values = logits(4)
    values[0, EOS] = 50
    sampling = greedy(min_tokens=3, ignore_eos=ignore_eos)
    assert (one(sampler, values, row(sampling, [1], [9] * outputs)).token_id != EOS) == banned


def test_min_tokens_bans_stop_ids_too(sampler: Sampler) -> None:
    """Stop ids are banned like the end token."""
    values = logits(5)
    values[0, 77] = 50
    assert one(sampler, values, row(greedy(min_tokens=1, stop_token_ids=(77, 5000)), [1], [])).token_id != 77


def test_logprobs_are_the_models_own(sampler: Sampler) -> None:
    """They come from the raw logits, before temperature, penalties and bias; most likely first."""
    values = logits(6, rows=3)
    rows = [
        row(SamplingParams(seed=1, temperature=2, presence_penalty=1, logit_bias={3: 90}, logprobs=2), [1], [2], "a"),
        row(SamplingParams(seed=1), [1], [2], "b"),
        row(SamplingParams(seed=1, logprobs=0), [1], [2], "c"),
    ]
    tokens, _ = sampler.sample(values, rows)
    expected = values.log_softmax(-1)
    assert tokens[0].token_id == 3
    assert tokens[0].logprobs is not None
    assert math.isclose(tokens[0].logprobs.logprob, expected[0, 3].item(), abs_tol=1e-5)
    assert tokens[0].logprobs.top_ids == expected[0].topk(2).indices.tolist()
    assert tokens[0].logprobs.top_logprobs == tuple(expected[0].topk(2).values.tolist())
    assert tokens[1].logprobs is None
    assert tokens[2].logprobs is not None
    assert tokens[2].logprobs.top_ids == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_logits_that_are_not_finite_fail_alone(sampler: Sampler, bad: float) -> None:
    """One such logit fails its row by name; the other rows' tokens are those they have alone."""
    values = logits(7, rows=3)
    rows = [row(SamplingParams(seed=i, top_p=0.9, logprobs=1), [1], [], str(i)) for i in range(3)]
    good = [one(sampler, values[i : i + 1], rows[i]) for i in (0, 2)]
    values[1, 100] = bad
    tokens, failed = sampler.sample(values, rows)
    assert failed == {1: "the model's logits are not finite"}
    assert [tokens[0].token_id, tokens[2].token_id] == [token.token_id for token in good]


def generate(sampler: Sampler, sampling: SamplingParams, name: str, count: int) -> list[int]:
    """Sample up to `count` tokens one after the other from fixed logits, as a worker would."""
    output: list[int] = []
    while len(output) < count and output[-1:] != [EOS]:
        output.append(one(sampler, logits(len(output)), row(sampling, [1], output, name)).token_id)
    return output


def test_a_grammar_holds_the_output(sampler: Sampler) -> None:
    """The output matches the grammar and ends where it ends."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    text = LLMatcher.grammar_from_json_schema(schema)
    output = generate(sampler, SamplingParams(seed=3, temperature=0.2, grammar=Grammar(text=text)), "json", 60)
    assert output[-1] == EOS
    assert isinstance(json.loads(bytes(output[:-1]))["n"], int)


def test_a_grammars_state_is_a_replay_of_the_output_ids(sampler: Sampler, byte_tokenizer: Path) -> None:
    """A fresh sampler, a changed history and sequences that push each other out of the cache change no token."""
    sampling = greedy(grammar=Grammar(text=DIGITS))
    whole = generate(sampler, sampling, "x", 10)
    assert whole[-1] == EOS
    assert bytes(whole[:-1]).isdigit()
    for index in range(len(whole)):
        fresh = Sampler(VOCAB, (EOS,), GrammarMasks(byte_tokenizer, VOCAB, (EOS,), most_replays=2))
        for each in (sampler, fresh):
            sampled = row(sampling, [1], whole[:index], "x")
            assert one(each, logits(index), sampled).token_id == whole[index]
        for other in ("y", "z", "w"):
            one(sampler, logits(9), row(sampling, [1], [ord("7")], other))


def test_another_grammar_under_the_same_name_is_another_grammar(sampler: Sampler) -> None:
    """A replay is used only for the grammar it was made for."""
    letters = LLMatcher.grammar_from_regex("[a-z]{3}")
    one(sampler, logits(1), row(greedy(grammar=Grammar(text=DIGITS)), [1], [], "same"))
    token = one(sampler, logits(1), row(greedy(grammar=Grammar(text=letters)), [1], [], "same")).token_id
    assert chr(token).islower()


def test_output_that_the_grammar_does_not_allow_fails_alone(sampler: Sampler) -> None:
    """A row whose ids left the grammar fails with a reason; its neighbour does not."""
    sampling = greedy(grammar=Grammar(text=DIGITS))
    rows = [row(sampling, [1], [ord("x")], "bad"), row(sampling, [1], [ord("5")], "good")]
    tokens, failed = sampler.sample(logits(1, rows=2), rows)
    assert list(failed) == [0]
    assert "no way on" in failed[0]
    assert chr(tokens[1].token_id).isdigit()


def test_a_grammar_that_must_end_under_min_tokens_fails(sampler: Sampler) -> None:
    """If the grammar allows only the end and min_tokens bans it, no token is left, and that is said."""
    sampling = greedy(grammar=Grammar(text=DIGITS), min_tokens=9)
    _, failed = sampler.sample(logits(1), [row(sampling, [1], [ord("1")] * 3)])
    assert failed == {0: "the grammar and min_tokens together allow no token"}


def test_grammars_are_checked_before_use(sampler: Sampler) -> None:
    """A good grammar has no fault, a bad one is told in words."""
    assert sampler.check_grammar(DIGITS) is None
    assert sampler.check_grammar("not a grammar (")


def test_a_folder_without_tokenizer_cannot_constrain(tmp_path: Path) -> None:
    """A model without a usable tokenizer refuses grammars by name instead of failing in a step."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    fault = GrammarMasks(tmp_path, VOCAB, (EOS,), most_replays=1).check(DIGITS)
    assert fault is not None
    assert "cannot be used for grammars" in fault
