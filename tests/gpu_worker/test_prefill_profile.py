from pathlib import Path

import pytest

from mell_gpu_worker.core.step import StepResult, StepRow
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.prefill_profile import ProfileLimits, profile_prefill
from mell_shared.clock import ManualClock
from mell_shared.models import FAKE_MODEL

BASE_US, ROW_US, TOKEN_US = 1_000, 10, 5


class TimedEngine(FakeEngine):
    """An engine that says what its steps take without taking it, and turns the clock by as much."""

    def __init__(self, clock: ManualClock, free_tokens: int = 0, **changes: object) -> None:
        fields = {"engine": "fake", "model": FAKE_MODEL, "model_dir": Path(), "kv_blocks": 4096, "block_tokens": 16}
        super().__init__(EngineOptions(**(fields | changes)))  # type: ignore[arg-type]
        self.rows: list[int] = []
        self._clock = clock
        self._free_tokens = free_tokens

    def execute(self, rows: list[StepRow]) -> StepResult:  # type: ignore[override]
        """Compute, and take `TOKEN_US` for each token of prefill beyond those that are free."""
        result = super().execute(rows)
        decodes = sum(row.count == 1 for row in rows)
        prefill = max(0, sum(row.count for row in rows if row.count > 1) - self._free_tokens)
        step_us = BASE_US + ROW_US * decodes + TOKEN_US * prefill
        self._clock.advance_us(step_us)
        self.rows.append(decodes)
        return StepResult(result.sampled, step_us)


def limits(**changes: float) -> ProfileLimits:
    """Measure for long, at a quarter more."""
    fields = {"seconds": 60.0, "stretch": 0.25, "max_sequences": 64, "max_step_tokens": 1024}
    return ProfileLimits(**(fields | changes))  # type: ignore[arg-type]


def expected(batch: int, stretch: float, free_tokens: int = 0) -> float:
    """Tokens per second that lengthen a step of that many decodes by the share."""
    alone_us = BASE_US + ROW_US * batch
    return (free_tokens + alone_us * stretch / TOKEN_US) * 1e6 / (alone_us * (1 + stretch))


def test_rates_are_what_lengthens_a_step_by_the_share() -> None:
    """For each batch up to the most that run at once, as the engine's own times say."""
    clock = ManualClock()
    profile = profile_prefill(TimedEngine(clock), limits(), clock)
    assert [batch for batch, _ in profile] == [1, 8, 32]
    for batch, rate in profile:
        assert rate == pytest.approx(expected(batch, 0.25), rel=0.01)


def test_tokens_that_cost_nothing_count_in_full() -> None:
    """A device with compute to spare prefills many tokens before a step gets longer."""
    clock = ManualClock()
    profile = profile_prefill(TimedEngine(clock, free_tokens=200), limits(), clock)
    for batch, rate in profile:
        assert rate == pytest.approx(expected(batch, 0.25, free_tokens=200), rel=0.3)
        assert rate > 2 * expected(batch, 0.25)


def test_what_never_gets_longer_is_bounded_by_the_step() -> None:
    """Then the whole budget of a step goes into each."""
    clock = ManualClock()
    ((batch, rate),) = profile_prefill(TimedEngine(clock, free_tokens=10**6), limits(max_sequences=1), clock)
    assert (batch, rate) == (1, pytest.approx((1024 - 1) * 1e6 / (BASE_US + ROW_US), rel=0.01))


def test_the_time_is_kept() -> None:
    """It ends with what it has, or with nothing."""
    clock = ManualClock()
    assert profile_prefill(TimedEngine(clock), limits(seconds=0.003), clock) == ()
    clock = ManualClock()
    some = profile_prefill(TimedEngine(clock), limits(seconds=0.02), clock)
    assert [batch for batch, _ in some] == [1]
    assert clock.now_us() <= 25_000


def test_a_small_pool_measures_what_fits() -> None:
    """Never more blocks than there are; a pool with no room for a chunk gives nothing."""
    clock = ManualClock()
    engine = TimedEngine(clock, kv_blocks=40)
    assert [batch for batch, _ in profile_prefill(engine, limits(), clock)] == [1]
    assert profile_prefill(TimedEngine(clock, kv_blocks=1), limits(), clock) == ()


def test_an_instant_engine_has_no_profile() -> None:
    """Steps that take no time say nothing; the scheduler takes its own setting."""
    engine = FakeEngine(EngineOptions(engine="fake", model=FAKE_MODEL, model_dir=Path()))
    assert profile_prefill(engine, limits(), ManualClock()) == ()
