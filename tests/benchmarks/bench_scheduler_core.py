"""Processor time of the scheduler core: a placement, a report of 100 sequences with its decoding, a busy second in all.

Processor time, for neighbours disturb it least; each figure is of many events between two readings of the clock.
"""

import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from multiprocessing import Pipe

import pytest

from mell_scheduler.core import Command, CoreSettings, Event, PlaceRequested, SchedulerCore, Tick
from mell_scheduler.policy import PolicySettings, make_policy
from mell_scheduler.sim.core_driver import CoreDriver
from mell_scheduler.sim.memory import MemoryRun, MemorySettings
from mell_shared.codec import decode, encode
from mell_shared.messages.base import Message
from mell_shared.messages.scheduler import (
    PLACE_REQUEST,
    SCHEDULER_EVENT,
    PlaceRequest,
    SequenceFinished,
    WorkerJoined,
    WorkerReport,
    WorkerSpec,
)
from tests.benchmarks.bench_policy import CAPACITY, busy
from tests.benchmarks.figures import print_table, size, spread

pytestmark = pytest.mark.benchmark

ROUNDS = 7
SEQUENCES = 100
BLOCKS = 40
"""Of each sequence; a worker holds 100 of them and a little more."""


def tell(what: str, rows: dict[str, list[float]]) -> None:
    """Print a table of microseconds, median and range over the rounds."""
    lines = [[event, spread(figures, 1)] for event, figures in rows.items()]
    print_table(f"Scheduler core, {what}, {ROUNDS} rounds", ["event", "CPU us"], lines)


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


def cpu_us(action: Callable[[], object]) -> float:
    """Processor time of one action in microseconds."""
    start_ns = time.process_time_ns()
    action()
    return (time.process_time_ns() - start_ns) / 1_000


def ask(number: int, tokens: int = 300) -> PlaceRequested:
    """One of many requests."""
    request = PlaceRequest(
        sequence=f"new-{number}", generation=1, frontend="f", model="m", prompt_tokens=tokens, max_output_tokens=100
    )
    return PlaceRequested(f"inbox-{number}", request)


def handle_all(core: SchedulerCore, events: Sequence[Event], now_us: int) -> None:
    """One after the other; what they cause is dropped."""
    for event in events:
        core.handle(event, now_us)


def take(core: SchedulerCore, messages: list[bytes], now_us: int) -> None:
    """Decode reports and take them in, one by one, as the service does."""
    for data in messages:
        core.handle(decode(SCHEDULER_EVENT, data), now_us)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [count for count in (10, 100, 1_000, 10_000) if count <= size("WORKERS", 1_000)])
