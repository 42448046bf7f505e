"""An engine without a model: deterministic text from what its KV pool holds, at the speed of a latency model.

Each position of a block holds a digest of its token chained over the digest before it, *as read from the pool through
the block table*. A token is drawn from (seed, choice, output index, the newest digest, and digests of older blocks, in
turn). A missing tail, a wrong block, a stale copy: each changes the text, which `expected_output` knows.
"""

import math
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mell_gpu_worker.core.step import SampledToken, StepResult, StepRow
from mell_gpu_worker.engine.base import EngineError, EngineSpec
from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import SamplingParams
from mell_shared.models import FAKE_EOS_ID, FAKE_MODEL, FAKE_VOCAB_SIZE

if TYPE_CHECKING:
    from mell_gpu_worker.engine.fake_grammar import ByteGrammars

DEFAULT_KV_BLOCKS = 4096
DEFAULT_MODEL_LEN = 8192
ALPHABET = b"abcdefghijklmnopqrstuvwxyz" + b"aeiounrst" + b" " * 12 + b"ABCDEFGHIJK" + b".,;!?-"
"""What text is made of; 64 letters, so that six bits pick one."""
_LETTERS = tuple(sorted(set(ALPHABET)))

_WORD_BYTES = 8
_MASK = 2**64 - 1
_CHAIN = 0x9E3779B97F4A7C15
_DRAW = 0xD1342543DE82EF95
_EMPTY = 0x243F6A8885A308D3
"""The digest before the first token."""
_EOS_ONE_IN = 512
_PROBE_TOKENS = 16
"""Older digests are read one from each stretch of this length in turn, so that each block is soon looked at."""
_FORCED, _BANNED = 50.0, -50.0
"""A bias from here on decides alone."""


