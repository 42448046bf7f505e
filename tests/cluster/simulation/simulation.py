"""A run: builds the cluster of a scenario, lets it live through its faults, then waits until all is at rest."""

from functools import partial
from typing import assert_never

from mell_scheduler.settings import SchedulerSettings
from mell_shared.messages.worker import Migrate
from mell_shared.models import FAKE_EOS_ID, FAKE_MODEL, FAKE_VOCAB_SIZE
from tests.cluster.simulation.chance import Chance
from tests.cluster.simulation.clock import SECOND_US, EventQueue, LocalClock
from tests.cluster.simulation.faults import (
    BrokerGone,
    Corruption,
    Crash,
    Drain,
    EngineBreak,
    Fault,
    LinkCut,
    Partition,
    Pause,
    Shove,
    Slowness,
    Stop,
    TwoLeaders,
    Weather,
    end_us,
)
from tests.cluster.simulation.frontend import FrontendProcess
from tests.cluster.simulation.judge import Judge
from tests.cluster.simulation.lease_store import LeaseStore
from tests.cluster.simulation.links import Links
from tests.cluster.simulation.network import Network
from tests.cluster.simulation.process import Process
from tests.cluster.simulation.scenario import HORIZON_US, Scenario, Wish, WorkerShape
from tests.cluster.simulation.scheduler import SchedulerProcess
from tests.cluster.simulation.surroundings import Surroundings
from tests.cluster.simulation.worker import WorkerProcess
from tests.gpu_worker.core.worlds import worker_config

REST_US = 90 * SECOND_US
"""So long after the last fault everything must be at rest."""
_DEAD_CONNECTION_US = 5 * SECOND_US
"""A process that does not answer pings for so long loses its connection."""
_GHOST_US = 5 * SECOND_US
"""So long the broker goes on believing in a process whose machine died."""
_LONGEST_DRIFT_PPM = 500


