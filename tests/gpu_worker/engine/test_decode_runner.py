"""Recorded decode steps on a CPU: what records and replays PyTorch's operations stands for a CUDA graph."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.fx.experimental.proxy_tensor import make_fx

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine import cuda_graphs
from mell_gpu_worker.engine.attention import KindRecorder
from mell_gpu_worker.engine.cuda_graphs import GraphsUnavailableError, graphed_runner
from mell_gpu_worker.engine.decode_runner import Compute, DecodeLimits, DecodeRunner
from mell_gpu_worker.engine.decode_step import DecodeInputs
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.reference_attention import ReferenceAttention
from mell_gpu_worker.engine.runner import Runner
from mell_gpu_worker.engine.self_check import ModelCheck
from tests.gpu_worker.engine.compared import Compared, plain_runner
from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.driver import Driver, some_jobs
from tests.gpu_worker.engine.families import VOCAB

TinyModels = Callable[[str], tuple[Path, Any]]


class Recorder:
    """Records the operations on tensors, once; a replay runs just these, on the same tensors, as a CUDA graph does.

    Looking at a value while recording is an error, there as here. `replays` counts.
    """

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def record(self, compute: Compute) -> Compute:
        """Record; see `decode_runner.Record`."""
        with torch.inference_mode(mode=False), torch.no_grad(), pytest.MonkeyPatch.context() as patched:
            # transformers does so itself while a CUDA stream is captured.
            patched.setattr(transformers.masking_utils, "is_tracing", lambda *_: True)
            graph = make_fx(compute)()
        out = graph().clone()
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replays += 1
            return out.copy_(graph())

        return replay


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_recorded_steps_give_the_logits_of_plain_ones(
    family: str, tiny_models: TinyModels, make_engine: MakeEngine
) -> None:
    """Tables that grow, rows that come and leave, preemption, padding: freed blocks are NaN, and none shows."""
    engine = make_engine(tiny_models(family)[0], kv_blocks=200)
    plain = plain_runner(engine)
    recorder = Recorder()
    recorded = DecodeRunner(plain._model, engine.pool, plain._backend, recorder.record, DecodeLimits(rows=5, tokens=64))
    compared = Compared(plain, recorded)
    engine._open().runner = compared
    jobs = some_jobs(3)
    driver = Driver(engine, seed=6, most_chunk=60)
    driver.run(jobs)
    assert driver.preemptions
    assert recorder.recorded == 4
    assert 20 < recorder.replays < len(compared.decodes), "all decodes were recorded ones, or hardly any"
    assert 3 in compared.decodes, "no step was padded"
    assert not engine.pool.data[engine.pool.zero_block].any()


def in_place(compute: Compute) -> Compute:
    """Record nothing, but give all results in one place, as a recording does."""
    out = compute().clone()
    return lambda: out.copy_(compute())


def decode(name: str, tokens: int, blocks: list[int]) -> StepRow:
    """A row that computes its last token."""
    ids = [(7 * place + len(name)) % VOCAB for place in range(tokens)]
    return StepRow(name, ids, 1, tokens - 1, 1, blocks, None)


@pytest.fixture
def prefilled(tiny_models: TinyModels, make_engine: MakeEngine) -> tuple[Runner, KvPool, list[StepRow]]:
    """A runner, and rows whose contexts are in its pool."""
    engine = make_engine(tiny_models("llama")[0], kv_blocks=20)
    rows = [decode("a", 9, [3, 1, 7]), decode("bb", 4, [2]), decode("ccc", 14, [9, 8, 5, 4])]
    runner = plain_runner(engine)
    with torch.inference_mode():
        runner.run([StepRow(r.sequence, r.token_ids, 1, 0, r.start, r.block_table, None) for r in rows], [])
    return runner, engine.pool, rows


def recorded(runner: Runner, pool: KvPool, rows: int, tokens: int = 16) -> DecodeRunner:
    """Return a runner over the same model and pool that records."""
    return DecodeRunner(runner._model, pool, runner._backend, in_place, DecodeLimits(rows, tokens))


@torch.inference_mode()
def test_nothing_of_a_step_is_left_in_the_next(prefilled: tuple[Runner, KvPool, list[StepRow]]) -> None:
    """A step's logits are bit for bit those of a new runner; what a step returned stays as it was."""
    runner, pool, rows = prefilled
    used, every = recorded(runner, pool, 4), [0, 1, 2]
    first = used.run(rows, every)
    kept = first.clone()
    for batch in (rows[2:], rows[:1], rows[::-1], [rows[1]], rows):
        own = list(range(len(batch)))
        assert torch.equal(used.run(batch, own), recorded(runner, pool, 4).run(batch, own))
        assert torch.equal(first, kept)
    assert torch.equal(used.run(rows, [2, 0]), first[[2, 0]])
    assert used.run(rows, []).shape == (0, VOCAB)


