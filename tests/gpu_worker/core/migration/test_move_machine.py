from collections import deque

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mell_gpu_worker.core.events import CommandReceived, ConnectionLost, ConnectionRestored, StopRequested
from mell_shared.messages.worker import Drain, Undrain

from .cluster import ALL_MODES, Cluster, Reader
from .network import MS_US, Flight, Verdict

WORKERS = ("w1", "w2", "w3")
BEGINNING = bytes(range(97, 123)) * 2


class MoveMachine(RuleBasedStateMachine):
    """Clients, moves, pressure, faults and deaths in any order; every core is checked after every event."""

    @initialize(kv_blocks=st.integers(24, 40), max_step_tokens=st.sampled_from([8, 32]), cache=st.booleans())
    def build(self, kv_blocks: int, max_step_tokens: int, cache: bool) -> None:
        """Three small workers."""
        self.verdicts: deque[Verdict] = deque()
        self.cluster = Cluster(
            self.plan, WORKERS, kv_blocks=kv_blocks, max_step_tokens=max_step_tokens, prefix_cache=cache
        )
        self.gone: list[Reader] = []
        self.killed = False

    def plan(self, _: Flight) -> Verdict:
        """Faults are queued by the rules; what is beyond them arrives."""
        return self.verdicts.popleft() if self.verdicts else "deliver"

    @precondition(lambda self: len(self.cluster.readers) < 5)
    @rule(
        prompt=st.integers(1, 50),
        tokens=st.integers(1, 90),
        worker=st.sampled_from(WORKERS),
        logprobs=st.sampled_from([None, 0, 2]),
        priority=st.integers(0, 1),
    )
    def open(self, prompt: int, tokens: int, worker: str, logprobs: int | None, priority: int) -> None:
        """A client comes."""
        name = f"s{len(self.cluster.readers) + len(self.gone)}"
        self.cluster.place = lambda _: worker
        most = self.cluster.nodes[worker].core.config.spec.max_total_tokens
        sampling = {
            "max_tokens": min(tokens, most - prompt),
            "logprobs": logprobs,
            "ignore_eos": bool(tokens % 2),
            "seed": prompt,
        }
        self.cluster.open(name, BEGINNING[:prompt], priority, **sampling)

    @precondition(lambda self: self.cluster.readers)
    @rule(which=st.integers(0, 9), to=st.sampled_from(WORKERS), mode=st.sampled_from(ALL_MODES))
    def migrate(self, which: int, to: str, mode: str) -> None:
        """Somebody is moved, wherever it is, to wherever it may be already."""
        names = list(self.cluster.readers)
        self.cluster.migrate(names[which % len(names)], to, mode, split_tokens=4 * which)

    @rule(skip=st.integers(0, 6), verdict=st.sampled_from(["lose", "repeat", "delay", "delay long", "cut", "corrupt"]))
    def disturb(self, skip: int, verdict: Verdict) -> None:
        """One of the next messages or transfers is disturbed."""
        self.verdicts.extend(["deliver"] * skip)
        self.verdicts.append(verdict)

    @rule(after_us=st.sampled_from([1, 3, 10, 30, 100, 1500]))
    def wait(self, after_us: int) -> None:
        """Time passes."""
        self.cluster.run_for(after_us * MS_US)

    @precondition(lambda self: self.cluster.readers)
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        """A client leaves."""
        names = list(self.cluster.readers)
        name = names[which % len(names)]
        self.cluster.close(name)
        self.gone.append(self.cluster.readers.pop(name))

    @rule(worker=st.sampled_from(WORKERS), on=st.booleans())
    def drain(self, worker: str, on: bool) -> None:
        """A worker takes nothing new, or again."""
        order = Drain(term=1, deadline_s=None) if on else Undrain(term=1)
        self.cluster.nodes[worker].tell(CommandReceived(order))

    @rule(worker=st.sampled_from(WORKERS))
    def reconnect(self, worker: str) -> None:
        """A worker's connection goes and comes."""
        self.cluster.nodes[worker].tell(ConnectionLost())
        self.cluster.nodes[worker].tell(ConnectionRestored())

    @precondition(lambda self: not self.killed)
    @rule(worker=st.sampled_from(WORKERS), kindly=st.booleans())
    def end(self, worker: str, kindly: bool) -> None:
        """One worker, no more, stops or dies."""
        self.killed = True
        if kindly:
            self.cluster.nodes[worker].tell(StopRequested())
        else:
            self.cluster.kill(worker)

    @invariant()
    def texts_are_right(self) -> None:
        """Every client has got a beginning of its only possible text."""
        for reader in [*self.cluster.readers.values(), *self.gone] if hasattr(self, "cluster") else []:
            self.cluster.check_text(reader)

    def teardown(self) -> None:
        """Left alone, everybody is served to the end, and nothing is left anywhere."""
        if not hasattr(self, "cluster"):
            return
        self.verdicts.clear()
        for worker in WORKERS:
            self.cluster.nodes[worker].tell(CommandReceived(Undrain(term=1)))
        self.cluster.finish(failures=True)


MoveMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestMoveMachine = MoveMachine.TestCase
