"""Time of the scheduler core: a placement, a report of 100 sequences, a tick; at 10, 100 and 1,000 workers."""

import time
from collections.abc import Callable

import pytest

from mell_scheduler.core import CoreSettings, PlaceRequested, SchedulerCore, Tick
from mell_scheduler.policy import PolicySettings, make_policy
from mell_shared.codec import decode, encode
from mell_shared.messages.scheduler import (
    SCHEDULER_EVENT,
    PlaceRequest,
    SequenceFinished,
    WorkerJoined,
    WorkerReport,
    WorkerSpec,
)
from tests.benchmarks.figures import print_table, spread

pytestmark = pytest.mark.benchmark

ROUNDS = 7
SEQUENCES = 100
BLOCKS = 40
"""Of each sequence; a worker holds 100 of them and a little more."""


def tell(what: str, rows: dict[str, list[float]]) -> None:
    """Print a table of microseconds, median and range over the rounds."""
    lines = [[event, spread(figures, 1)] for event, figures in rows.items()]
    print_table(f"Scheduler core, {what}, {ROUNDS} rounds", ["event", "us"], lines)


class Busy:
    """A core whose workers hold 100 sequences each, with room for a few more on every one."""

    def __init__(self, workers: int, policy: str) -> None:
        self.now_us = 0
        self.core = SchedulerCore(make_policy(policy, PolicySettings(head_room=0.05)), CoreSettings(), 0)
        self.specs = [
            WorkerSpec(
                worker=f"worker-{number:08x}",
                name="w",
                host="h",
                model="m",
                engine="fake",
                device="cpu",
                kv_layout="l",
                max_model_len=8192,
                kv_blocks=SEQUENCES * BLOCKS * 5 // 4,
                block_tokens=16,
                max_sequences=256,
            )
            for number in range(workers)
        ]
        self.number = 0
        for spec in self.specs:
            self.core.handle(WorkerJoined(spec=spec), 0)
        for report in self.reports():
            self.core.handle(report, self.now_us)

    def reports(self) -> list[WorkerReport]:
        """The next report of every worker: all sequences have grown by 40 tokens."""
        self.number += 1
        tokens = BLOCKS * 8 + 40 * self.number % (BLOCKS * 8)
        blocks = -(-tokens // 16)
        return [
            WorkerReport(
                worker=spec.worker,
                number=self.number,
                free_blocks=spec.kv_blocks - blocks * SEQUENCES,
                used_blocks=blocks * SEQUENCES,
                sequences=tuple(f"chatcmpl-{index:016x}-{spec.worker}.0.0" for index in range(SEQUENCES)),
                generations=[1] * SEQUENCES,
                tokens=[tokens] * SEQUENCES,
                blocks=[blocks] * SEQUENCES,
                states=[0] * SEQUENCES,
            )
            for spec in self.specs
        ]


def timed_us(action: Callable[[], object]) -> float:
    """Time of one action in microseconds."""
    start_ns = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - start_ns) / 1_000


def ask(number: int, tokens: int = 300) -> PlaceRequested:
    """One of many requests."""
    request = PlaceRequest(
        sequence=f"new-{number}", generation=1, frontend="f", model="m", prompt_tokens=tokens, max_output_tokens=100
    )
    return PlaceRequested(f"inbox-{number}", request)


@pytest.mark.parametrize("workers", [10, 100, 1_000])
@pytest.mark.parametrize("policy", ["best-fit", "repack"])
def test_decisions(workers: int, policy: str) -> None:
    """Print the core's time for each kind of event on a busy cluster."""
    busy = Busy(workers, policy)
    core = busy.core
    place_us, finish_us, report_us, tick_us = [], [], [], []
    for turn in range(ROUNDS):
        asks = [ask(turn * 1_000 + number) for number in range(100)]
        homes: list[str] = []
        start_ns = time.perf_counter_ns()
        for event in asks:
            (reply,) = core.handle(event, busy.now_us)
            homes.append(reply.reply.worker)  # type: ignore[union-attr]
        place_us.append((time.perf_counter_ns() - start_ns) / 100_000)
        ends = [
            SequenceFinished(worker=home, sequence=event.request.sequence, generation=1, reason="stop")
            for home, event in zip(homes, asks, strict=True)
        ]
        finish_us.append(timed_us(lambda ends=ends: [core.handle(end, busy.now_us) for end in ends]) / 100)
        busy.now_us += 1_000_000
        reports = busy.reports()
        report_us.append(timed_us(lambda reports=reports: [core.handle(r, busy.now_us) for r in reports]) / workers)
        tick_us.append(timed_us(lambda: core.handle(Tick(), busy.now_us)))
    rows = {
        "place": place_us,
        "sequence finished": finish_us,
        f"report of {SEQUENCES} sequences": report_us,
        "tick": tick_us,
    }
    tell(f"{policy}, {workers:,} workers", rows)


@pytest.mark.parametrize("workers", [10, 1_000])
def test_full_queue(workers: int) -> None:
    """Print the time of an end and of a repeat while 1,000 requests wait on a full cluster."""
    busy = Busy(workers, "best-fit")
    core = busy.core
    number = 0
    while True:  # fill it up
        number += 1
        replies = core.handle(ask(number, 7_000), busy.now_us)
        if not replies:
            break
    waiting = [ask(number + index, 7_000 + index % 64) for index in range(1, 1_000)]
    for event in waiting:
        core.handle(event, busy.now_us)
    report_us, repeat_us, tick_us = [], [], []
    for turn in range(ROUNDS):
        busy.now_us += 100_000
        tick_us.append(timed_us(lambda: core.handle(Tick(), busy.now_us)))
        repeats = [PlaceRequested(f"{event.handle}-{turn}", event.request) for event in waiting[:200]]
        repeat_us.append(timed_us(lambda r=repeats: [core.handle(event, busy.now_us) for event in r]) / 200)
        reports = busy.reports()[:10]
        report_us.append(timed_us(lambda r=reports: [core.handle(event, busy.now_us) for event in r]) / 10)
    assert len(core.waiting) == 1_000
    rows = {"repeat of a waiting request": repeat_us, "report": report_us, "tick": tick_us}
    tell(f"best-fit, {workers:,} workers, 1,000 requests wait", rows)


def test_door() -> None:
    """Print what decoding a report costs, which the service pays besides the core."""
    data = encode(Busy(1, "best-fit").reports()[0])
    figures = [timed_us(lambda: [decode(SCHEDULER_EVENT, data) for _ in range(50)]) / 50 for _ in range(ROUNDS)]
    tell("at its door", {f"decode a report of {SEQUENCES} sequences, {len(data):,} bytes": figures})
