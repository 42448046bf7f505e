"""Two runners over one pool, held to the same logits at every step."""

from collections.abc import Sequence

import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.runner import Runner, StepRunner
from mell_gpu_worker.engine.torch_engine import TorchEngine


class Compared:
    """A `StepRunner` that runs each step plainly, then again; counts steps that only decode, by their rows."""

    def __init__(self, plain: StepRunner, other: StepRunner, tolerance: float = 1e-4) -> None:
        self._plain = plain
        self._other = other
        self._tolerance = tolerance
        self.decodes: list[int] = []

    def run(self, rows: Sequence[StepRow], kept: Sequence[int]) -> torch.Tensor:
        """Run one step both ways; return the other's logits."""
        expected = self._plain.run(rows, kept)
        found = self._other.run(rows, kept)
        torch.testing.assert_close(found, expected, atol=self._tolerance, rtol=self._tolerance)
        if all(row.count == 1 for row in rows):
            self.decodes.append(len(rows))
        return found


def plain_runner(engine: TorchEngine) -> Runner:
    """Return the runner of an engine that records nothing."""
    runner = engine._open().runner
    assert isinstance(runner, Runner)
    return runner
