"""The engine's thread: what is asked of it is done in the order in which it is asked."""

from collections.abc import Sequence
from pathlib import Path

from mell_gpu_worker.core.events import PoolMeasured, StepFinished
from mell_gpu_worker.core.step import StepResult, StepRow
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine_runner import EngineRunner, EngineThread
from mell_shared.models import FAKE_MODEL


class NotingEngine(FakeEngine):
    """An engine with a pace of its own that notes what it is asked."""

    def __init__(self) -> None:
        super().__init__(
            EngineOptions(engine="fake", model=FAKE_MODEL, model_dir=Path(), kv_blocks=4, fake_step_us=1_000)
        )
        self.asked: list[str] = []

    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Note it."""
        self.asked.append("step")
        return StepResult((), 0)

    def measure(self) -> PoolMeasured:
        """Return what an empty pool measures."""
        return PoolMeasured(self.spec.kv_blocks, 0, 0, 0)

    def wake(self) -> None:
        """Note it."""
        self.asked.append("wake")

    def rest(self) -> None:
        """Note it."""
        self.asked.append("rest")


async def test_a_step_asked_for_after_a_rest_comes_after_it() -> None:
    """Also before anybody has waited for the rest: else what the step begins would be dropped by it."""
    engine, thread = NotingEngine(), EngineThread()
    runner = EngineRunner(engine, thread, step_timeout_s=60.0)
    rest, step = runner.rest(), runner.step([])
    assert isinstance(await step, StepFinished)
    await rest
    assert engine.asked == ["rest", "step"]
    runner.wake()
    assert engine.asked[-1] == "wake"
    thread.close()
