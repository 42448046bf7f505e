import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.frontend.stream.world import Worker, World, queue, reject

PLACE = st.integers(0, 1000)


class Adversary(RuleBasedStateMachine):
    """Every accepted token comes once and in order, no generation has two owners, and all sequences end."""

    @initialize()
    def begin(self) -> None:
        """Have a world with two sequences that stream."""
        self.world = World()
        for _ in range(2):
            self.world.open()
        for _ in range(4):
            self.world.arrive_all()

    def worker(self, place: int) -> Worker:
        """Return one of the living workers."""
        return self.world.alive[place % 3]

    @rule()
    def open(self) -> None:
        """Open another sequence."""
        if len(self.world.readers) < 6:
            self.world.open()

    @rule(place=PLACE)
    def close(self, place: int) -> None:
        """Let a reader leave, perhaps one whose sequence has ended."""
        names = list(self.world.readers)
        if place % 4 == 0:
            self.world.close(names[place % len(names)])

    @rule(places=st.lists(PLACE, min_size=1, max_size=8))
    def deliver(self, places: list[int]) -> None:
        """Let messages arrive in any order."""
        for place in places:
            self.world.deliver(place)

    @rule(rounds=st.integers(1, 4))
    def arrive(self, rounds: int) -> None:
        """Let all that is under way arrive, and what follows from it."""
        for _ in range(rounds):
            self.world.arrive_all()

    @rule(place=PLACE)
    def repeat(self, place: int) -> None:
        """Let a message arrive that will arrive again."""
        self.world.repeat(place)

    @rule(place=PLACE)
    def hold(self, place: int) -> None:
        """Let others overtake a message."""
        self.world.hold(place)

    @rule(place=PLACE)
    def deliver_late(self, place: int) -> None:
        """Let a message arrive that others have overtaken."""
        self.world.deliver_late(place)

    @rule(place=PLACE)
    def lose(self, place: int) -> None:
        """Lose a message."""
        self.world.lose(place)

    @rule()
    def lose_all(self) -> None:
        """Lose everything that is under way."""
        self.world.flights.clear()

    @rule(place=PLACE)
    def time_out(self, place: int) -> None:
        """Let an ask fail."""
        self.world.time_out(place)

    @rule(step_us=st.sampled_from([50_000, 300_000, 1_000_000, 3_000_000]))
    def tick(self, step_us: int) -> None:
        """Let time pass."""
        self.world.tick(step_us)

    @rule(place=PLACE, count=st.sampled_from([1, 1, 2, 12]))
    def step(self, place: int, count: int) -> None:
        """Let a worker make tokens."""
        self.world.step(self.worker(place), count)

    @rule(place=PLACE)
    def tell_status(self, place: int) -> None:
        """Let a worker tell the state of its streams."""
        self.world.tell_status(self.worker(place))

    @rule(place=PLACE, lag=st.integers(0, 2))
    def move(self, place: int, lag: int) -> None:
        """Let a worker copy a sequence from another and claim it."""
        source, target = self.worker(place), self.worker(place + 1)
        running = [name for name, held in source.held.items() if held.finish is None and name not in target.held]
        if running:
            self.world.copy_to(source, target, running[place % len(running)], lag)

    @rule(place=PLACE)
    def repeat_claim(self, place: int) -> None:
        """Let a target ask again."""
        self.world.repeat_claim(self.worker(place), place)

    @rule(place=PLACE, other=st.integers(1, 2))
    def abort(self, place: int, other: int) -> None:
        """Let a source take its offer back."""
        self.world.abort(self.worker(place), self.worker(place + other), place)

    @rule(place=PLACE)
    def evict(self, place: int) -> None:
        """Let a worker give a sequence up."""
        worker = self.worker(place)
        running = [name for name, held in worker.held.items() if held.finish is None]
        if running:
            self.world.evict(worker, running[place % len(running)])

    @rule(place=PLACE)
    def kill(self, place: int) -> None:
        """End a worker."""
        self.world.kill(self.worker(place))

    @rule(place=PLACE, full=st.booleans())
    def fill(self, place: int, full: bool) -> None:
        """Let a worker refuse submissions, or take them again."""
        self.worker(place).full = full

    @rule(mind=st.sampled_from(["anywhere", "stubborn", "queue", "reject"]))
    def decide(self, mind: str) -> None:
        """Let the scheduler be of that mind from now on."""
        minds = {"stubborn": self.world.place_stubbornly, "queue": queue, "reject": reject}
        self.world.decide = minds.get(mind, self.world.place_anywhere)

    @precondition(lambda self: self.world.connected)
    @rule()
    def disconnect(self) -> None:
        """Cut the frontend off."""
        self.world.disconnect()

    @precondition(lambda self: not self.world.connected)
    @rule()
    def reconnect(self) -> None:
        """End that."""
        self.world.reconnect()

    @invariant()
    def readers_have_the_right_tokens(self) -> None:
        """Nothing twice, nothing missing, nothing from anybody but the owner."""
        self.world.check()

    def teardown(self) -> None:
        """Let everything come to its end."""
        self.world.heal()
        self.world.check()


Adversary.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestAdversary = Adversary.TestCase

# What happens how often in a long walk: mostly work and delivery, so that sequences get far, and misfortune between.
WEIGHTS = {
    "arrive": 30,
    "step": 20,
    "deliver": 20,
    "tick": 6,
    "tell_status": 8,
    "open": 6,
    "close": 2,
    "hold": 8,
    "deliver_late": 6,
    "repeat": 4,
    "lose": 4,
    "lose_all": 1,
    "time_out": 2,
    "move": 6,
    "repeat_claim": 3,
    "abort": 3,
    "evict": 3,
    "kill": 1,
    "fill": 1,
    "decide": 2,
    "cut": 1,
}


class Walk:
    """A long run of an adversary's rules, drawn by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.adversary = Adversary()
        self.adversary.begin()

    def run(self, steps: int) -> World:
        """Take so many steps, then let everything come to its end."""
        world = self.adversary.world
        for action in self._random.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=steps):
            self._act(action, self._random.randrange(1001))
            world.check()
        if world.late:
            world.late = self._random.sample(world.late, len(world.late) // 2)
        self.adversary.teardown()
        return world

    def _act(self, action: str, place: int) -> None:
        rules, draw = self.adversary, self._random.choice
        special: dict[str, Callable[[], None]] = {
            "arrive": lambda: rules.arrive(1),
            "step": lambda: rules.step(place, draw([1, 1, 2, 12])),
            "deliver": lambda: rules.deliver([place, place // 2]),
            "tick": lambda: rules.tick(draw([50_000, 300_000, 1_000_000, 3_000_000])),
            "open": self._open,
            "move": lambda: rules.move(place, draw([0, 0, 1])),
            "abort": lambda: rules.abort(place, 1 + place % 2),
            "fill": lambda: rules.fill(place, place % 3 == 0),
            "decide": lambda: rules.decide(draw(["anywhere", "anywhere", "stubborn", "queue", "reject"])),
            "cut": lambda: rules.disconnect() if rules.world.connected else rules.reconnect(),
            "lose_all": rules.lose_all,
        }
        special.get(action, lambda: getattr(rules, action)(place))()

    def _open(self) -> None:
        if self.adversary.world.core.open_sequences < 6:
            self.adversary.world.open()


def test_long_walks_through_misfortune_lose_and_repeat_nothing() -> None:
    """Every reader of many long runs gets its text exactly, and each way that mends something was needed."""
    taken: Counter[str] = Counter()
    for seed in range(60):
        taken.update(asdict(Walk(seed).run(400).core.stats))
    assert all(taken.values()), taken
