from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.base import Engine
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.transport.regions import region_of
from mell_shared.models import FAKE_MODEL
from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.driver import GREEDY

PROMPT = [(7 * position) % 150 + 1 for position in range(22)]
TABLE, ELSEWHERE = [3, 9, 1, 0, 12, 4, 8, 2], [11, 2, 30, 7, 5, 21, 6, 1]
MakeAny = Callable[[], Engine]


@pytest.fixture(params=["fake", "fake, wide", "torch"])
def make_any(
    request: pytest.FixtureRequest, tiny_models: Callable[[str], tuple[Path, Any]], make_engine: MakeEngine
) -> MakeAny:
    """Make engines of one kind with equal pools."""

    def fake() -> Engine:
        width = 64 if "wide" in request.param else 8
        return FakeEngine(
            EngineOptions(
                engine="fake",
                model=FAKE_MODEL,
                model_dir=Path(),
                kv_blocks=32,
                block_tokens=4,
                fake_kv_bytes_per_token=width,
            )
        )

    return (lambda: make_engine(tiny_models("llama")[0], kv_blocks=32)) if request.param == "torch" else fake


def go_on(engine: Engine, ids: list[int], table: list[int], count: int) -> list[int]:
    """Compute what has no KV yet, and decode; returns all ids. KV of all tokens but the last is there after."""
    start = 0 if len(ids) == len(PROMPT) else len(ids) - 1
    for _ in range(count):
        row = StepRow("s", ids, len(PROMPT), start, len(ids) - start, table, GREEDY)
        (sampled,) = engine.execute([row]).sampled
        assert sampled is not None
        start, ids = len(ids), [*ids, sampled.token_id]
    return ids


def test_kv_copied_into_other_blocks_of_another_engine_is_as_good(make_any: MakeAny) -> None:
    """A sequence goes on from copied blocks, whole ones and a begun one, as it would have where it was."""
    source, target = make_any(), make_any()
    ids = go_on(source, PROMPT, TABLE, 4)
    for here, there in zip(TABLE, ELSEWHERE, strict=True):
        region_of(target.kv_block(there), writable=True).raw[:] = region_of(source.kv_block(here), writable=False).raw
    assert go_on(target, ids, ELSEWHERE, 6) == go_on(source, ids, TABLE, 6)


def test_a_block_that_was_not_copied_is_missed(make_any: MakeAny) -> None:
    """The text, or its likelihood, depends on every block: else the test above would show nothing."""
    source, target = make_any(), make_any()
    ids = go_on(source, PROMPT, TABLE, 4)
    for here, there in zip(TABLE[1:], ELSEWHERE[1:], strict=True):
        region_of(target.kv_block(there), writable=True).raw[:] = region_of(source.kv_block(here), writable=False).raw
    assert go_on(target, ids, ELSEWHERE, 6) != go_on(source, ids, TABLE, 6)


def test_blocks_show_the_pool_itself(make_any: MakeAny) -> None:
    """Each block is `block_bytes` of writable memory of its own, and what is written there stays."""
    engine = make_any()
    spec = engine.spec
    assert "kv" in spec.migration_modes
    assert spec.block_bytes == spec.kv_bytes_per_token * spec.block_tokens
    first, last = (region_of(engine.kv_block(index), writable=True) for index in (0, spec.kv_blocks - 1))
    assert first.nbytes == last.nbytes == spec.block_bytes
    last.raw[:] = bytes([7]) * spec.block_bytes
    again = region_of(engine.kv_block(spec.kv_blocks - 1), writable=False)
    assert bytes(again.raw) == bytes([7]) * spec.block_bytes
    assert not any(bytes(first.raw))


def test_scratch_memory_is_the_callers_own(make_any: MakeAny) -> None:
    """It has the size asked for, can be written, and is not the pool."""
    engine = make_any()
    scratch = region_of(engine.scratch(1000), writable=True)
    assert scratch.nbytes == 1000
    scratch.raw[:] = bytes([9]) * 1000
    assert not any(bytes(region_of(engine.kv_block(0), writable=False).raw))