class FakeEngine:
    """The `fake` engine; see the module."""

    def __init__(self, options: EngineOptions) -> None:
        if options.model != FAKE_MODEL:
            raise EngineError(f"the fake engine serves the model {FAKE_MODEL!r}, not {options.model!r}; set --model")
        if options.device not in ("auto", "cpu"):
            raise EngineError(f"the fake engine runs on the CPU, not on {options.device!r}; set --device cpu")
        self._options = options
        kv_blocks = options.kv_blocks or DEFAULT_KV_BLOCKS
        self._words = options.fake_kv_bytes_per_token // _WORD_BYTES
        self._pool = array("Q", bytes(_WORD_BYTES * self._words * kv_blocks * options.block_tokens))
        self._grammars: ByteGrammars | None = None
        self._spec = EngineSpec(
            name="fake",
            device="cpu",
            kv_layout=f"fake-1-{options.block_tokens}-{self._words}",
            max_model_len=options.max_model_len or DEFAULT_MODEL_LEN,
            vocab_size=FAKE_VOCAB_SIZE,
            eos_token_ids=(FAKE_EOS_ID,),
            kv_blocks=kv_blocks,
            block_tokens=options.block_tokens,
            block_bytes=_WORD_BYTES * self._words * options.block_tokens,
            instant=not (options.fake_step_us or options.fake_sequence_us or options.fake_prefill_token_us),
            migration_modes=("kv", "tokens", "hybrid"),
        )

    @property
    def spec(self) -> EngineSpec:
        """What this engine is."""
        return self._spec

    @property
    def pool(self) -> "array[int]":
        """The digests, `block_tokens` for each block, each in the first word of its token's."""
        return self._pool

    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Run one step; takes as long as the latency model says."""
        sampled: list[SampledToken | None] = []
        failed: dict[int, str] = {}
        for row in rows:
            outcome = self._run(row)
            if isinstance(outcome, str):
                failed[len(sampled)] = outcome
                outcome = None
            sampled.append(outcome)
        step_us = self.step_us(rows)
        if step_us:
            time.sleep(step_us / 1e6)
        return StepResult(tuple(sampled), step_us, failed)

    def step_us(self, rows: Sequence[StepRow]) -> int:
        """Return the time that the latency model gives a step."""
        options = self._options
        prefill_tokens = sum(row.count for row in rows if row.count > 1)
        fixed = options.fake_step_us + options.fake_sequence_us * len(rows)
        return fixed + options.fake_prefill_token_us * prefill_tokens

    def check_grammar(self, text: str) -> str | None:
        """Return why the grammar cannot be used, or None."""
        return self._byte_grammars().fault(text)

    def kv_block(self, index: int) -> memoryview:
        """Return the memory of one block."""
        size = self._spec.block_bytes
        return memoryview(self._pool).cast("B")[index * size : (index + 1) * size]

    def scratch(self, size_bytes: int) -> Any:
        """Return new memory to measure with."""
        return memoryview(bytearray(size_bytes))

    def close(self) -> None:
        """Free the pool; safe to repeat."""
        self._pool = array("Q")

    def _run(self, row: StepRow) -> SampledToken | str | None:
        """Return the row's token, None if it samples none, or why it cannot go on."""
        digest = self._write(row)
        sampling = row.sampling
        if sampling is None:
            return None
        last = row.start + row.count - 1
        index = last + 1 - row.prompt_tokens
        value = _value(sampling, index, digest, self._older(row.block_table, index, last))
        if sampling.grammar is None:
            return _sampled(sampling, _token(sampling, index, value), value)
        chosen = self._byte_grammars().choose(sampling.grammar.text, row.token_ids[row.prompt_tokens :], value)
        return chosen if isinstance(chosen, str) else _sampled(sampling, chosen, value)

    def _byte_grammars(self) -> "ByteGrammars":
        # Two threads may both build it at first; either one serves.
        if self._grammars is None:
            from mell_gpu_worker.engine.fake_grammar import ByteGrammars  # noqa: PLC0415 (most workers need none)

            self._grammars = ByteGrammars()
        return self._grammars

    def _write(self, row: StepRow) -> int:
        """Write the digests of a row's tokens; returns the last one."""
        pool, size, table, words = self._pool, self._spec.block_tokens, row.block_table, self._words
        position = row.start
        before = position - 1
        digest = pool[(table[before // size] * size + before % size) * words] if position else _EMPTY
        for token in row.token_ids[position : position + row.count]:
            digest = ((digest + token + 1) * _CHAIN) & _MASK
            digest ^= digest >> 32
            pool[(table[position // size] * size + position % size) * words] = digest
            position += 1
        return digest

    def _older(self, table: Sequence[int], index: int, last: int) -> int:
        """Return what output `index` depends on besides the newest digest; see `_probed`."""
        stretches = last // _PROBE_TOKENS
        if not stretches:
            return 0
        pool, size, words = self._pool, self._spec.block_tokens, self._words
        first, second = _probed(index, stretches)
        older = pool[(table[first // size] * size + first % size) * words]
        return older + 3 * pool[(table[second // size] * size + second % size) * words]


def expected_output(prompt_ids: Sequence[int], sampling: SamplingParams, count: int) -> list[int]:
    """Return the first `count` output tokens for a prompt, fewer if the end token comes: what no fault may change."""
    digests: list[int] = []
    output: list[int] = []
    for token in prompt_ids:
        digests.append(_chained(digests, token))
    assert sampling.grammar is None, "what a grammar makes of it is not known here"
    while len(output) < count and (not output or output[-1] != FAKE_EOS_ID):
        stretches = (len(digests) - 1) // _PROBE_TOKENS
        first, second = _probed(len(output), stretches) if stretches else (0, 0)
        older = digests[first] + 3 * digests[second] if stretches else 0
        output.append(_token(sampling, len(output), _value(sampling, len(output), digests[-1], older)))
        digests.append(_chained(digests, output[-1]))
    return output


def _chained(digests: Sequence[int], token: int) -> int:
    digest = (((digests[-1] if digests else _EMPTY) + token + 1) * _CHAIN) & _MASK
    return digest ^ (digest >> 32)


def _probed(index: int, stretches: int) -> tuple[int, int]:
    """Two positions in as many of the first `stretches` stretches: the next ones in turn at each output index."""
    first, offset = 2 * index, index * 5 % _PROBE_TOKENS
    return first % stretches * _PROBE_TOKENS + offset, (first + 1) % stretches * _PROBE_TOKENS + offset


def _value(sampling: SamplingParams, index: int, digest: int, older: int) -> int:
    """Return the 64 random bits that output `index` is drawn with."""
    value = digest + index
    if sampling.temperature > 0:  # greedy output depends on no seed, as with any model
        value += sampling.seed * _CHAIN + (sampling.choice << 32)
    value = ((value ^ older) * _DRAW) & _MASK
    value = ((value ^ (value >> 31)) * _DRAW) & _MASK
    return value ^ (value >> 31)


def _sampled(sampling: SamplingParams, token: int, value: int) -> SampledToken:
    return SampledToken(token, None if sampling.logprobs is None else _logprobs(token, value, sampling.logprobs))


def _token(sampling: SamplingParams, index: int, value: int) -> int:
    ends = index >= sampling.min_tokens and not sampling.ignore_eos
    if sampling.logit_bias:
        return _biased_token(sampling.logit_bias, value, ends=ends)
    if ends and (value >> 20) % _EOS_ONE_IN == 0:
        return FAKE_EOS_ID
    return ALPHABET[value & 63]


def _biased_token(bias: dict[int, float], value: int, *, ends: bool) -> int:
    forced = max(
        (item for item in bias.items() if ends or item[0] != FAKE_EOS_ID), key=lambda item: item[1], default=None
    )
    if forced is not None and forced[1] >= _FORCED:
        return forced[0]
    if ends and bias.get(FAKE_EOS_ID, 0.0) > _BANNED and (value >> 20) % _EOS_ONE_IN == 0:
        return FAKE_EOS_ID
    letters = (ALPHABET[(value + step) & 63] for step in range(64))
    return next((token for token in letters if bias.get(token, 0.0) > _BANNED), ALPHABET[value & 63])


def _logprobs(token: int, value: int, alternatives: int) -> TokenLogprobs:
    """Half to all of the probability for the chosen token, halves of what is left for the others in turn."""
    chosen = 0.5 + (value >> 12) % 1000 / 2002
    first = (value >> 32) % len(_LETTERS)
    others = [letter for letter in _LETTERS[first:] + _LETTERS[:first] if letter != token]
    ids = [token, *others][:alternatives]
    shares = [chosen, *((1 - chosen) / 2**rank for rank in range(1, len(ids)))]
    return TokenLogprobs(
        logprob=math.log(chosen),
        top_ids=ids,
        top_logprobs=tuple(math.log(share) for share in shares[: len(ids)]),
    )
