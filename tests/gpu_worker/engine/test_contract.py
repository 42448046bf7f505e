"""What every engine behind a worker must do, and what it must do if it says that it can."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mell_gpu_worker.engine.base import Engine, EngineError, PacedEngine
from mell_gpu_worker.engine.factory import make_engine as build_engine
from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.messages.sampling import Grammar, SamplingParams
from mell_shared.models import FAKE_EOS_ID, FAKE_MODEL
from tests.vllm_process import VllmProcess
from tests.vllm_server import FakeVllm

from .families import FAMILIES, make_config, save_model
from .looks import Looks, job

TOKENS = 12
END_OF_BYTES = 257
"""The end token of `byte_tokenizer`."""
PROMPT = list(b"The quick brown fox jumps over the lazy dog.")
GREEDY = SamplingParams(temperature=0, seed=0, ignore_eos=True)
RANDOM = SamplingParams(temperature=1.0, seed=7, ignore_eos=True)
OBJECT = '{"grammars": [{"json_schema": {"type": "object", "properties": {}, "additionalProperties": false}}]}'


@dataclass
class Subject:
    """An engine under test, and what its model knows."""

    engine: Engine
    end_id: int
    decode: Callable[[list[int]], str]
    """By its model's tokenizer."""

    def looks(self) -> Looks:
        """Return a new run on it."""
        return Looks(self.engine)


def _fake() -> Iterator[Subject]:
    options = EngineOptions(engine="fake", model=FAKE_MODEL, model_dir=Path(), kv_blocks=96, block_tokens=4)
    yield Subject(build_engine(options), FAKE_EOS_ID, lambda ids: bytes(ids).decode())


