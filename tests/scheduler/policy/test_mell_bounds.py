"""What the paper proves of MELL, on random lives: invariants, the 4/3 bound, ten moves per operation.

Claimed for one model, equal GPUs, no head-room, after an epoch's moves, and up to a constant: at most one
M-GPU, one S-GPU and one T-GPU is out of order, so the constant in GPUs is 3.
"""

from collections import Counter
from itertools import product

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mell_scheduler.policy import PolicySettings, make_policy
from mell_scheduler.policy.base import GpuSpec, Item
from mell_scheduler.policy.mell.bins import Bin
from mell_scheduler.policy.mell.sizes import QUOTA, SizeClass, class_of

CAPACITY = 96
CONSTANT = 3
T, S, M, L = SizeClass
MIXTURES = {
    "any": st.integers(1, CAPACITY),
    "small": st.integers(1, 12),
    "T": st.integers(13, 24),
    "S and M": st.integers(25, 48),
    "around M and L": st.integers(40, 60),
}


def disorder(bins: list[Bin]) -> Counter[str]:
    """How many bins break each of the five invariants."""
    partners = [u for b in bins if b.cls in QUOTA for u in b.of_class(S, M)]
    t_gpu_exists = any(b.cls is T for b in bins)
    found: Counter[str] = Counter()
    for b in bins:
        if b.cls in QUOTA:
            found[b.cls.name] += len(b.of_class(b.cls)) != QUOTA[b.cls]
        if b.cls is T:
            found["T"] += not b.three_quarters_full
        if b.cls is L and not b.of_class(S, M):
            room = CAPACITY - b.of_class(L)[0].size
            found["lonely L"] += any(unit.size <= room for unit in partners)
        if t_gpu_exists and b.cls in (L, M):
            found["T beside room"] += not b.three_quarters_full
    return found


def weight(sizes: list[int]) -> float:
    """The proof's bound: max(4/3 x volume, |L| + |M|/2 + |S|/3 - p/6), p the largest L-S/M matching.

    With no T-GPU, GPUs are |L| + (|M| - m)/2 + (|S| - s)/3 where m + s >= p/2, for the matching is maximal.
    """
    by_class = {cls: sorted(size for size in sizes if class_of(size, CAPACITY) is cls) for cls in SizeClass}
    partners = sorted(by_class[M] + by_class[S])
    matched = 0
    for large in reversed(by_class[L]):
        matched += matched < len(partners) and large + partners[matched] <= CAPACITY
    shelves = len(by_class[L]) + len(by_class[M]) / 2 + len(by_class[S]) / 3 - matched / 6
    return max(4 / 3 * sum(sizes) / CAPACITY, shelves)


