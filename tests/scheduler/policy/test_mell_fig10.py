"""Each line of Fig. 10, and each mend, by hand. GPUs of 120 blocks: T to 30, S to 40, M to 60, L above; small to 15."""

import pytest

from mell_scheduler.policy import Policy, PolicySettings, make_policy
from mell_scheduler.policy.base import GpuSpec, GpuState, Item, PriorityWeights

Steps = list[tuple[str, str, str]]
"""(item, source, target), sorted."""


def cluster(*gpus: dict[str, int], hold: bool = False) -> Policy:
    """MELL over GPUs g0, g1, ... holding these items, activated in this order; four more stand by."""
    policy = make_policy("mell", PolicySettings(hold_both_ends=hold))
    for index in range(len(gpus) + 4):
        policy.add_gpu(GpuSpec(f"g{index}", 120))
    for index, items in enumerate(gpus):
        for item_id, size in items.items():
            policy.place(Item(item_id, size), f"g{index}")
    return policy


def settled(*gpus: dict[str, int]) -> Policy:
    """A cluster that is in order: its first epoch moves nothing."""
    policy = cluster(*gpus)
    assert epoch(policy) == []
    return policy


def epoch(policy: Policy) -> Steps:
    """Plan, commit everything, check."""
    moves = policy.epoch(0)
    for move in moves:
        policy.moved(move.item_id)
    policy.check()
    assert policy.overloaded() == []
    return sorted((move.item_id, move.source, move.target) for move in moves)


class TestAllocate:
    """Fig. 10, Allocate."""

    def test_t_goes_to_the_best_l_gpu(self) -> None:
        """A T goes to the L-GPU with most free memory and fewest requests, at once."""
        policy = settled({"l1": 90}, {"l2": 70, "m": 45}, {"l3": 85})
        assert policy.allocate(Item("t", 20)) == "g2"
        assert epoch(policy) == []

    def test_t_goes_to_an_m_gpu_where_no_l_gpu_has_room(self) -> None:
        """Mend: else a T-GPU could exist beside an M-GPU that is not full."""
        policy = settled({"l": 115}, {"m1": 45, "m2": 41})
        assert policy.allocate(Item("t", 20)) == "g1"
        assert epoch(policy) == []

    def test_t_goes_to_the_latest_t_gpu(self) -> None:
        """A T that fits on no L- or M-GPU goes to the most recently activated T-GPU, else to a new one."""
        policy = settled({"l": 115}, {"t1": 30, "t2": 30, "t3": 30, "t4": 29}, {"t5": 30})
        assert policy.allocate(Item("t6", 25)) == "g2"
        for name in ("t7", "t8"):
            assert policy.allocate(Item(name, 30)) == "g2"
        assert policy.allocate(Item("t9", 30)) == "g3"
        assert epoch(policy) == []

    def test_m_goes_beside_an_l(self) -> None:
        """An M goes to an L-GPU whose L leaves room."""
        policy = settled({"l1": 90}, {"l2": 65})
        assert policy.allocate(Item("m", 50)) == "g1"
        assert epoch(policy) == []

    def test_ts_make_room_for_an_m_beside_an_l(self) -> None:
        """T's that no longer fit beside the M are re-allocated; this waits for the epoch."""
        policy = settled({"l": 65, "t1": 20, "t2": 25})
        assert policy.allocate(Item("m", 50)) == "g1"
        assert epoch(policy) == [("m", "g1", "g0"), ("t1", "g0", "g1"), ("t2", "g0", "g1")]

    @pytest.mark.parametrize(("size", "quota"), [(45, 2), (35, 3)])
    def test_s_and_m_fill_the_latest_of_their_class(self, size: int, quota: int) -> None:
        """M-GPUs take two, S-GPUs three; then a new one is activated."""
        policy = settled({"l": 100})
        placed = [policy.allocate(Item(f"i{n}", size)) for n in range(quota + 1)]
        assert placed == ["g1"] * quota + ["g2"]
        assert epoch(policy) == []

    def test_l_opens_a_gpu_and_pulls_an_m(self) -> None:
        """A new L pulls in an S or M that fits, and the GPU it left is refilled from the latest of its class."""
        policy = settled({"m1": 59, "m2": 50}, {"m3": 58, "m4": 57})
        assert policy.allocate(Item("l", 70)) == "g2"
        assert epoch(policy) == [("m2", "g0", "g2"), ("m3", "g1", "g0")]

    def test_l_without_a_partner_takes_ts(self) -> None:
        """Mend: with no S or M that fits, a new L takes T's until it is three quarters full."""
        policy = settled({"t1": 30, "t2": 30, "t3": 30, "t4": 30}, {"t5": 25})
        assert policy.allocate(Item("l", 70)) == "g2"
        assert epoch(policy) == [("t5", "g1", "g2")]
        assert policy.state("g1") is GpuState.STANDBY