@pytest.mark.parametrize("policy", ["best-fit", "repack"])
def test_decisions(workers: int, policy: str) -> None:
    """Print the core's time for each kind of event on a busy cluster.

    BENCH_WORKERS: the largest; 10,000 workers take minutes, and 3 GB.
    """
    busy = Busy(workers, policy)
    core = busy.core
    place_us, finish_us, report_us, tick_us = [], [], [], []
    for turn in range(ROUNDS):
        asks = [ask(turn * 1_000 + number) for number in range(100)]
        homes: list[str] = []
        start_ns = time.process_time_ns()
        for event in asks:
            (reply,) = core.handle(event, busy.now_us)
            homes.append(reply.reply.worker)  # type: ignore[union-attr]
        place_us.append((time.process_time_ns() - start_ns) / 100_000)
        ends = [
            SequenceFinished(worker=home, sequence=event.request.sequence, generation=1, reason="stop")
            for home, event in zip(homes, asks, strict=True)
        ]
        finish_us.append(cpu_us(partial(handle_all, core, ends, busy.now_us)) / 100)
        busy.now_us += 1_000_000
        messages = [encode(report) for report in busy.reports()]
        report_us.append(cpu_us(partial(take, core, messages, busy.now_us)) / workers)
        tick_us.append(cpu_us(lambda: core.handle(Tick(), busy.now_us)))
    rows = {
        "place": place_us,
        "sequence finished": finish_us,
        f"report of {SEQUENCES} sequences, decoding included": report_us,
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
        tick_us.append(cpu_us(lambda: core.handle(Tick(), busy.now_us)))
        repeats = [PlaceRequested(f"{event.handle}-{turn}", event.request) for event in waiting[:200]]
        repeat_us.append(cpu_us(partial(handle_all, core, repeats, busy.now_us)) / 200)
        reports = busy.reports()[:10]
        report_us.append(cpu_us(partial(handle_all, core, reports, busy.now_us)) / 10)
    assert len(core.waiting) == 1_000
    rows = {"repeat of a waiting request": repeat_us, "report": report_us, "tick": tick_us}
    tell(f"best-fit, {workers:,} workers, 1,000 requests wait", rows)


class Recording(CoreDriver):
    """Drives a core, and can write down what it is told, as bytes where the service would get bytes."""

    told: list[tuple[bytes | None, Event, int]] | None = None

    def _tell(self, event: Event, now_us: int) -> list[Command]:
        if self.told is not None:
            self.told.append((packed(event), event, now_us))
        return super()._tell(event, now_us)

    @property
    def core(self) -> SchedulerCore:
        """The core it drives."""
        assert self._core is not None, "the first GPU makes it"
        return self._core


def packed(event: Event) -> bytes | None:
    """The message as it would come; None where nothing comes, or a simulated worker is over its capacity."""
    if isinstance(event, PlaceRequested):
        return encode(event.request)
    if isinstance(event, WorkerReport) and event.free_blocks < 0:
        return None
    return encode(event) if isinstance(event, Message) else None


def next_events(run: Iterator[float], driver: Recording, seconds: int) -> list[tuple[bytes | None, Event, int]]:
    """What the core will be told in the next seconds, found out in a copy of this process."""
    ours, theirs = Pipe()
    child = os.fork()
    if child == 0:
        driver.told = []
        for _ in range(seconds):
            next(run)
        theirs.send_bytes(pickle.dumps(driver.told))
        os._exit(0)
    events: list[tuple[bytes | None, Event, int]] = pickle.loads(ours.recv_bytes())
    os.waitpid(child, 0)
    return events


def relive(core: SchedulerCore, events: list[tuple[bytes | None, Event, int]]) -> None:
    """Decode and handle: all that the service does before it carries commands out."""
    for data, event, now_us in events:
        if data is None:
            core.handle(event, now_us)
        elif isinstance(event, PlaceRequested):
            core.handle(PlaceRequested(event.handle, decode(PLACE_REQUEST, data)), now_us)
        else:
            core.handle(decode(SCHEDULER_EVENT, data), now_us)


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("policy", ["repack", "mell"])
def test_a_busy_second(policy: str) -> None:
    """Print the share of a core that everything takes, moves included, at 1 s epochs; BENCH_WORKERS: the largest."""
    rows = []
    for workers in (n for n in (10, 100, 1_000) if n <= size("WORKERS", 100)):
        driver = Recording(policy, PolicySettings(hold_both_ends=False), growth_blocks=1)
        run = MemoryRun(busy(workers, 100), MemorySettings(CAPACITY, 1.0), driver, time.perf_counter_ns).run(100)
        for now_s in run:
            if now_s >= 90:
                break
        events = next_events(run, driver, 5)
        each_us = [cpu_us(partial(relive, driver.core, second)) for second in by_second(events)]
        kinds = Counter(type(event).__name__ for _, event, _ in events)
        told = ", ".join(f"{kind} {count / 5:,.0f}" for kind, count in kinds.most_common())
        rows.append([f"{workers:,}", spread([us / 1e4 for us in each_us], 1), told])
    print_table(
        f"Scheduler core with {policy}, 100 requests of 60 s on each", ["workers", "% of a core", "events/s"], rows
    )


def by_second(events: list[tuple[bytes | None, Event, int]]) -> list[list[tuple[bytes | None, Event, int]]]:
    """Cut at each change of time."""
    return [list(second) for _, second in groupby(events, key=lambda told: told[2])]


def test_door() -> None:
    """Print what decoding a report costs, which the service pays besides the core."""
    data = encode(Busy(1, "best-fit").reports()[0])
    figures = [cpu_us(lambda: [decode(SCHEDULER_EVENT, data) for _ in range(50)]) / 50 for _ in range(ROUNDS)]
    tell("at its door", {f"decode a report of {SEQUENCES} sequences, {len(data):,} bytes": figures})