class MellMachine(RuleBasedStateMachine):
    """Operations in batches; after each batch an epoch, and then every claim must hold.

    A life has mostly requests of one mixture: among all sizes two T-GPUs, say, would hardly ever be short at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy("mell", PolicySettings(hold_both_ends=False))
        for index in range(80):
            self.policy.add_gpu(GpuSpec(f"g{index}", CAPACITY))
        self.sizes: dict[str, int] = {}
        self.operations = 0
        self.names = 0
        self.batch = 1
        self.mixture = MIXTURES["any"]

    @initialize(name=st.sampled_from(sorted(MIXTURES)), data=st.data())
    def begin(self, name: str, data: st.DataObject) -> None:
        """Some requests are there already."""
        self.mixture = MIXTURES[name]
        for size in data.draw(st.lists(self.mixture, max_size=15)):
            self.admit(size)

    @rule(data=st.data(), usual=st.integers(0, 3))
    def arrive(self, data: st.DataObject, usual: int) -> None:
        """A request arrives, three times in four of the life's mixture."""
        self.admit(data.draw(self.mixture if usual else MIXTURES["any"]))

    def admit(self, size: int) -> None:
        """Place it."""
        self.names += 1
        assert self.policy.allocate(Item(f"i{self.names}", size)) is not None
        self.sizes[f"i{self.names}"] = size
        self.operation()

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def depart(self, data: st.DataObject) -> None:
        """A request ends."""
        item_id = data.draw(st.sampled_from(sorted(self.sizes)))
        self.policy.depart(item_id)
        del self.sizes[item_id]
        self.operation()

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), by=st.integers(1, 12))
    def grow(self, data: st.DataObject, by: int) -> None:
        """A request grows."""
        item_id = data.draw(st.sampled_from(sorted(self.sizes)))
        self.sizes[item_id] = min(CAPACITY, self.sizes[item_id] + by)
        self.policy.update(item_id, self.sizes[item_id])
        self.operation()

    @rule(size=st.integers(1, 4))
    def resize_batch(self, size: int) -> None:
        """How many operations the next epoch plans for at once."""
        self.batch = size

    def operation(self) -> None:
        """Count it; an epoch follows each full batch."""
        self.operations += 1
        if self.operations >= self.batch:
            self.epoch()
            self.operations = 0

    def epoch(self) -> None:
        """Plan, carry out, and hold MELL to its claims."""
        before = {i: self.policy.gpu_of(i) for i in self.sizes}
        moves = self.policy.epoch(0)
        for move in moves:
            self.policy.moved(move.item_id)
        self.policy.check()
        assert self.policy.overloaded() == []
        small = {(m.source, m.target) for m in moves if 8 * m.size_blocks <= CAPACITY}
        single = [m for m in moves if 8 * m.size_blocks > CAPACITY]
        assert len(small) + len(single) <= 10 * self.operations, "more than ten moves per operation"
        assert all(self.policy.gpu_of(m.item_id) != before[m.item_id] for m in moves)
        bins = self.policy.rule.bins_in_use()  # type: ignore[attr-defined]
        assert max(disorder(bins).values(), default=0) <= max(1, self.operations), disorder(bins)
        units = [unit.size for b in bins for unit in b.units.values()]
        assert len(bins) <= weight(units) + CONSTANT


def test_mell_keeps_what_it_proves() -> None:
    """Invariants hold up to one bin each, GPUs stay within the proof's bound, moves within ten per operation."""
    case = MellMachine.TestCase
    case.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
    case("runTest").runTest()


def optimum(sizes: list[int]) -> int:
    """The fewest GPUs, by trying all ways; small sets only."""
    best = len(sizes)
    ordered = sorted(sizes, reverse=True)

    def place(at: int, loads: list[int]) -> None:
        nonlocal best
        if len(loads) >= best:
            return
        if at == len(ordered):
            best = len(loads)
            return
        for index, load in enumerate(loads):
            if load + ordered[at] <= CAPACITY and load not in loads[:index]:
                loads[index] += ordered[at]
                place(at + 1, loads)
                loads[index] -= ordered[at]
        place(at + 1, [*loads, ordered[at]])

    place(0, [])
    return best


SETS = st.lists(st.one_of(st.integers(13, CAPACITY), st.integers(25, 60)), min_size=1, max_size=11)


@settings(max_examples=150, deadline=None)
@given(SETS)
def test_the_bound_is_four_thirds_of_the_optimum(sizes: list[int]) -> None:
    """The proof's weight never exceeds 4/3 of the true optimum: brute force on small sets."""
    assert weight(sizes) <= 4 / 3 * optimum(sizes) + 1e-9


@settings(max_examples=150, deadline=None)
@given(SETS)
def test_mell_is_near_the_optimum_on_small_sets(sizes: list[int]) -> None:
    """Arrivals one by one, each with its epoch: at most 4/3 of the optimum and the constant."""
    policy = make_policy("mell", PolicySettings(hold_both_ends=False))
    for index in range(len(sizes) + 1):
        policy.add_gpu(GpuSpec(f"g{index}", CAPACITY))
    for index, size in enumerate(sizes):
        policy.allocate(Item(f"i{index}", size))
        for move in policy.epoch(0):
            policy.moved(move.item_id)
    assert policy.gpus_wanted() <= 4 / 3 * optimum(sizes) + 1.5


def test_classes_meet_at_the_papers_bounds() -> None:
    """L (C/2, C], M (C/3, C/2], S (C/4, C/3], T up to C/4, for capacities that divide or not."""
    for capacity, size in product((96, 97, 12_170), range(1, 97)):
        cls = class_of(size, capacity)
        assert (cls is L) == (size > capacity / 2)
        assert (cls is M) == (capacity / 3 < size <= capacity / 2)
        assert (cls is S) == (capacity / 4 < size <= capacity / 3)
