"""Memory mode: the paper's own simulation. Requests grow at a given rate; GPUs start and stop at once.

Each second: departures, growth, epoch, arrivals, release of empty GPUs, sample. Moves take no time, or
`move_s` during which both ends hold the memory.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil

from mell_scheduler.policy.base import GpuId, GpuSpec, Item, ItemId, Move
from mell_scheduler.sim.driver import Driver
from mell_scheduler.sim.requests import US_PER_S, Request, Workload
from mell_scheduler.sim.series import Series, Tally

NanosecondClock = Callable[[], int]
DecisionLog = Callable[[dict[str, object]], None]


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The simulated cluster. `max_gpus` None: as many as asked for."""

    capacity_tokens: int
    decode_tokens_per_s: float = 20.0
    epoch_s: float = 1.0
    move_s: float = 0.0
    max_gpus: int | None = None
    max_growth_tokens: int | None = None
    """Most that a request is predicted to grow while a move is under way; None: what it grows."""

    @property
    def tick_us(self) -> int:
        """The step of the simulation: an epoch, at most a second."""
        return min(round(self.epoch_s * US_PER_S), US_PER_S)

    @property
    def predicted_growth(self) -> int:
        """Growth while a move is under way; with instant moves the epoch cures what has grown."""
        growth = ceil(self.decode_tokens_per_s * self.tick_us / US_PER_S) if self.move_s else 0
        return growth if self.max_growth_tokens is None else min(growth, self.max_growth_tokens)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A running request; its size at a tick is `offset + rate x tick`, rounded down."""

    item_id: ItemId
    offset: float
    end_tick: int
    gpu: "_Gpu"
    move: Move | None = None


@dataclass(slots=True, eq=False)
class _Gpu:
    """A simulated worker: what is physically here and what is on its way here."""

    gpu_id: GpuId
    sequences: dict[ItemId, _Sequence] = field(default_factory=dict)
    incoming: dict[ItemId, _Sequence] = field(default_factory=dict)
    tokens: int = 0


class MemoryRun:
    """One run of one workload under one driver. `clock` times decisions; it never steers the run."""

    def __init__(self, workload: Workload, settings: MemorySettings, driver: Driver, clock: NanosecondClock) -> None:
        self._requests = workload.requests
        self.settings = settings
        self._driver = driver
        self._clock = clock
        self.tick_us = settings.tick_us
        self._epoch_ticks = max(1, round(settings.epoch_s * US_PER_S / self.tick_us))
        self._rate = settings.decode_tokens_per_s * self.tick_us / US_PER_S
        self._move_ticks = ceil(settings.move_s * US_PER_S / self.tick_us)
        self._growth = settings.predicted_growth
        self._gpus: dict[GpuId, _Gpu] = {}
        self._busy: dict[GpuId, _Gpu] = {}
        self._running: dict[ItemId, _Sequence] = {}
        self._ends: dict[int, list[ItemId]] = {}
        self._landings: dict[int, list[Move]] = {}
        self._waiting: deque[tuple[ItemId, Request]] = deque()
        self._tick = 0
        self._tally = Tally()
        self.series = Series()
        self.decision_ns: list[int] = []
        self.log: DecisionLog | None = None

    @property
    def _now_us(self) -> int:
        return self._tick * self.tick_us

    def run(self, until_s: float) -> Iterator[float]:
        """Simulate up to `until_s`, yielding the simulated time after each tick."""
        arrivals = iter(enumerate(self._requests))
        upcoming = next(arrivals, None)
        while self._now_us < until_s * US_PER_S:
            self._depart()
            self._land()
            self._report()
            if self._tick % self._epoch_ticks == 0:
                self._plan()
            self._relieve()
            while upcoming is not None and upcoming[1].arrival_us <= self._now_us:
                self._waiting.append((f"r{upcoming[0]}", upcoming[1]))
                upcoming = next(arrivals, None)
            self._admit()
            self._sample()
            self._tick += 1
            yield self._now_us / US_PER_S

    # --- the steps of a tick

    def _depart(self) -> None:
        for item_id in self._ends.pop(self._tick, ()):
            sequence = self._running.pop(item_id)
            self._take_off(sequence)
            self._driver.finished(item_id, self._now_us)

    def _land(self) -> None:
        for move in self._landings.pop(self._tick, ()):
            sequence = self._running.get(move.item_id)
            if sequence is not None and sequence.move is move:
                self._arrive_at(sequence, move)

    def _report(self) -> None:
        for gpu in [gpu for gpu in self._busy.values() if not gpu.sequences and not gpu.incoming]:
            del self._busy[gpu.gpu_id]
            gpu.tokens = 0
        grown = self._rate * self._tick
        for gpu in self._busy.values():
            sizes = [int(s.offset + grown) for s in gpu.sequences.values()]
            gpu.tokens = sum(sizes)
            self._driver.reported(gpu.gpu_id, list(gpu.sequences), sizes, self._now_us)

    def _plan(self) -> None:
        self._keep_spares()
        start_ns = self._clock()
        moves = self._driver.epoch(self._now_us)
        self.decision_ns.append(self._clock() - start_ns)
        for move in moves:
            self._tally.moves += 1
            self._tally.moved_tokens += move.size_blocks
            self._tally.copied_tokens += move.size_blocks
            self._record(
                "move",
                item=move.item_id,
                source=move.source,
                target=move.target,
                size=move.size_blocks,
                reason=move.reason.name.lower(),
            )
            self._start(move)

    def _start(self, move: Move) -> None:
        sequence = self._running[move.item_id]
        sequence.move = move
        if self._move_ticks == 0:
            self._arrive_at(sequence, move)
            return
        target = self._gpus[move.target]
        target.incoming[move.item_id] = sequence
        self._busy[move.target] = target
        self._landings.setdefault(self._tick + self._move_ticks, []).append(move)

    def _arrive_at(self, sequence: _Sequence, move: Move) -> None:
        self._take_off(sequence)
        self._put_on(sequence, self._gpus[move.target])
        self._driver.committed(move, self._now_us)

    def _relieve(self) -> None:
        """The worker's own allocator: over capacity it drops incoming moves, then preempts the latest."""
        capacity = self.settings.capacity_tokens
        for gpu in list(self._busy.values()):
            if gpu.tokens + self._incoming_tokens(gpu) <= capacity:
                continue
            for sequence in list(gpu.incoming.values()):
                self._drop_incoming(sequence)
            while gpu.tokens > capacity:
                self._preempt(gpu)

    def _incoming_tokens(self, gpu: _Gpu) -> int:
        return sum(self._size(sequence) for sequence in gpu.incoming.values())

    def _drop_incoming(self, sequence: _Sequence) -> None:
        move = sequence.move
        assert move is not None
        del self._gpus[move.target].incoming[sequence.item_id]
        sequence.move = None
        self._driver.failed(move, self._now_us)

    def _preempt(self, gpu: _Gpu) -> None:
        """Free the last sequence's memory and place it anew at its size; the paper charges no time for it."""
        sequence = next(reversed(gpu.sequences.values()))
        self._tally.preemptions += 1
        self._record("preempt", item=sequence.item_id, source=gpu.gpu_id)
        self._take_off(sequence)
        self._driver.finished(sequence.item_id, self._now_us)
        target = self._decide(self._item(sequence.item_id, self._size(sequence)))
        assert target is not None, "a preempted request found no GPU: raise max_gpus"
        self._put_on(sequence, self._gpus[target])

    def _admit(self) -> None:
        while self._waiting:
            item_id, request = self._waiting[0]
            gpu_id = self._decide(self._item(item_id, request.prompt_tokens))
            if gpu_id is None:
                return
            self._waiting.popleft()
            self._record("place", item=item_id, target=gpu_id, size=request.prompt_tokens)
            end = self._tick + max(1, ceil(request.output_tokens / self._rate))
            sequence = _Sequence(item_id, request.prompt_tokens - self._rate * self._tick, end, self._gpus[gpu_id])
            self._running[item_id] = sequence
            self._ends.setdefault(end, []).append(item_id)
            self._put_on(sequence, self._gpus[gpu_id])

    def _decide(self, item: Item) -> GpuId | None:
        start_ns = self._clock()
        gpu_id = self._driver.arrived(item, self._now_us)
        self.decision_ns.append(self._clock() - start_ns)
        if gpu_id is None and self._add_gpu():
            gpu_id = self._driver.arrived(item, self._now_us)
        return gpu_id

    def _item(self, item_id: ItemId, tokens: int) -> Item:
        growth = min(self._growth, self.settings.capacity_tokens - tokens)
        return Item(item_id, tokens, growth_blocks=growth)

    def _sample(self) -> None:
        series, tally = self.series, self._tally
        series.time_s.append(self._now_us / US_PER_S)
        series.gpus.append(sum(1 for gpu in self._busy.values() if gpu.sequences or gpu.incoming))
        series.tokens.append(sum(gpu.tokens for gpu in self._busy.values()))
        series.moves.append(tally.moves)
        series.moved_tokens.append(tally.moved_tokens)
        series.copied_tokens.append(tally.copied_tokens)
        series.prefilled_tokens.append(tally.prefilled_tokens)
        series.preemptions.append(tally.preemptions)
        series.waiting.append(len(self._waiting))
        self._tally = Tally()

    # --- the world's bookkeeping

    def _size(self, sequence: _Sequence) -> int:
        return int(sequence.offset + self._rate * self._tick)

    def _take_off(self, sequence: _Sequence) -> None:
        gpu = sequence.gpu
        del gpu.sequences[sequence.item_id]
        gpu.tokens -= self._size(sequence)
        if sequence.move is not None:
            self._gpus[sequence.move.target].incoming.pop(sequence.item_id, None)
            sequence.move = None

    def _put_on(self, sequence: _Sequence, gpu: _Gpu) -> None:
        sequence.gpu = gpu
        gpu.sequences[sequence.item_id] = sequence
        gpu.tokens += self._size(sequence)
        self._busy[gpu.gpu_id] = gpu

    def _keep_spares(self) -> None:
        """As many standby GPUs as a policy may want to activate in one epoch."""
        while len(self._gpus) < len(self._busy) * 5 // 4 + 8 and self._add_gpu():
            pass

    def _add_gpu(self) -> bool:
        limit = self.settings.max_gpus
        if limit is not None and len(self._gpus) >= limit:
            return False
        gpu_id = f"gpu{len(self._gpus)}"
        self._gpus[gpu_id] = _Gpu(gpu_id)
        self._driver.gpu_started(GpuSpec(gpu_id, self.settings.capacity_tokens), self._now_us)
        return True

    def _record(self, kind: str, **fields: object) -> None:
        if self.log is not None:
            self.log({"time_s": self._now_us / US_PER_S, "kind": kind, **fields})