@torch.inference_mode()
def test_steps_that_were_not_recorded_for_run_as_they_come(
    prefilled: tuple[Runner, KvPool, list[StepRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, more rows and longer rows than were recorded for; at the limits recordings serve."""
    runner, pool, rows = prefilled
    ran: list[int] = []
    monkeypatch.setattr(Runner, "run", lambda _self, rows, _kept: ran.append(len(rows)))
    small = recorded(runner, pool, 2)
    chunk = StepRow("d", [1, 2, 3], 3, 0, 2, [11], None)
    for batch in (rows, [chunk], [rows[0], chunk], [decode("long", 17, [12, 13, 14, 15, 16])]):
        small.run(batch, [])
    assert ran == [3, 1, 2, 1]
    small.run(rows[:2], [])
    small.run([decode("longest", 16, [12, 13, 14, 15])], [])
    assert len(ran) == 4


@torch.inference_mode()
def test_padding_writes_to_the_scratch_block_alone(prefilled: tuple[Runner, KvPool, list[StepRow]]) -> None:
    """Of a step with padding only the rows' own slots and the scratch block change."""
    runner, pool, rows = prefilled
    padded = recorded(runner, pool, 4)
    pool.data[pool.scratch_block] = 0
    before = pool.data.clone()
    padded.run(rows, [])
    changed = {(block, offset) for block, _, _, offset, *_ in (pool.data != before).nonzero().tolist()}
    assert changed == {(7, 0), (2, 3), (4, 1), (pool.scratch_block, 0)}


def test_inputs_stay_where_they_are_and_hold_the_last_step() -> None:
    """After any steps, ids, positions and tables are those of the last one, padded, at the same addresses."""
    pool = KvPool(30, KvShape(1, 4, 1, 8, torch.float32), torch.device("cpu"))
    inputs = DecodeInputs(pool, 4, 6)
    places = [tensor.data_ptr() for tensor in (inputs.ids, inputs.positions, inputs.table)]
    source = random.Random(1)
    lengths = [3, 20, 8, 1]
    tables = [source.sample(range(30), 6) for _ in range(4)]
    for _ in range(60):
        index = source.randrange(4)
        if source.random() < 0.3:
            lengths[index], tables[index] = source.randint(1, 24), source.sample(range(30), 6)
        rows = [decode(str(i), lengths[i], tables[i]) for i in source.sample(range(4), source.randint(0, 4))]
        inputs.fill(rows)
        lengths = [min(24, length + 1) for length in lengths]
        expected = [row.block_table[: row.start // 4 + 1] for row in rows] + [[pool.scratch_block]] * (4 - len(rows))
        padded = [list(blocks) + [pool.zero_block] * (6 - len(blocks)) for blocks in expected]
        assert inputs.table.tolist() == padded
        assert inputs.positions.tolist() == [row.start for row in rows] + [0] * (4 - len(rows))
        assert inputs.ids.tolist() == [row.token_ids[-1] for row in rows] + [0] * (4 - len(rows))
    assert places == [tensor.data_ptr() for tensor in (inputs.ids, inputs.positions, inputs.table)]


@pytest.mark.parametrize(("most", "buckets"), [(1, [1]), (8, [8, 4, 2, 1]), (20, [20, 16, 8, 4, 2, 1])])
def test_buckets_double_up_to_the_most(most: int, buckets: list[int]) -> None:
    """The largest first."""
    assert DecodeLimits(most, 1).buckets() == buckets


class Stuck:
    """A device on which nothing can be recorded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, compute: Compute) -> Compute:
        """Fail as CUDA does."""
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def test_where_nothing_can_be_recorded_steps_run_as_they_come(
    prefilled: tuple[Runner, KvPool, list[StepRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is told in a line: at the check, without Triton, and in the pool that serves."""
    runner, pool, _ = prefilled
    model: Any = runner._model
    with torch.inference_mode():
        check = ModelCheck(model, pool.data.device)
    limits = DecodeLimits(4, 99999)

    class Backend(KindRecorder):
        """Not the reference path."""

    with pytest.raises(GraphsUnavailableError, match="Triton is not installed"):
        graphed_runner(model, pool.shape, ReferenceAttention(), check, limits)
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", Stuck)
    with pytest.raises(GraphsUnavailableError, match=r"when stream is capturing$"):
        graphed_runner(model, pool.shape, Backend(ReferenceAttention()), check, limits)
    monkeypatch.setattr(Stuck, "record", staticmethod(in_place))
    with torch.inference_mode():
        make = graphed_runner(model, pool.shape, Backend(ReferenceAttention()), check, limits)
        assert isinstance(make(KvPool(2, pool.shape, pool.data.device)), DecodeRunner)
    monkeypatch.undo()
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", Stuck)
    assert isinstance(make(pool), Runner)
