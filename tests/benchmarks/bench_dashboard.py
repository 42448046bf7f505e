"""The dashboard in a real Chromium with 100 GPUs and 2,000 requests, and what watching costs frontend and scheduler."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from playwright.sync_api import CDPSession

from mell_frontend.live import LiveFeed
from mell_frontend.pulse import Pulse
from mell_scheduler.core import SchedulerCore, Tick
from mell_scheduler.core.status import live_columns, worker_statuses
from mell_scheduler.policy import PolicySettings, make_policy
from mell_shared.clock import SystemClock
from mell_shared.codec import decode, encode
from mell_shared.messages.admin import ADMIN_REPLY, Live, Status
from mell_shared.messages.scheduler import SequenceFinished
from tests.benchmarks import bench_scheduler_core
from tests.benchmarks.bench_scheduler_core import ROUNDS, Busy, ask, cpu_us, handle_all
from tests.benchmarks.figures import print_table, spread
from tests.dashboard.browser import CHROMIUM, NO_CHROMIUM, chromium
from tests.dashboard.imaginary import ImaginaryGateway, imaginary_frontend

pytestmark = pytest.mark.benchmark

SECONDS = 10
FRAMES = """seconds => new Promise(done => {
  const gaps = []; let last = performance.now(); const end = last + 1000 * seconds;
  const frame = now => {
    gaps.push(now - last); last = now;
    now < end ? requestAnimationFrame(frame) : done(gaps.slice(1));
  };
  requestAnimationFrame(frame);
})"""
BUSY = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration", "TaskDuration")


def busy_s(session: CDPSession) -> dict[str, float]:
    """Seconds that the page's main thread has worked since it was opened, by kind."""
    told = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    return {name: told[name] for name in BUSY}


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.timeout(300)
def test_frames() -> None:
    """Print frame times and what the main thread does, at three sizes."""
    rows = []
    for gpus, requests, moves in ((8, 100, 2), (100, 2_000, 8), (400, 5_000, 16)):
        with imaginary_frontend(ImaginaryGateway(gpus, requests, moves)) as url, chromium() as browser:
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"{url}/dashboard")
            page.locator(".gpu").nth(gpus - 1).wait_for(timeout=60_000)
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable")
            page.wait_for_timeout(2_000)
            before = busy_s(session)
            gaps = sorted(page.evaluate(FRAMES, SECONDS))
            after = busy_s(session)
            heap_mb = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
            shares = [f"{100 * (after[name] - before[name]) / SECONDS:.1f}" for name in BUSY]
            times = [
                f"{statistics.median(gaps):.1f}",
                f"{gaps[len(gaps) * 95 // 100]:.1f}",
                f"{gaps[len(gaps) * 99 // 100]:.1f}",
            ]
            rows.append([f"{gpus}, {requests:,}", *times, *shares, f"{heap_mb:.0f}"])
    head = [
        "GPUs, requests",
        "frame ms p50",
        "p95",
        "p99",
        "script %",
        "layout %",
        "style %",
        "main thread %",
        "heap MB",
    ]
    print_table(f"Dashboard in headless Chromium, {SECONDS} s each", head, rows)


def cpu_ms(work: Callable[[], Any], times: int = 5) -> list[float]:
    """Processor time of one call, for each round."""
    return [cpu_us(lambda: [work() for _ in range(times)]) / times / 1_000 for _ in range(ROUNDS)]


def test_watching() -> None:
    """Print what a state costs the scheduler and the frontend, however many watch, and how large it is."""
    rows = []
    for workers in (1, 20, 50):
        core = Busy(workers, "repack").core

        def told(core: SchedulerCore = core) -> bytes:
            status = Status(
                scheduler="s",
                policy="repack",
                uptime_s=1.0,
                workers=worker_statuses(core, 0),
                queued=0,
                placed=0,
                rejected=0,
            )
            return encode(Live.model_construct(status=status, **live_columns(core)))

        data = told()
        feed = LiveFeed(ImaginaryGateway(1, 1, 0), SystemClock(), Pulse(), 1.0)
        made = partial(feed._told, 1, decode(ADMIN_REPLY, data))  # type: ignore[arg-type]
        rows.append(
            [
                f"{workers}, {workers * 100:,}",
                spread(cpu_ms(told), 1),
                f"{len(data) / 1e3:.0f}",
                spread(cpu_ms(lambda data=data: decode(ADMIN_REPLY, data)), 1),  # type: ignore[misc]
                spread(cpu_ms(made), 1),
                f"{len(made().text) / 1e3:.0f}",
            ]
        )
    head = [
        "workers, sequences",
        "scheduler CPU ms",
        "kB on the bus",
        "frontend: decode CPU ms",
        "to JSON",
        "kB to a browser",
    ]
    print_table(f"One state, {ROUNDS} rounds", head, rows)


def shadowed(workers: int, shadow: str | None) -> Busy:
    """A busy core, with or without a policy beside it."""

    def core(policy: Any, settings: Any, now_us: int) -> SchedulerCore:
        beside = None if shadow is None else make_policy(shadow, PolicySettings(head_room=0.05))
        return SchedulerCore(policy, settings, now_us, beside)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scheduler_core, "SchedulerCore", core)
        return Busy(workers, "repack")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [20, 100, 1_000])
def test_shadow(workers: int) -> None:
    """Print what the shadow policy adds, in turn with a core that has none."""
    cores = {name: shadowed(workers, name) for name in (None, "worst-fit")}
    figures: dict[tuple[str, str | None], list[float]] = {}
    for turn in range(ROUNDS):
        for name in sorted(cores, key=lambda name: (name is None) == bool(turn % 2)):
            busy = cores[name]
            asks = [ask(turn * 1_000 + number) for number in range(300)]
            start_ns = time.process_time_ns()
            said = [busy.core.handle(event, busy.now_us) for event in asks]
            figures.setdefault(("place", name), []).append((time.process_time_ns() - start_ns) / 300_000)
            ends = [
                SequenceFinished(
                    worker=reply.reply.worker, sequence=event.request.sequence, generation=1, reason="stop"
                )  # type: ignore[union-attr]
                for (reply,), event in zip(said, asks, strict=True)
            ]
            took_us = cpu_us(partial(handle_all, busy.core, ends, busy.now_us)) / 300
            figures.setdefault(("sequence finished", name), []).append(took_us)
            busy.now_us += 1_000_000
            handle_all(busy.core, busy.reports(), busy.now_us)
            ticks_us = []
            for _ in range(10):
                ticks_us.append(cpu_us(lambda busy=busy: busy.core.handle(Tick(), busy.now_us)))  # type: ignore[misc]
                busy.now_us += 100_000
            figures.setdefault(("all ticks of a second", name), []).append(sum(ticks_us))
            figures.setdefault(("the longest of them", name), []).append(max(ticks_us))
    rows = [
        [what, spread(figures[what, None], 0), spread(figures[what, "worst-fit"], 0)]
        for what in dict.fromkeys(what for what, _ in figures)
    ]
    print_table(f"{workers:,} workers of 100 sequences, {ROUNDS} rounds", ["CPU us", "no shadow", "worst-fit"], rows)
