"""The engine's thread: what is asked of it is done in the order in which it is asked."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mell_gpu_worker.core.events import EngineFailed, PoolMeasured, StepFinished
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
        self.released = threading.Event()
        self.released.set()

    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Note it."""
        self.asked.append("step")
        self.released.wait(60)
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


async def test_a_step_that_takes_too_long_is_a_failure() -> None:
    """In words that name the setting."""
    engine, thread = NotingEngine(), EngineThread()
    engine.released.clear()
    outcome = await EngineRunner(engine, thread, step_timeout_s=0.05).step([])
    assert isinstance(outcome, EngineFailed)
    assert "MELL_STEP_TIMEOUT_S" in outcome.message
    engine.released.set()
    thread.close()


async def test_a_process_that_stood_still_gives_its_step_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine stood as well."""
    monkeypatch.setattr("mell_gpu_worker.engine_runner.STOOD_STILL_S", 0.2)
    engine, thread = NotingEngine(), EngineThread()
    engine.released.clear()
    step = asyncio.ensure_future(EngineRunner(engine, thread, step_timeout_s=1.0).step([]))
    await asyncio.sleep(0)
    time.sleep(1.5)  # noqa: ASYNC251 - the whole process does not run
    asyncio.get_running_loop().call_later(0.2, engine.released.set)
    assert isinstance(await step, StepFinished)
    thread.close()
