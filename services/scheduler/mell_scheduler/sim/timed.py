"""Timed mode: what latency a policy costs, and how many GPU-hours it needs for it.

Time advances in short ticks; inside one, an engine's steps follow the roofline, so latency rises with
the batch. Modelled besides: chunked-prefill interference, recompute after preemption, block rounding,
report age (sizes as of the last epoch), migrations that occupy links and prefill, GPUs that take time to start.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from mell_scheduler.policy.base import GpuSpec, Item, ItemId, Move
from mell_scheduler.policy.transfer import Budgets, Candidate, Transfer, divide
from mell_scheduler.sim.driver import Driver
from mell_scheduler.sim.engine import Engine, Sequence
from mell_scheduler.sim.memory import DecisionLog, NanosecondClock
from mell_scheduler.sim.requests import US_PER_S, Workload
from mell_scheduler.sim.roofline import BLOCK_TOKENS, CHUNK_TOKENS, Roofline, blocks
from mell_scheduler.sim.series import Series, Tally

_Decision = TypeVar("_Decision")
_OVERTAKE = 64
"""So many waiting requests, the first in order, are tried when there may be room: as in the scheduler's core."""
_BACKLOG_S = 5.0
"""A move is begun only if links and target are through with it, and all before it, in this time."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives of one request: first token, mean per token, and 99% of the gaps between tokens.

    After a preemption it must go on within the first-token objective of what it then prefills anew.
    """

    ttft: float = 5.0
    tpot: float = 1.5
    gap: float = 5.0
    """All as multiples of the unloaded values on that GPU: TTFT of its own prompt or of the trace's mean
    one, whichever is longer; step time of a lone request."""


@dataclass(frozen=True, slots=True)
class TimedSettings:
    """The simulated cluster."""

    roofline: Roofline
    slo: Slo = field(default_factory=Slo)
    epoch_s: float = 1.0
    tick_s: float = 0.25
    gpu_start_s: float = 30.0
    idle_s: float = 10.0
    """An idle GPU beyond the spares is stopped after this."""
    spares: int = 1
    """Warm GPUs kept beside those wanted."""
    link_bytes_per_s: float = 1.25e9
    """Of each instance, each way: 10 Gbit/s."""
    stall_s: float = 0.05
    """What a move keeps its request from decoding."""
    prefill_share: float = 0.25
    """Of a target's time that moves may prefill in."""
    prefix_cache: bool = True
    max_gpus: int | None = None
    max_growth_tokens: int | None = None
    """Most that a request is predicted to grow while a move is planned and made; None: what the roofline allows."""


