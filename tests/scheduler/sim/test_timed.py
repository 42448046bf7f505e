"""Timed mode: the roofline, one engine by hand, and whole runs in which every token is accounted for."""

from dataclasses import replace
from pathlib import Path

import pytest

from mell_scheduler.policy import POLICY_NAMES, PolicySettings, make_policy
from mell_scheduler.policy.base import Move
from mell_scheduler.sim.driver import PolicyDriver
from mell_scheduler.sim.engine import Engine, Sequence
from mell_scheduler.sim.hardware import GPUS, MODELS, HardwareError, capacity_tokens
from mell_scheduler.sim.paper import paper_workload
from mell_scheduler.sim.requests import US_PER_S, Request, Workload, without_oversized
from mell_scheduler.sim.roofline import Roofline, blocks
from mell_scheduler.sim.series import Window
from mell_scheduler.sim.simulate import bare_policy
from mell_scheduler.sim.simulate_timed import TimedSimulation, simulate_timed
from mell_scheduler.sim.slo import Study, cheapest, highest_rate, measure
from mell_scheduler.sim.timed import Slo, TimedRun, TimedSettings

ROOFLINE = Roofline.of("llama-2-13b", "a100-40")


def sequence(name: str, prompt: int, output: int, *, at: float = 0.0, hashes: tuple[int, ...] = ()) -> Sequence:
    """A request."""
    return Sequence(name, Request(round(at * US_PER_S), prompt, output, hashes), at)


class TestRoofline:
    """Iteration times."""

    def test_steps_slow_down_with_kv_and_prefill(self) -> None:
        """More KV to read and more prefill to compute never make a step shorter."""
        alone = ROOFLINE.step_s(1, 100)
        full = ROOFLINE.step_s(4, ROOFLINE.capacity_tokens)
        chunked = ROOFLINE.step_s(4, ROOFLINE.capacity_tokens, 512)
        assert 0.02 < alone < full < chunked < 0.2

    def test_more_gpus_per_instance_are_faster_and_hold_more(self) -> None:
        """An instance over two cards reads faster and has more room for KV."""
        two = Roofline.of("llama-2-13b", "a100-40", 2)
        assert two.step_s(1, 100) < ROOFLINE.step_s(1, 100)
        assert two.capacity_tokens > 2 * ROOFLINE.capacity_tokens

    def test_the_profile_is_the_roofline_in_blocks(self) -> None:
        """What the policies plan with agrees with what the engine does, decoding."""
        profile = ROOFLINE.profile(limit_s=0.03)
        planned_ns = profile.base_ns + 4 * profile.per_item_ns + 500 * profile.per_block_ns
        assert planned_ns / 1e9 == pytest.approx(ROOFLINE.step_s(4, 500 * 16), rel=0.01)

    def test_every_model_fits_somewhere(self) -> None:
        """Each model fits on enough of the largest cards; where it does not, the error says what to do."""
        assert all(capacity_tokens(model, "h200", 2) > 0 for model in MODELS)
        assert all(capacity_tokens("smollm2-135m", gpu) > 0 for gpu in GPUS)
        with pytest.raises(HardwareError, match="raise --gpus-per-instance"):
            capacity_tokens("llama-3.1-70b", "a10g")


