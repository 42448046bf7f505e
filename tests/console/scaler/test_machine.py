from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mell_console.scaler.values import Order
from tests.console.scaler.world import World, quick


class ScalerMachine(RuleBasedStateMachine):
    """Load, deaths, new leaders, failing and late starts and stops in any order.

    `World` itself asserts that nobody is stopped who is not drained and empty, and that the limits hold.
    """

    order: Order = "any"

    def __init__(self) -> None:
        super().__init__()
        self.world = World(quick(order=self.order), workers=2)

    @rule(count=st.integers(1, 12), wanted=st.none() | st.integers(0, 6))
    def time_passes(self, count: int, wanted: int | None) -> None:
        """Some statuses come with this wish."""
        self.world.wanted = wanted
        self.world.second(count)

    @rule(gap_s=st.integers(1, 60))
    def nobody_answers(self, gap_s: int) -> None:
        """No frontend, no leader."""
        self.world.now_us += gap_s * 1_000_000

    @rule(data=st.data())
    def work_comes(self, data: st.DataObject) -> None:
        """A sequence is placed on a worker, which takes it only if it does not drain."""
        free = [worker for worker in self.world.workers.values() if not worker.draining and worker.up]
        if free:
            data.draw(st.sampled_from(free)).held += 1

    @rule(data=st.data())
    def work_ends(self, data: st.DataObject) -> None:
        """A sequence ends, or moves away."""
        busy = [worker for worker in self.world.workers.values() if worker.held]
        if busy:
            data.draw(st.sampled_from(busy)).held -= 1

    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        """Its supervisor starts it again under its name."""
        if self.world.workers:
            self.world.restart(data.draw(st.sampled_from(sorted(self.world.workers))))

    @rule(settled=st.booleans(), deaf=st.booleans(), late=st.booleans())
    def the_weather_changes(self, settled: bool, deaf: bool, late: bool) -> None:
        """A new leader that does not know everybody; lost orders; slow starts."""
        self.world.settled, self.world.deaf, self.world.starts_late = settled, deaf, late

    @rule(start=st.sampled_from(["", "no GPU"]), stop=st.sampled_from(["", "no answer"]))
    def ports_break_or_mend(self, start: str, stop: str) -> None:
        """Orders to the port fail from now on, or no more."""
        self.world.start_fails, self.world.stop_fails = start, stop

    @precondition(lambda self: self.world.orders)
    @rule()
    def late_starts_come(self) -> None:
        """What was ordered long ago is done."""
        self.world.carry_out_starts()

    @invariant()
    def not_more_than_allowed(self) -> None:
        """However often something was ordered, there are never more workers than the most."""
        assert len(self.world.workers) <= self.world.limits.most

    def teardown(self) -> None:
        """In good weather the number becomes what is wanted, and nobody is left drained."""
        world = self.world
        world.settled, world.deaf, world.starts_late = True, False, False
        world.start_fails = world.stop_fails = ""
        world.carry_out_starts()
        for worker in world.workers.values():
            worker.held = 0
        for wanted in (3, 1):
            world.wanted = wanted
            world.second(600)
            assert len(world.workers) == wanted
            assert not any(worker.draining for worker in world.workers.values())


class LastMachine(ScalerMachine):
    """The same where the last by number has to go."""

    order: Order = "last"


TestAnyGoes = ScalerMachine.TestCase
TestAnyGoes.settings = settings(max_examples=60, stateful_step_count=30)
TestLastGoes = LastMachine.TestCase
TestLastGoes.settings = settings(max_examples=40, stateful_step_count=30)