class TestPriority:
    """Among GPUs that would do: fewer requests, more free memory, nearer (§VI-C)."""

    @pytest.mark.parametrize(("distance", "target"), [(0.1, "near"), (0.0, "far")])
    def test_a_move_stays_near(self, distance: float, target: str) -> None:
        """When an L departs, what was beside it goes to the L-GPU of its own machine, unless distance weighs nothing.

        The far one has 2 blocks of 120 more free memory: less than the weight of distance.
        """
        weights = PriorityWeights(distance=distance)
        policy = make_policy("mell", PolicySettings(hold_both_ends=False, priority=weights))
        for gpu_id, host in (("source", "h1"), ("near", "h1"), ("far", "h2")):
            policy.add_gpu(GpuSpec(gpu_id, 120, host=host))
        for item, gpu_id in ((Item("l", 70), "source"), (Item("t", 20), "source")):
            policy.place(item, gpu_id)
        policy.place(Item("l1", 82), "near")
        policy.place(Item("l2", 80), "far")
        assert epoch(policy) == []
        policy.depart("l")
        assert epoch(policy) == [("t", "source", target)]


class TestDepart:
    """Fig. 10, Depart."""

    def test_from_the_latest_gpu_only_remove(self) -> None:
        """The most recently activated of a class may stay short."""
        policy = settled({"m1": 45, "m2": 45}, {"m3": 45, "m4": 45})
        policy.depart("m3")
        assert epoch(policy) == []

    def test_t_is_backfilled(self) -> None:
        """A T-GPU that falls below three quarters takes T's from the latest T-GPU."""
        policy = settled({"t1": 30, "t2": 30, "t3": 30, "t4": 30}, {"t5": 20, "t6": 25})
        policy.depart("t1")
        assert epoch(policy) == []
        policy.depart("t2")
        assert epoch(policy) == [("t5", "g1", "g0"), ("t6", "g1", "g0")]

    def test_m_is_backfilled_from_the_latest(self) -> None:
        """An M-GPU short of one takes it from the latest M-GPU."""
        policy = settled({"m1": 45, "m2": 45}, {"m3": 45, "m4": 46})
        policy.depart("m1")
        assert epoch(policy) == [("m4", "g1", "g0")]

    def test_ts_left_alone_are_reallocated(self) -> None:
        """When the latest M-GPU gives its last M, the T's there go elsewhere and it is released."""
        policy = settled({"m1": 45, "m2": 45}, {"m3": 45, "t": 20})
        policy.depart("m1")
        assert epoch(policy) == [("m3", "g1", "g0"), ("t", "g1", "g0")]
        assert policy.state("g1") is GpuState.STANDBY

    def test_an_l_gpu_pulls_in_another(self) -> None:
        """When the M beside an L departs, another that fits comes, and the GPU it left is refilled."""
        policy = settled({"l": 70, "m0": 45}, {"m1": 55, "m2": 48}, {"m3": 52, "m4": 53})
        policy.depart("m0")
        assert epoch(policy) == [("m2", "g1", "g0"), ("m4", "g2", "g1")]

    def test_when_an_l_departs_all_else_is_reallocated(self) -> None:
        """What was beside it goes where it would go as an arrival; the GPU is released."""
        policy = settled({"l1": 70, "m1": 45}, {"l2": 75}, {"l3": 100, "t": 20})
        policy.depart("l1")
        assert epoch(policy) == [("m1", "g0", "g1")]
        assert policy.state("g0") is GpuState.STANDBY

    def test_the_last_item_releases_its_gpu(self) -> None:
        """An idle GPU is released at once."""
        policy = settled({"l1": 70})
        policy.depart("l1")
        assert policy.state("g0") is GpuState.STANDBY
        assert epoch(policy) == []


