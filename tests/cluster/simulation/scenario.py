"""What a seed stands for: the cluster's shape, what its clients want, and what goes wrong."""

from dataclasses import dataclass, replace

from mell_frontend.generation import SequenceRequest
from mell_shared.messages.sampling import SamplingParams
from mell_shared.models import FAKE_MODEL
from tests.cluster.simulation.chance import Chance
from tests.cluster.simulation.clock import SECOND_US
from tests.cluster.simulation.faults import Fault, draw_faults

HORIZON_US = 12 * SECOND_US
"""Requests and faults begin within this time."""
POLICIES = ("repack", "repack-frugal", "mell", "load-balance", "load-balance-drain", "best-fit")


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """One worker machine; `max_model_len` in tokens."""

    node: str
    kv_blocks: int
    max_sequences: int
    max_step_tokens: int
    step_us: int
    prefix_cache: bool
    max_model_len: int = 200


@dataclass(frozen=True, slots=True)
class Wish:
    """A client's request, and when it leaves without having read all, if it does."""

    at_us: int
    frontend: str
    request: SequenceRequest
    leaves_us: int | None


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a run depends on."""

    seed: int
    policy: str
    workers: tuple[WorkerShape, ...]
    frontends: tuple[str, ...]
    schedulers: tuple[str, ...]
    wishes: tuple[Wish, ...]
    faults: tuple[Fault, ...]

    @property
    def nodes(self) -> list[str]:
        """All machines."""
        return [*(shape.node for shape in self.workers), *self.frontends, *self.schedulers]

    def only(self, faults: list[int], wishes: list[int]) -> "Scenario":
        """Return the scenario with these of its faults and wishes, by number."""
        return replace(
            self,
            faults=tuple(self.faults[number] for number in faults),
            wishes=tuple(self.wishes[number] for number in wishes),
        )


def draw(seed: int) -> Scenario:
    """Return the scenario of a seed."""
    chance = Chance(seed)
    workers = tuple(_worker(chance, f"w{number + 1}") for number in range(chance.between(2, 4, "workers")))
    frontends = tuple(f"f{number + 1}" for number in range(chance.between(1, 2, "frontends")))
    schedulers = ("s1", "s2")
    wishes = tuple(_wish(chance, number, frontends) for number in range(chance.between(4, 30, "wishes")))
    nodes = [*(shape.node for shape in workers), *frontends, *schedulers]
    faults = tuple(draw_faults(chance, nodes, HORIZON_US))
    policy = POLICIES[chance.between(0, len(POLICIES) - 1, "policy")]
    return Scenario(seed, policy, workers, frontends, schedulers, wishes, faults)


def _worker(chance: Chance, node: str) -> WorkerShape:
    max_sequences = chance.between(2, 8, node, "sequences")
    return WorkerShape(
        node=node,
        kv_blocks=chance.between(12, 48, node, "blocks"),
        max_sequences=max_sequences,
        max_step_tokens=chance.between(max_sequences, 64, node, "step tokens"),
        step_us=chance.between(5_000, 60_000, node, "step"),
        prefix_cache=chance.happens(0.8, node, "prefix cache"),
    )


def _wish(chance: Chance, number: int, frontends: tuple[str, ...]) -> Wish:
    name = f"r{number}"

    def between(low: int, high: int, what: str) -> int:
        return chance.between(low, high, name, what)

    at_us = between(3 * SECOND_US, HORIZON_US, "at")
    # A few beginnings are shared, so that prefix caches have something to share.
    beginning = between(0, 2, "beginning")
    shared = [chance.between(97, 122, "beginning", beginning, place) for place in range(between(0, 24, "shared"))]
    # Two letters only, for some: equal blocks after different beginnings.
    letters = between(98, 122, "letters") if chance.happens(0.6, name, "varied") else 98
    own = [between(97, letters, f"own {place}") for place in range(between(1, 30, "own"))]
    sampling = SamplingParams(
        seed=between(0, 1 << 40, "seed"),
        choice=between(0, 2, "choice"),
        max_tokens=between(1, 60, "tokens") if chance.happens(0.9, name, "limited") else None,
        ignore_eos=chance.happens(0.5, name, "ignores eos"),
        temperature=float(chance.happens(0.8, name, "warm")),
        logprobs=2 if chance.happens(0.15, name, "logprobs") else None,
    )
    leaves_us = at_us + between(0, 4 * SECOND_US, "stay") if chance.happens(0.2, name, "leaves") else None
    request = SequenceRequest(name, FAKE_MODEL, [*shared, *own], sampling, priority=between(0, 1, "priority"))
    return Wish(at_us, frontends[between(0, len(frontends) - 1, "frontend")], request, leaves_us)