@pytest.fixture(scope="session")
def tiny_speaker(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> Path:
    """Return the folder of a tiny random model that has a tokenizer, of bytes, and an end token."""
    folder = tmp_path_factory.mktemp("tiny_speaker")
    save_model(make_config(**{**FAMILIES["llama"], "vocab_size": 259, "eos_token_id": END_OF_BYTES}), folder)
    shutil.copytree(byte_tokenizer, folder, dirs_exist_ok=True)
    return folder


def _torch(folder: Path) -> Iterator[Subject]:
    options = EngineOptions(
        engine="torch", model=str(folder), model_dir=Path(), kv_blocks=96, block_tokens=4, threads=1, compile="off"
    )
    yield Subject(build_engine(options), END_OF_BYTES, Tokenizer.from_file(str(folder / "tokenizer.json")).decode)


def _vllm() -> Iterator[Subject]:
    with FakeVllm() as server:
        options = EngineOptions(engine="vllm", model=FAKE_MODEL, model_dir=Path(), vllm_url=server.url, block_tokens=0)
        yield Subject(build_engine(options), FAKE_EOS_ID, lambda ids: bytes(ids).decode())


def _real_vllm(server: VllmProcess) -> Iterator[Subject]:
    tokenizer = Tokenizer.from_file(str(server.folder / "tokenizer.json"))
    options = EngineOptions(
        engine="vllm", model=str(server.folder), model_dir=Path(), vllm_url=server.url, block_tokens=0
    )
    yield Subject(build_engine(options), 2, tokenizer.decode)


@pytest.fixture(params=["fake", "torch", "vllm", pytest.param("real-vllm", marks=pytest.mark.vllm)])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """Each engine in turn, `vllm` before a server of ours that speaks as one of theirs, `real-vllm` before theirs."""
    made: Iterator[Subject]
    if request.param == "torch":
        made = _torch(request.getfixturevalue("tiny_speaker"))
    elif request.param == "real-vllm":
        made = _real_vllm(request.getfixturevalue("real_vllm"))
    else:
        made = {"fake": _fake, "vllm": _vllm}[request.param]()
    subject = next(made)
    yield subject
    subject.engine.close()
    subject.engine.close()  # is safe to repeat
    next(made, None)


def output(
    subject: Subject, sampling: SamplingParams, count: int = TOKENS, given: list[int] | None = None
) -> list[int]:
    """What a sequence alone makes, after `given`."""
    each = job(PROMPT, sampling, given)
    subject.looks().run({"s": each}, count)
    assert not each.failure, each.failure
    return each.output


def test_it_says_what_it_is(subject: Subject) -> None:
    """Modes that show memory only where memory is shown; a pace of its own only with the port for that.

    By KV also where engines fetch it from one another, and say where.
    """
    spec = subject.engine.spec
    assert spec.kv_blocks * spec.block_tokens >= len(PROMPT) + TOKENS
    assert "tokens" in spec.migration_modes
    assert isinstance(subject.engine, PacedEngine) == spec.can.own_pace == (spec.can.blocks == "estimated")
    assert bool(spec.kv_source) == ("kv" in spec.migration_modes and spec.can.kv == "fetched")
    if "kv" in spec.migration_modes and spec.can.kv == "sent":
        assert spec.can.blocks == "known"
        assert memoryview(subject.engine.kv_block(1)).nbytes == spec.block_bytes
    else:
        assert "hybrid" not in spec.migration_modes
        with pytest.raises(EngineError, match="vLLM"):
            subject.engine.kv_block(0)


def test_greedy_output_is_the_same_alone_and_beside_others(subject: Subject) -> None:
    """Each row gets its own sequence's tokens, whatever else runs, in whatever order."""
    alone = output(subject, GREEDY)
    assert len(alone) == TOKENS
    assert all(0 <= token < subject.engine.spec.vocab_size for token in alone)
    subject_jobs = {f"s{number}": job(PROMPT[number:], GREEDY) for number in range(5)}
    subject.looks().run(subject_jobs, TOKENS)
    assert subject_jobs["s0"].output == alone
    assert len({tuple(each.output) for each in subject_jobs.values()}) > 1


def test_a_sequence_goes_on_from_its_ids_alone(subject: Subject) -> None:
    """As one that moved here, or came back after a crash: nothing but prompt and output so far is needed."""
    whole = output(subject, GREEDY)
    assert output(subject, GREEDY, TOKENS - 5, whole[:5]) == whole


def test_who_sits_out_goes_on_where_it_was(subject: Subject) -> None:
    """A sequence that is in no row for a while misses nothing, gets nothing twice, and the others do not wait."""
    whole, looks = output(subject, GREEDY), subject.looks()
    one, other = job(PROMPT, GREEDY), job(PROMPT[3:], GREEDY)
    looks.run({"one": one, "other": other}, 3)
    looks.run({"other": other}, 8)
    one.computed, one.table = 0, []  # its blocks went to others
    looks.run({"one": one}, TOKENS)
    assert one.output == whole


def test_prompts_come_in_chunks_where_that_is_said(subject: Subject) -> None:
    """A chunk that does not reach the end samples nothing; the output is that of the whole prompt.

    Where chunks are not said to be taken, they come for sequences that may move here: they cost and give nothing.
    """
    each = job(PROMPT, GREEDY)
    subject.looks().run({"s": each}, TOKENS, chunk=7)
    assert each.output == output(subject, GREEDY)


def test_seeds_decide_where_that_is_said(subject: Subject) -> None:
    """Equal seeds, equal tokens, also in a sequence that goes on elsewhere; another seed, another text."""
    if not subject.engine.spec.can.seeded_sameness:
        assert len(output(subject, RANDOM)) == TOKENS
        return
    whole = output(subject, RANDOM)
    assert output(subject, RANDOM) == whole
    assert output(subject, RANDOM, TOKENS - 5, whole[:5]) == whole
    assert output(subject, RANDOM.model_copy(update={"seed": 8})) != whole
    assert output(subject, RANDOM.model_copy(update={"choice": 1})) != whole


@pytest.mark.parametrize("count", [0, 3])
def test_log_probabilities_come_where_that_is_said(subject: Subject, count: int) -> None:
    """One for each token; with `count` alternatives, likeliest first, the chosen token's among them if it is one."""
    assert subject.engine.spec.can.logprobs
    each = job(PROMPT, GREEDY.model_copy(update={"logprobs": count}))
    subject.looks().run({"s": each}, TOKENS)
    for token in each.sampled:
        assert token.logprobs is not None
        assert token.logprobs.logprob <= 0
        assert len(token.logprobs.top_ids) == len(token.logprobs.top_logprobs) == count
        assert list(token.logprobs.top_logprobs) == sorted(token.logprobs.top_logprobs, reverse=True)
        if count:
            assert token.logprobs.top_ids[0] == token.token_id, "greedy takes the likeliest"
    plain = job(PROMPT, GREEDY)
    subject.looks().run({"s": plain}, 1)
    assert plain.sampled[0].logprobs is None


def test_a_bias_decides(subject: Subject) -> None:
    """A token that is forced comes, also after output from before."""
    forced = GREEDY.model_copy(update={"logit_bias": {77: 100.0}})
    assert output(subject, forced, 3) == [77, 77, 77]
    assert output(subject, forced, 2, [70, 71]) == [70, 71, 77, 77]


def test_no_end_token_before_min_tokens(subject: Subject) -> None:
    """`min_tokens` counts output from before, too; then the end token comes, and the engine may say so."""
    end_id = subject.end_id
    eager = SamplingParams(temperature=0, seed=0, min_tokens=4, logit_bias={end_id: 100.0})
    for given in ([], [70, 71]):
        each = job(PROMPT, eager, given)
        subject.looks().run({"s": each}, 5 - len(given))
        assert (each.output.index(end_id), each.end in (None, "stop")) == (4, True)


def test_an_output_limit_is_not_overrun(subject: Subject) -> None:
    """An engine that counts itself counts as its core does, output from before included."""
    each = job(PROMPT, GREEDY.model_copy(update={"max_tokens": 6}), [70, 71])
    subject.looks().run({"s": each}, 4)
    assert (len(each.output), each.end in (None, "length")) == (6, True)


def test_grammars_are_obeyed_as_far_as_that_is_said(subject: Subject) -> None:
    """From the first token on by all that know any; in the midst of an output only where that is said."""
    ruled = GREEDY.model_copy(update={"grammar": Grammar(text=OBJECT), "ignore_eos": False})
    assert subject.engine.check_grammar(OBJECT) is None
    each = job(PROMPT, ruled)
    subject.looks().run({"s": each}, 3)
    text = subject.decode([token for token in each.output if token != subject.end_id])
    # A model may take its time with space between the two.
    assert text.replace(" ", "").replace("\n", "") in ("{", "{}")
    assert subject.engine.spec.can.fault(ruled, 0) is None
    if subject.engine.spec.can.grammars == "anywhere":
        assert subject.engine.spec.can.fault(ruled, 1) is None
        assert subject.decode(output(subject, ruled, 1, list(b"{"))) == "{}"
    else:
        assert "anew" in str(subject.engine.spec.can.fault(ruled, 1))