class Simulation:
    """One cluster. `run` plays the scenario to its end; an `AssertionError` is what it is there to find."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.queue = EventQueue()
        self.chance = Chance(scenario.seed)
        self.network = Network(self.queue, self.chance)
        self.links = Links(self.queue, self.chance, self.network.conditions)
        longest = max(min(s.max_model_len, s.kv_blocks * 4) for s in scenario.workers)
        self.judge = Judge(self.queue, longest)
        self.processes: dict[str, Process] = {}
        """The present incarnation on each machine."""
        self._store = LeaseStore(self.queue)
        self._around = Surroundings(self.network, self.links, self._store, self.judge)
        self._shapes = {shape.node: shape for shape in scenario.workers}
        self._incarnations: dict[str, int] = {}
        self._shoves = 0
        self._settings = SchedulerSettings(policy=scenario.policy, cooldown_epochs=2)

    def run(self) -> None:
        """Play the whole scenario."""
        for node in self.scenario.nodes:
            self._start(node)
        for wish in self.scenario.wishes:
            self.queue.at(wish.at_us, partial(self._open, wish))
        for fault in self.scenario.faults:
            self.queue.at(fault.at_us, partial(self._begin, fault))
        faults_end_us = max([HORIZON_US, *(end_us(fault) for fault in self.scenario.faults)])
        while self.queue.now_us < faults_end_us:
            self.queue.step()
        while not self.at_rest():
            assert self.queue.now_us < faults_end_us + REST_US, f"no rest: {'; '.join(self.unrest())}"
            until_us = self.queue.now_us + SECOND_US
            while self.queue.now_us < until_us:
                self.queue.step()

    # --- processes

    def _start(self, node: str) -> None:
        number = self._incarnations[node] = self._incarnations.get(node, 0) + 1
        name = f"{node}-{number}"
        process = self._make(node, name)
        self.processes[node] = process
        self.judge.story.happened(f"{name} starts")
        process.start()

    def _make(self, node: str, name: str) -> WorkerProcess | FrontendProcess | SchedulerProcess:
        offset_us = self.chance.between(0, 1 << 40, node, "clock")
        drift_ppm = self.chance.between(-_LONGEST_DRIFT_PPM, _LONGEST_DRIFT_PPM, node, "drift")
        clock = LocalClock(self.queue, offset_us, drift_ppm)
        if node in self._shapes:
            return self._worker(self._shapes[node], name, clock)
        if node in self.scenario.frontends:
            return FrontendProcess(node, name, clock, self._around)
        return SchedulerProcess(node, name, clock, self._around, self._settings)

    def _worker(self, shape: WorkerShape, name: str, clock: LocalClock) -> WorkerProcess:
        config = worker_config(
            worker=name, name=shape.node, host=shape.node, model=FAKE_MODEL, kv_blocks=shape.kv_blocks,
            max_model_len=shape.max_model_len, max_sequences=shape.max_sequences, vocab_size=FAKE_VOCAB_SIZE,
            eos_token_ids=(FAKE_EOS_ID,), max_step_tokens=shape.max_step_tokens, prefix_cache=shape.prefix_cache,
            migration_modes=("kv", "tokens", "hybrid"),
        )  # fmt: skip
        return WorkerProcess(shape.node, clock, self._around, config, shape.step_us)

    def _die(self, node: str, *, quietly: bool, back_us: int) -> None:
        process = self.processes[node]
        process.die()
        if isinstance(process, FrontendProcess):
            self._lose_readers(process.node)
        if isinstance(process, WorkerProcess):
            self.links.die(process)
        self.queue.after(_GHOST_US if quietly else 0, partial(self.network.forget, process))
        self.queue.after(back_us, partial(self._start_again, process))

    def _start_again(self, process: Process) -> None:
        if self.processes[process.node] is process:
            self._start(process.node)

    def _lose_readers(self, node: str) -> None:
        for name, reader in self.judge.readers.items():
            if reader.node == node:
                self.judge.closed(name, "lost its frontend")

    # --- clients

    def _open(self, wish: Wish) -> None:
        process = self.processes[wish.frontend]
        if not process.alive:
            return
        assert isinstance(process, FrontendProcess)
        self.judge.opened(wish.request, wish.frontend)
        process.open(wish.request)
        if wish.leaves_us is not None:
            self.queue.at(wish.leaves_us, partial(process.take, partial(self._close, process, wish.request.sequence)))

    def _close(self, process: FrontendProcess, sequence: str) -> None:
        if not self.judge.readers[sequence].end:
            self.judge.closed(sequence, "left")
            process.close(sequence)

    # --- faults

    def _begin(self, fault: Fault) -> None:
        self.judge.story.happened(f"fault: {fault}")
        match fault:
            case Crash(_, node, back_us, quietly):
                if self.processes[node].alive:
                    self._die(node, quietly=quietly, back_us=back_us)
            case Stop(_, node, back_us) | EngineBreak(_, node, back_us):
                self._end_worker(node, back_us, broken=isinstance(fault, EngineBreak))
            case Drain():
                self._drain(fault)
            case Pause():
                self._pause(fault)
            case Slowness():
                self._slow_down(fault)
            case Weather() | Partition() | BrokerGone():
                self._disturb(fault)
            case TwoLeaders():
                self._double_leaders(fault)
            case Shove():
                self._shove(fault)
            case LinkCut(_, node):
                self.links.cut(node)
            case Corruption(_, node):
                self.links.corrupting.add(node)
            case _:
                assert_never(fault)

    def _end_worker(self, node: str, back_us: int, *, broken: bool) -> None:
        process = self.processes[node]
        assert isinstance(process, WorkerProcess)
        if not process.alive:
            return
        if broken:
            process.engine_broken = True
        else:
            process.ask_to_stop()
        self._restart_when_gone(process, back_us)

    def _restart_when_gone(self, process: WorkerProcess, back_us: int) -> None:
        if self.processes[process.node] is not process or (not process.alive and not process.exited):
            return  # it crashed meanwhile
        if process.exited:
            self.queue.after(back_us, partial(self._start_again, process))
        else:
            self.queue.after(SECOND_US // 10, partial(self._restart_when_gone, process, back_us))

    def _drain(self, fault: Drain) -> None:
        self._order_drain(fault, over=False)
        self.queue.after(fault.for_us, partial(self._undrain, fault, self.processes[fault.node]))

    def _undrain(self, fault: Drain, process: Process) -> None:
        """Order until it is obeyed, as an operator would."""
        assert isinstance(process, WorkerProcess)
        if process.alive and self.processes[fault.node] is process and process.core.draining:
            self._order_drain(fault, over=True)
            self.queue.after(SECOND_US, partial(self._undrain, fault, process))

    def _order_drain(self, fault: Drain, *, over: bool) -> None:
        leaders = [p for p in self.processes.values() if isinstance(p, SchedulerProcess) and p.alive and p.core]
        for leader in leaders:
            leader.take(partial(leader.drain, self.processes[fault.node].name, fault.deadline_s, over=over))

    def _shove(self, fault: Shove) -> None:
        workers = [p for p in self.processes.values() if isinstance(p, WorkerProcess) and p.alive]
        leaders = [p for p in self.processes.values() if isinstance(p, SchedulerProcess) and p.alive and p.core]
        loaded = [worker for worker in workers if worker.core.batcher.running]
        if not loaded or not leaders:
            return
        source = loaded[fault.source % len(loaded)]
        running = source.core.batcher.running
        sequence = running[fault.sequence % len(running)]
        self._shoves += 1
        order = Migrate(
            migration=f"shove-{self._shoves}",
            sequence=sequence.sequence,
            generation=max(1, sequence.generation - fault.stale),
            target=workers[fault.target % len(workers)].name,
            mode=fault.mode,
            split_tokens=4 * fault.split_blocks if fault.mode == "hybrid" else 0,
            reason="manual",
            term=leaders[0].term,
        )
        leaders[0].take(partial(leaders[0].shove, source.name, order))

    def _pause(self, fault: Pause) -> None:
        process = self.processes[fault.node]
        if not process.alive or process.paused:
            return
        process.stop()
        if fault.for_us > _DEAD_CONNECTION_US:
            self.queue.after(_DEAD_CONNECTION_US, partial(self.network.drop, process))
        self.queue.after(fault.for_us, process.resume)

    def _slow_down(self, fault: Slowness) -> None:
        process = self.processes[fault.node]
        assert isinstance(process, WorkerProcess)
        process.slowness = fault.factor

        def recover() -> None:
            process.slowness = 1

        self.queue.after(fault.for_us, recover)

    def _disturb(self, fault: Weather | Partition | BrokerGone) -> None:
        conditions = self.network.conditions
        match fault:
            case Weather(_, _, loss, repeat, delay_us):
                conditions.loss, conditions.repeat, conditions.delay_us = loss, repeat, delay_us
            case Partition(_, _, one, other):
                conditions.apart.append(frozenset((one, other)))
                self.links.cut(one, other)
            case BrokerGone():
                if not conditions.broker_up:
                    return
                self.network.break_down()
        self.queue.after(fault.for_us, partial(self._calm, fault))

    def _calm(self, fault: Weather | Partition | BrokerGone) -> None:
        conditions = self.network.conditions
        match fault:
            case Weather():
                conditions.loss, conditions.repeat, conditions.delay_us = 0.0, 0.0, 0
            case Partition(_, _, one, other):
                conditions.apart.remove(frozenset((one, other)))
            case BrokerGone():
                self.network.come_back()

    def _double_leaders(self, fault: TwoLeaders) -> None:
        self._store.wipe()
        for process in self.processes.values():
            if isinstance(process, SchedulerProcess) and process.core is not None and not process.stubborn:
                process.stubborn = True
                self.queue.after(fault.for_us, partial(setattr, process, "stubborn", False))

    # --- rest

    def at_rest(self) -> bool:
        """Whether every request has ended and nothing is held anywhere."""
        return not self.unrest()

    def unrest(self) -> list[str]:
        """Return what is not at rest."""
        found = [f"{name} has not ended" for name, reader in self.judge.readers.items() if not reader.end]
        alive = {process.name for process in self.processes.values() if process.alive}
        for process in self.processes.values():
            if isinstance(process, SchedulerProcess) and process.core is not None:
                found += [f"{process.node}: knows {w}" for w in process.core.ledger.workers if w not in alive]
        for node, process in self.processes.items():
            found += [f"{node}: {what}" for what in _unrest(process)]
        return found


def _unrest(process: Process) -> list[str]:
    if not process.alive:
        return ["is not back"]
    match process:
        case WorkerProcess(core=core):
            counts = {
                "streams": len(core.streams),
                "blocks": core.batcher.pool.used_blocks,
                "moves": int(bool(core.moves)),
                "transfers": int(process.links.lent(process)),
            }
            return [f"keeps {count} {what}" for what, count in counts.items() if count]
        case FrontendProcess(core=core):
            return [f"has {core.open_sequences} open sequences"] if core.open_sequences else []
        case SchedulerProcess(core=core) if core is not None:
            counts = {
                "queued": len(core.waiting),
                "charged": len(core.ledger.sequences),
                "moving": len(core.ledger.moving),
            }
            return [f"{count} sequences are {what}" for what, count in counts.items() if count]
    return []