class TestEngine:
    """One worker."""

    def test_an_unloaded_request_takes_what_the_roofline_says(self) -> None:
        """Alone, first token and rate are the unloaded ones."""
        engine = Engine("g", ROOFLINE, 0.0)
        alone = sequence("a", 1_000, 100)
        engine.admit(alone, 0.0, prefix_cache=False)
        now_s = 0.0
        while alone.finished_s is None and now_s < 60:
            engine.advance(now_s, 0.25, slow_s=1.0)
            now_s += 0.25
        assert alone.first_token_s == pytest.approx(ROOFLINE.unloaded_ttft_s(1_000), rel=0.1)
        assert alone.tpot_s == pytest.approx(ROOFLINE.unloaded_tpot_s(1_050), rel=0.05)

    def test_prefill_slows_decodes_down(self) -> None:
        """While another's prompt is prefilled, gaps are those of the chunked step."""
        engine = Engine("g", ROOFLINE, 0.0)
        first, second = sequence("a", 10, 2_000), sequence("b", 4_000, 10)
        engine.admit(first, 0.0, prefix_cache=False)
        engine.advance(0.0, 1.0, slow_s=0.05)
        before = first.generated
        engine.admit(second, 1.0, prefix_cache=False)
        engine.advance(1.0, 0.5, slow_s=0.05)
        assert first.generated - before < 0.3 * before
        assert first.slow_tokens > 1

    def test_memory_counts_whole_blocks(self) -> None:
        """Sixteen tokens and the one being made take two blocks."""
        engine = Engine("g", ROOFLINE, 0.0)
        engine.admit(sequence("a", 16, 10), 0.0, prefix_cache=False)
        assert engine.used_blocks == 2
        assert [blocks(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]

    def test_a_cached_prefix_is_not_prefilled_again(self) -> None:
        """Equal leading hashes save their tokens; a difference ends the match."""
        engine = Engine("g", ROOFLINE, 0.0)
        engine.admit(sequence("a", 1_500, 10, hashes=(1, 2, 3)), 0.0, prefix_cache=True)
        again = sequence("b", 1_500, 10, hashes=(1, 2, 9))
        engine.admit(again, 0.0, prefix_cache=True)
        assert again.prefill_left == 1_500 - 2 * 512
        other = sequence("c", 1_500, 10, hashes=(7, 2, 3))
        engine.admit(other, 0.0, prefix_cache=True)
        assert other.prefill_left == 1_500

    def test_foreign_prefill_delays_own(self) -> None:
        """Prefill for a move that comes here takes the engine's time."""
        times = []
        for foreign in (0.0, 2_000.0):
            engine = Engine("g", ROOFLINE, 0.0)
            engine.foreign_tokens = foreign
            own = sequence("a", 500, 10)
            engine.admit(own, 0.0, prefix_cache=False)
            for tick in range(8):
                engine.advance(tick * 0.25, 0.25, slow_s=1.0)
            assert own.first_token_s is not None
            times.append(own.first_token_s)
        assert times[1] > times[0] + 0.2


def settings(**changes: object) -> TimedSettings:
    """A cluster whose GPUs start at once."""
    return replace(TimedSettings(ROOFLINE, gpu_start_s=0.0, spares=2), **changes)  # type: ignore[arg-type]


def finished(run: TimedRun, until_s: float, drain_s: float = 600.0) -> TimedRun:
    """Run to the end, checking the policy now and then."""
    for at, _ in enumerate(run.run(until_s, drain_s)):
        if at % 40 == 0:
            run.driver.policy.check()  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_request_ends_with_all_its_tokens(name: str) -> None:
    """Whatever is moved, preempted or deferred, each request makes exactly its output, and GPUs are all given back."""
    workload = without_oversized(paper_workload(1.0, seed=5, span_s=90.0), ROOFLINE.capacity_tokens)
    driver = bare_policy(name, PolicySettings(head_room=0.05))
    run = finished(TimedRun(workload, settings(), driver), 90.0)
    assert len(run.sequences) == len(workload.requests)
    for one in run.sequences:
        assert one.finished_s is not None
        assert one.generated == pytest.approx(one.request.output_tokens)
        assert one.first_token_s is not None
        assert one.arrival_s <= one.first_token_s <= one.finished_s
    assert max(run.series.tokens[-1:]) == 0


def test_starting_gpus_cost_time_and_hours() -> None:
    """A request that needs a GPU to start waits for it, and the start is counted."""
    slow = settings(gpu_start_s=20.0, spares=0)
    workload = Workload("w", [Request(US_PER_S, 8_000, 50), Request(US_PER_S, 8_000, 50)])
    run = finished(TimedRun(workload, slow, bare_policy("best-fit", PolicySettings())), 10.0)
    waits = sorted(s.first_token_s - s.arrival_s for s in run.sequences if s.first_token_s is not None)
    assert waits[-1] > 20.0
    assert run.series.gpus[4 * 5] > 0


def test_preemption_recomputes() -> None:
    """Two requests that outgrow one GPU: the later is preempted, prefills anew, and still ends complete."""
    workload = Workload("w", [Request(0, 5_500, 2_000), Request(0, 5_500, 2_000)])
    run = finished(TimedRun(workload, settings(max_gpus=1), bare_policy("best-fit", PolicySettings())), 10.0)
    assert sum(run.series.preemptions) >= 1
    assert all(s.generated == pytest.approx(2_000) for s in run.sequences)


def test_a_small_request_overtakes_a_large_one() -> None:
    """What fits now does not wait behind what has to wait for a GPU to start."""
    slow = settings(gpu_start_s=20.0, spares=0)
    sizes = (8_000, 8_000, 100)
    workload = Workload("w", [Request((at + 1) * US_PER_S, size, 300) for at, size in enumerate(sizes)])
    run = finished(TimedRun(workload, slow, bare_policy("repack", PolicySettings())), 10.0)
    first, large, small = (s.first_token_s or 0.0 for s in run.sequences)
    assert first < small < large
    assert large - 2.0 > 15.0


def test_late_after_a_preemption_is_a_miss() -> None:
    """A preempted request that waits for long before it goes on has missed, whatever its mean pace."""
    workload = Workload("w", [Request(0, 5_500, 2_000), Request(0, 5_500, 2_000)])
    lenient = Slo(5.0, 1e5, 1e5)
    fleet = settings(max_gpus=1, slo=lenient)
    run = finished(TimedRun(workload, fleet, bare_policy("best-fit", PolicySettings())), 10.0)
    assert [bool(s.resumes) for s in run.sequences] == [False, True]
    assert measure(run, Window(0.0, 10.0)).resume_attainment == 0.5
    run.settings = replace(fleet, slo=replace(lenient, ttft=1e4))
    assert measure(run, Window(0.0, 10.0)).attainment == 1.0


def test_a_deferred_move_is_planned_again_without_rest() -> None:
    """On a link too slow for any move each epoch's moves are deferred, not failed: no request has to rest."""

    class Watched(PolicyDriver):
        deferrals = 0

        def deferred(self, move: Move, now_us: int) -> None:
            super().deferred(move, now_us)
            type(self).deferrals += 1

        def failed(self, move: Move, now_us: int) -> None:
            raise AssertionError("nothing that was deferred has failed")

    workload = Workload("w", [Request(0, 3_000, 800) for _ in range(4)] + [Request(5 * US_PER_S, 100, 200)])
    fleet = settings(link_bytes_per_s=1.0, prefill_share=0.0, max_growth_tokens=16)
    driver = Watched(make_policy("repack", PolicySettings()))
    run = finished(TimedRun(workload, fleet, driver), 10.0)
    assert Watched.deferrals > 1
    assert sum(run.series.moves) == 0
    assert all(s.finished_s is not None for s in run.sequences)


def test_growth_has_a_limit() -> None:
    """With a smaller prediction of growth, more requests are let onto one GPU."""
    sizes = [Request(0, 2_900, 30) for _ in range(4)]
    most = []
    for limit in (None, 0):
        fleet = settings(max_gpus=1, max_growth_tokens=limit)
        run = TimedRun(Workload("w", sizes), fleet, bare_policy("repack", PolicySettings()))
        for _ in run.run(1.0, 0.0):
            pass
        most.append(len(sizes) - run.series.waiting[-1])
    assert most == [3, 4]


def test_misses_are_counted() -> None:
    """A rejected and an unfinished request miss; tighter objectives are met by fewer."""
    workload = without_oversized(paper_workload(1.0, seed=5, span_s=60.0), ROOFLINE.capacity_tokens)
    run = TimedRun(workload, settings(), bare_policy("repack", PolicySettings()))
    for _ in run.run(60.0, 0.0):
        pass
    window = Window(0.0, 60.0)
    latency = measure(run, window)
    assert latency.unfinished > 0
    assert latency.attainment <= 1 - latency.unfinished / len(run.sequences)
    assert measure(run, window, rejected=len(run.sequences)).attainment < latency.attainment
    run.settings = replace(run.settings, slo=Slo(1.0, 1.0, 1.0))
    assert measure(run, window).attainment < latency.attainment


def test_the_search_finds_the_cheapest_that_meets() -> None:
    """What is found meets the objectives; where nothing does, nothing is found."""
    workload = without_oversized(paper_workload(0.5, seed=5, span_s=60.0), ROOFLINE.capacity_tokens)
    study = Study(workload, settings(slo=Slo(50.0, 2.0, 9.0)), Window(0.0, 60.0), bare_policy)
    found = cheapest(study, "repack", head_rooms=(0.0, 0.1), spares=(6, 12))
    assert found is not None
    assert found.latency.attainment >= 0.99
    strict = replace(study, settings=settings(slo=Slo(1.0, 1.0, 1.0)))
    assert cheapest(strict, "repack", head_rooms=(0.0,), spares=(6,)) is None


def test_the_dual_grows_with_the_fleet() -> None:
    """More GPUs carry a higher rate at the same objectives."""
    rates = []
    for gpus in (2, 8):
        fleet = settings(slo=Slo(20.0, 2.0, 9.0), max_gpus=gpus, spares=gpus)

        def study_at(multiple: float, fleet: TimedSettings = fleet) -> Study:
            requests = paper_workload(max(0.01, multiple), seed=6, span_s=40.0)
            workload = without_oversized(requests, ROOFLINE.capacity_tokens)
            return Study(workload, fleet, Window(0.0, 40.0), bare_policy)

        rates.append(highest_rate(study_at, "repack", PolicySettings(), steps=4))
    assert rates[0] < rates[1]


def test_a_report_repeats(tmp_path: Path) -> None:
    """Equal simulations give equal reports; the JSON adds latency beside the agreed keys."""
    file = tmp_path / "t.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,50\n1,200,60\n2,300,70\n")
    simulation = TimedSimulation(str(file), settings(), ("repack", "worst-fit"))
    first, second = (simulate_timed(simulation).as_json() for _ in range(2))
    assert first == second
    assert set(first) == {"trace", "settings", "policies", "timed", "missed_objectives"}