class TimedRun:
    """One run of one workload under one driver. `clock` times decisions; it never steers the run."""

    def __init__(
        self, workload: Workload, settings: TimedSettings, driver: Driver, clock: NanosecondClock | None = None
    ) -> None:
        self._requests = workload.requests
        self.settings = settings
        self.driver = driver
        self._roofline = settings.roofline
        self._slow_s = settings.slo.gap * self._roofline.unloaded_tpot_s(1)
        self._clock = clock
        self._growth = self._predicted_growth()
        self._engines: dict[str, Engine] = {}
        self._starting: deque[Engine] = deque()
        self._started = 0
        self._waiting: deque[Sequence] = deque()
        self._flights: dict[ItemId, tuple[float, Sequence]] = {}
        self._link_free_s: dict[str, float] = {}
        self._tally = Tally()
        self.series = Series()
        self.sequences: list[Sequence] = []
        self.decision_ns: list[int] = []
        self.log: DecisionLog | None = None
        self.now_s = 0.0

    def _predicted_growth(self) -> int:
        """Blocks that a request may grow until a move planned now is made."""
        most = self._roofline.growth_blocks(self.settings.epoch_s + self._typical_move_s())
        limit = self.settings.max_growth_tokens
        most = min(most, self._roofline.capacity_blocks)
        return (most if limit is None else min(most, blocks(limit))) + 1

    def _typical_move_s(self) -> float:
        """Of a quarter of an instance's memory: a move must be planned that long before the overflow."""
        quarter_bytes = self._roofline.capacity_tokens * self._roofline.model.kv_bytes_per_token / 4
        return quarter_bytes / self.settings.link_bytes_per_s

    @property
    def _now_us(self) -> int:
        return round(self.now_s * US_PER_S)

    def run(self, until_s: float, drain_s: float) -> Iterator[float]:
        """Arrivals up to `until_s`, then at most `drain_s` for what is left; yields the time of each tick."""
        arrivals = iter(enumerate(self._requests))
        upcoming = next(arrivals, None)
        ticks_per_epoch = max(1, round(self.settings.epoch_s / self.settings.tick_s))
        tick = 0
        while self.now_s < until_s or (self.now_s < until_s + drain_s and self._unfinished()):
            self._start_engines()
            self._land()
            if tick % ticks_per_epoch == 0:
                self._plan()
            while upcoming is not None and upcoming[1].arrival_us < (self.now_s + self.settings.tick_s) * US_PER_S:
                if self.now_s < until_s:
                    self._arrive(Sequence(f"r{upcoming[0]}", upcoming[1], upcoming[1].arrival_us / US_PER_S))
                upcoming = next(arrivals, None)
            self._admit()
            self._advance()
            self._scale()
            self._sample()
            tick += 1
            self.now_s = tick * self.settings.tick_s
            yield self.now_s

    def _unfinished(self) -> bool:
        return bool(self._waiting) or any(not engine.empty for engine in self._engines.values())

    # --- requests

    def _arrive(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        self._waiting.append(sequence)

    def _admit(self) -> None:
        """Place what waits, in order; a small request may overtake a large one that finds no room."""
        for sequence in list(islice(self._waiting, _OVERTAKE)):
            engine = self._placed(sequence)
            if engine is not None:
                self._waiting.remove(sequence)
                engine.admit(sequence, max(sequence.arrival_s, self.now_s), self.settings.prefix_cache)
                self._record("place", item=sequence.item_id, target=engine.gpu_id, size=sequence.context)

    def _placed(self, sequence: Sequence) -> Engine | None:
        """The engine that takes it: the scheduler's choice, if there is room in fact."""
        item = self._item(sequence)
        gpu_id = self._decide(lambda: self.driver.arrived(item, self._now_us))
        if gpu_id is None:
            return None
        engine = self._engines[gpu_id]
        if engine.used_blocks + blocks(sequence.context + 1) > self._roofline.capacity_blocks:
            self.driver.finished(sequence.item_id, self._now_us)
            return None
        return engine

    def _decide(self, decide: Callable[[], _Decision]) -> _Decision:
        if self._clock is None:
            return decide()
        start_ns = self._clock()
        decision = decide()
        self.decision_ns.append(self._clock() - start_ns)
        return decision

    def _record(self, kind: str, **fields: object) -> None:
        if self.log is not None:
            self.log({"time_s": self.now_s, "kind": kind, **fields})

    def _item(self, sequence: Sequence) -> Item:
        size = blocks(sequence.context + 1)
        growth = min(self._growth, self._roofline.capacity_blocks - size)
        return Item(sequence.item_id, size, growth_blocks=growth)

    def _advance(self) -> None:
        for engine in list(self._engines.values()):
            for sequence in engine.advance(self.now_s, self.settings.tick_s, self._slow_s):
                self._leave(sequence)
            while engine.used_blocks > self._roofline.capacity_blocks:
                self._relieve(engine)

    def _leave(self, sequence: Sequence) -> None:
        """Finished or preempted: both ends of a move are freed."""
        assert sequence.gpu is not None
        sequence.gpu.remove(sequence)
        if sequence.move is not None:
            self._engines[sequence.move.target].incoming.pop(sequence.item_id, None)
            self._flights.pop(sequence.item_id, None)
            sequence.move = None
        self.driver.finished(sequence.item_id, self._now_us)

    def _relieve(self, engine: Engine) -> None:
        """Drop an incoming move first, else preempt the latest: it will prefill anew, before all arrivals."""
        if engine.incoming:
            self._abort(next(reversed(engine.incoming.values())))
            return
        sequence = engine.sequences[-1]
        self._tally.preemptions += 1
        sequence.slow_tokens += 1.0
        self._record("preempt", item=sequence.item_id, source=engine.gpu_id)
        self._leave(sequence)
        sequence.preempted_s = self.now_s if sequence.preempted_s is None else sequence.preempted_s
        self._waiting.appendleft(sequence)

    # --- moves

    def _plan(self) -> None:
        by_id: dict[ItemId, Sequence] = {}
        for engine in self._engines.values():
            here = engine.sequences
            by_id.update((s.item_id, s) for s in here)
            if here:
                sizes = [blocks(s.context + 1) for s in here]
                self.driver.reported(engine.gpu_id, [s.item_id for s in here], sizes, self._now_us)
        moves = self._decide(lambda: self.driver.epoch(self._now_us))
        division = divide([self._candidate(m, by_id[m.item_id]) for m in moves], self._budgets(moves))
        for move in division.deferred:
            self.driver.deferred(move, self._now_us)
        for transfer in division.transfers:
            self._start_move(by_id[transfer.move.item_id], transfer)

    def _candidate(self, move: Move, sequence: Sequence) -> Candidate:
        links = (f"{move.source} out", f"{move.target} in")
        return Candidate(move, sequence.context + 1, self._roofline.model.kv_bytes_per_token, links)

    def _budgets(self, moves: list[Move]) -> Budgets:
        """What links and workers can do for moves by the next epoch, less what is still under way."""
        links = [name for m in moves for name in (f"{m.source} out", f"{m.target} in")]
        backlog_s = {name: max(0.0, self._link_free_s.get(name, 0.0) - self.now_s) for name in links}
        link_bytes = {
            name: int(max(0.0, _BACKLOG_S - waits_s) * self.settings.link_bytes_per_s)
            for name, waits_s in backlog_s.items()
        }
        chunk_s = self._roofline.step_s(8, self._roofline.capacity_tokens, CHUNK_TOKENS)
        prefill = int(self.settings.prefill_share * _BACKLOG_S * CHUNK_TOKENS / chunk_s)
        return Budgets(link_bytes, {m.target: prefill for m in moves}, round(_BACKLOG_S * US_PER_S))

    def _start_move(self, sequence: Sequence, transfer: Transfer) -> None:
        move = transfer.move
        links = (f"{move.source} out", f"{move.target} in")
        start_s = max(self.now_s, *(self._link_free_s.get(link, 0.0) for link in links))
        end_s = start_s + transfer.copied_bytes / self.settings.link_bytes_per_s
        if transfer.copied_bytes:
            for link in links:
                self._link_free_s[link] = end_s
        self._engines[move.target].foreign_tokens += transfer.recomputed_tokens
        end_s = max(end_s, self.now_s + transfer.predicted_us / US_PER_S)
        sequence.move = move
        self._engines[move.target].incoming[sequence.item_id] = sequence
        self._flights[sequence.item_id] = (max(end_s, self.now_s + self.settings.tick_s), sequence)
        self._tally.moves += 1
        self._tally.moved_tokens += sequence.context
        self._tally.copied_tokens += transfer.copied_bytes // self._roofline.model.kv_bytes_per_token
        self._tally.prefilled_tokens += transfer.recomputed_tokens
        self._record(
            "move",
            item=move.item_id,
            source=move.source,
            target=move.target,
            size=sequence.context,
            reason=move.reason.name.lower(),
            mode=transfer.mode.value,
        )

    def _land(self) -> None:
        for item_id, (end_s, sequence) in list(self._flights.items()):
            if end_s <= self.now_s:
                del self._flights[item_id]
                self._commit(sequence)

    def _commit(self, sequence: Sequence) -> None:
        move, source = sequence.move, sequence.gpu
        assert move is not None
        assert source is not None
        target = self._engines[move.target]
        prefilling = sequence.prefill_left > 0
        source.remove(sequence)
        del target.incoming[sequence.item_id]
        sequence.gpu, sequence.move = target, None
        if prefilling:
            target.prefills.append(sequence)
        else:
            sequence.ready_s = self.now_s + self.settings.stall_s
            sequence.slow_tokens += 1.0 if self.settings.stall_s > self._slow_s else 0.0
            target.decoding[sequence.item_id] = sequence
        self.driver.committed(move, self._now_us)

    def _abort(self, sequence: Sequence) -> None:
        move = sequence.move
        assert move is not None
        del self._engines[move.target].incoming[sequence.item_id]
        del self._flights[sequence.item_id]
        sequence.move = None
        self.driver.failed(move, self._now_us)

    # --- GPUs

    def _start_engines(self) -> None:
        while self._starting and self._starting[0].ready_s <= self.now_s:
            engine = self._starting.popleft()
            engine.idle_since_s = self.now_s
            self._engines[engine.gpu_id] = engine
            limit_s = self.settings.slo.tpot * self._roofline.unloaded_tpot_s(1)
            spec = GpuSpec(engine.gpu_id, self._roofline.capacity_blocks, step=self._roofline.profile(limit_s))
            self.driver.gpu_started(spec, self._now_us)

    def _scale(self) -> None:
        queued = sum(blocks(s.context + 1) + self._growth for s in self._waiting)
        wanted = self.driver.gpus_wanted(queued) + self.settings.spares
        wanted = min(wanted, self.settings.max_gpus or wanted)
        for engine in self._engines.values():
            if not engine.empty:
                engine.idle_since_s = self.now_s
        while len(self._engines) + len(self._starting) < wanted:
            self._started += 1
            start_s = self.settings.gpu_start_s if self.now_s > 0 else 0.0
            self._starting.append(Engine(f"gpu{self._started}", self._roofline, self.now_s + start_s))
        idle = [e for e in self._engines.values() if self.now_s - e.idle_since_s >= self.settings.idle_s]
        for engine in idle[: max(0, len(self._engines) + len(self._starting) - wanted)]:
            del self._engines[engine.gpu_id]
            self.driver.gpu_stopped(engine.gpu_id, self._now_us)

    def _sample(self) -> None:
        series, tally = self.series, self._tally
        series.time_s.append(self.now_s)
        series.gpus.append(len(self._engines) + len(self._starting))
        series.tokens.append(BLOCK_TOKENS * sum(e.used_blocks for e in self._engines.values()))
        series.moves.append(tally.moves)
        series.moved_tokens.append(tally.moved_tokens)
        series.copied_tokens.append(tally.copied_tokens)
        series.prefilled_tokens.append(tally.prefilled_tokens)
        series.preemptions.append(tally.preemptions)
        series.waiting.append(len(self._waiting))
        self._tally = Tally()