class TestUpdate:
    """Fig. 10, Update, and growth that the paper leaves out."""

    def test_t_grown_to_s_is_reallocated(self) -> None:
        """Out of a T-GPU it goes beside an L that has room, and the T-GPU is backfilled."""
        policy = settled({"l": 80, "t0": 20}, {"t1": 30, "t2": 30, "t3": 30, "t4": 30}, {"t5": 28, "t6": 29})
        policy.update("t1", 31)
        steps = epoch(policy)
        assert ("t1", "g1", "g0") in steps
        assert policy.used_blocks("g1") >= 90

    def test_t_grown_to_s_stays_where_it_belongs(self) -> None:
        """Beside an L without an S or M it is right already: never there and back."""
        policy = settled({"l": 70, "t": 30})
        policy.update("t", 35)
        assert epoch(policy) == []

    def test_s_grown_to_m_joins_the_ms(self) -> None:
        """Out of an S-GPU it goes to the latest M-GPU that is not full."""
        policy = settled({"m": 45}, {"s1": 35, "s2": 35, "s3": 40})
        policy.update("s3", 42)
        assert epoch(policy) == [("s3", "g1", "g0")]

    def test_m_grown_to_l_on_an_l_gpu_leaves(self) -> None:
        """Two L's do not fit: the grown one is re-allocated to a new GPU."""
        policy = settled({"l": 61, "m": 59})
        policy.update("m", 62)
        assert [step[:2] for step in epoch(policy)] in ([("m", "g0")], [("l", "g0")])

    def test_m_grown_to_l_on_an_overloaded_m_gpu_sheds_the_others(self) -> None:
        """The grown one stays; what no longer fits beside it is re-allocated."""
        policy = settled({"m1": 60, "m2": 60})
        policy.update("m1", 65)
        assert epoch(policy) == [("m2", "g0", "g1")]

    def test_an_overloaded_l_gpu_sheds_the_others(self) -> None:
        """An L that outgrows its GPU's room stays; the others go."""
        policy = settled({"l": 70, "m": 50})
        policy.update("l", 75)
        assert epoch(policy) == [("m", "g0", "g1")]

    def test_growth_inside_a_class_sheds_the_cheapest(self) -> None:
        """Mend: T beside T overflows without any change of class; the smallest that cures it moves."""
        policy = settled({"t1": 30, "t2": 29, "t3": 28, "t4": 27})
        policy.update("t3", 30)
        policy.update("t4", 30)
        assert epoch(policy) == []
        policy = settled({"m1": 50, "m2": 45, "t": 25})
        policy.update("m2", 48)
        assert epoch(policy) == [("t", "g0", "g1")]


class TestMultiItems:
    """Requests at or below C/8 are packed as multi-items of up to C/4, each one T."""

    def test_small_items_share_a_gpu(self) -> None:
        """Small arrivals join the same GPU while there is room."""
        policy = settled({"l": 100})
        assert [policy.allocate(Item(f"s{n}", 6)) for n in range(4)] == ["g0", "g0", "g0", "g1"]

    def test_a_multi_item_moves_as_one(self) -> None:
        """When its L departs, a multi-item's members go to the same place."""
        policy = settled({"l1": 90, "a": 8, "b": 9, "c": 10}, {"l2": 90})
        policy.depart("l1")
        assert epoch(policy) == [("a", "g0", "g1"), ("b", "g0", "g1"), ("c", "g0", "g1")]

    def test_a_multi_item_that_outgrows_a_quarter_splits(self) -> None:
        """The halves part when both no longer fit: only one of them moves."""
        policy = settled({"l": 90, "a": 10, "b": 10}, {"l2": 95})
        policy.update("a", 15)
        policy.update("b", 16)
        steps = epoch(policy)
        assert [step[0] for step in steps] in (["a"], ["b"])
        assert steps[0][2] == "g1"

    def test_a_member_that_outgrows_an_eighth_stands_alone(self) -> None:
        """A grown member is a T of its own, and stays where it is."""
        policy = settled({"l": 80, "a": 10, "b": 10})
        policy.update("a", 20)
        assert epoch(policy) == []


class TestBatching:
    """Operations of one epoch are one plan."""

    def test_there_and_back_is_pruned(self) -> None:
        """A departure that an arrival makes good costs no move."""
        policy = settled({"m1": 45, "m2": 45}, {"m3": 45, "m4": 45})
        policy.depart("m1")
        assert policy.allocate(Item("m5", 45)) == "g0"
        assert epoch(policy) == []

    def test_what_departs_is_not_moved(self) -> None:
        """A request that grew and then departed is in no plan."""
        policy = settled({"l": 61, "m": 59})
        policy.update("m", 62)
        policy.depart("m")
        assert epoch(policy) == []

    def test_a_failed_move_leaves_the_item(self) -> None:
        """It stays at its source, and is tried again after a rest."""
        policy = cluster({"m1": 60, "m2": 60}, hold=True)
        policy.epoch(0)
        policy.update("m1", 65)
        (move,) = policy.epoch(1)
        policy.failed(move.item_id)
        policy.check()
        assert policy.gpu_of("m2") == "g0"
        retried = [bool(policy.epoch(2 + n)) for n in range(3)]
        assert any(retried)

    def test_moves_wait_for_room_that_is_free_now(self) -> None:
        """With both ends held, an M moves beside an L only after the T's have really left."""
        policy = cluster({"l": 65, "t1": 20, "t2": 25}, hold=True)
        assert policy.epoch(0) == []
        assert policy.allocate(Item("m", 50)) == "g1"
        first = policy.epoch(1)
        assert "m" not in {move.item_id for move in first}
        for move in first:
            policy.moved(move.item_id)
        for now in range(2, 5):
            for move in policy.epoch(now):
                policy.moved(move.item_id)
        assert policy.gpu_of("m") == "g0"
        assert policy.overloaded() == []
