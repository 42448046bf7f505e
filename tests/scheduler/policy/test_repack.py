"""The default policy by hand. GPUs of 100 blocks; head-room 10, consolidation's targets filled to the brim."""

from dataclasses import replace

from mell_scheduler.policy import Policy, PolicySettings, make_policy
from mell_scheduler.policy.base import GpuSpec, Item, Move, Reason, RepackSettings, StepProfile

REPACK = RepackSettings(head_room=0.1, target_head_room=0.0, move_cost=0.0, price=0.6)
SETTINGS = PolicySettings(repack=REPACK)
INSTANT = replace(SETTINGS, hold_both_ends=False)


def cluster(*gpus: dict[str, int], settings: PolicySettings = SETTINGS, standby: int = 2) -> Policy:
    """GPUs g0, g1, ... that hold these items, and some standby ones."""
    policy = make_policy("repack", settings)
    for index in range(len(gpus) + standby):
        policy.add_gpu(GpuSpec(f"g{index}", 100))
    for index, items in enumerate(gpus):
        for item_id, size in items.items():
            policy.place(Item(item_id, size), f"g{index}")
    return policy


def consolidations(moves: list[Move]) -> list[tuple[str, str]]:
    """(item, target) of each, all of that reason."""
    assert all(move.reason is Reason.CONSOLIDATE for move in moves)
    return [(move.item_id, move.target) for move in moves]


class TestArrivals:
    """Where a request goes."""

    def test_the_fullest_that_keeps_the_head_room(self) -> None:
        """Best fit below 90."""
        policy = cluster({"a": 50}, {"b": 70}, {"c": 85})
        assert policy.allocate(Item("new", 20)) == "g1"

    def test_else_the_emptiest(self) -> None:
        """Where nobody can keep the head-room, the one that is left with most."""
        policy = cluster({"a": 85}, {"b": 82}, {"c": 88})
        assert policy.allocate(Item("new", 10)) == "g1"

    def test_else_a_standby_gpu(self) -> None:
        """Only when no GPU in use has room is another one activated."""
        policy = cluster({"a": 85}, {"b": 82})
        assert policy.allocate(Item("new", 30)) == "g2"


class TestOverload:
    """Ending an overload."""

    def test_the_cheapest_item_that_cures_it_moves(self) -> None:
        """The smallest that is large enough, to the fullest GPU that keeps the head-room."""
        policy = cluster({"a": 60, "b": 5, "c": 20, "d": 25}, {"e": 50}, {"f": 40})
        assert policy.epoch(0)[0] == Move("c", "g0", "g1", 20, Reason.OVERLOAD)

    def test_several_small_ones_if_the_right_one_finds_no_room(self) -> None:
        """Small holes are used before a GPU is activated."""
        policy = cluster({"a": 92, "b": 6, "c": 7}, {"d": 93}, {"e": 94})
        moves = policy.epoch(0)
        assert [(m.item_id, m.target) for m in moves] == [("c", "g1")]
        policy = cluster({"a": 75, "b": 16, "c": 16}, {"d": 90})
        assert [(m.item_id, m.target) for m in policy.epoch(0)] == [("b", "g2")]

    def test_the_slack_that_is_left_counts(self) -> None:
        """One that barely cures would soon be followed by another: up to the head-room, slack is worth its move."""
        policy = cluster({"a": 60, "b": 4, "c": 14, "d": 25}, {"e": 50})
        assert policy.epoch(0)[0].item_id == "c"

    def test_what_is_leaving_already_counts(self) -> None:
        """While a cure is under way nothing more is moved."""
        policy = cluster({"a": 60, "b": 45}, {"c": 30})
        assert len(policy.epoch(0)) == 1
        assert policy.epoch(1) == []

    def test_step_time_is_relieved_too(self) -> None:
        """A GPU over its step time sheds an item although its memory is not full."""
        policy = make_policy("repack", SETTINGS)
        for index in range(2):
            policy.add_gpu(GpuSpec(f"g{index}", 1_000, step=StepProfile(0, 0, 1, 100)))
        policy.place(Item("a", 60), "g0")
        policy.place(Item("b", 50), "g0")
        assert policy.epoch(0) == [Move("a", "g0", "g1", 60, Reason.OVERLOAD)]


class TestConsolidation:
    """Emptying GPUs."""

    def test_a_gpu_is_emptied_if_all_of_it_fits(self) -> None:
        """The emptiest GPU's items go to the fullest ones with room, the largest first."""
        policy = cluster({"a": 60}, {"b": 75}, {"c": 24, "d": 30})
        assert consolidations(policy.epoch(0)) == [("d", "g0"), ("c", "g1")]

    def test_all_or_nothing(self) -> None:
        """If one item fits nowhere, none is moved."""
        policy = cluster({"a": 70}, {"b": 75}, {"c": 24, "d": 31})
        assert policy.epoch(0) == []

    def test_a_gpu_above_the_price_stays(self) -> None:
        """Saving a GPU is not worth more than the price in blocks moved."""
        dear = replace(SETTINGS, repack=replace(REPACK, price=0.3))
        assert cluster({"a": 60}, {"b": 40}, settings=dear).epoch(0) == []
        assert len(cluster({"a": 60}, {"b": 40}).epoch(0)) == 1

    def test_room_is_made_where_moves_take_no_time(self) -> None:
        """An item that fits nowhere takes the place of a smaller one that does fit elsewhere."""
        gpus = ({"a": 60, "b": 12}, {"c": 80}, {"d": 40})
        assert consolidations(cluster(*gpus, settings=INSTANT).epoch(0)) == [("b", "g1"), ("d", "g0")]
        assert cluster(*gpus).epoch(0) == []

    def test_budgets_bind_consolidation_not_relief(self) -> None:
        """With no budget left GPUs stay as they are, but an overload is ended."""
        none = replace(SETTINGS, max_moves_per_epoch=0)
        assert cluster({"a": 60}, {"b": 30}, settings=none).epoch(0) == []
        policy = cluster({"a": 60, "b": 45}, {"c": 30}, settings=none)
        assert [m.reason for m in policy.epoch(0)] == [Reason.OVERLOAD]
        few = replace(SETTINGS, max_moved_blocks_per_epoch=20)
        assert cluster({"a": 60}, {"b": 30}, settings=few).epoch(0) == []

    def test_each_item_costs_step_time_where_a_gpu_is_to_be_emptied(self) -> None:
        """Beside two items one more has time, not two, however small: three do not fit onto two such GPUs."""
        policy = make_policy("repack", SETTINGS)
        for gpu_id, sizes in {"g0": (20, 20), "g1": (20, 20), "g2": (10, 10, 10)}.items():
            policy.add_gpu(GpuSpec(gpu_id, 100, step=StepProfile(0, 300, 1, 1_000)))
            for number, size in enumerate(sizes):
                policy.place(Item(f"{gpu_id}.{number}", size), gpu_id)
        assert policy.epoch(0) == []
        policy.depart("g2.2")
        assert consolidations(policy.epoch(1)) == [("g2.0", "g0"), ("g2.1", "g1")]
        assert policy.overloaded() == []

    def test_a_period_spaces_consolidations(self) -> None:
        """With a period, GPUs are emptied that far apart."""
        spaced = replace(SETTINGS, repack=replace(REPACK, period_us=5_000_000))
        policy = cluster({"a": 60}, settings=spaced)
        policy.epoch(0)
        policy.place(Item("b", 30), "g1")
        assert policy.epoch(4_000_000) == []
        assert len(policy.epoch(5_000_000)) == 1

    def test_a_moved_item_rests(self) -> None:
        """For the cooldown's epochs it moves for overload only."""
        resting = replace(SETTINGS, cooldown_epochs=2)
        policy = cluster({"a": 60}, {"b": 30}, settings=resting)
        policy.epoch(0)
        policy.moved("b")
        policy.depart("a")
        policy.place(Item("c", 65), "g1")
        assert [policy.epoch(n) for n in (1, 2)] == [[], []]
        assert consolidations(policy.epoch(3)) == [("b", "g1")]

    def test_refused_moves_back_off(self) -> None:
        """Each failure of a move doubles the epochs before it is tried again."""
        policy = cluster({"a": 65}, {"b": 30})
        tried = []
        for epoch in range(16):
            for move in policy.epoch(epoch):
                tried.append(epoch)
                policy.failed(move.item_id)
        assert tried == [0, 1, 3, 7, 15]


def test_the_frugal_setting_moves_less() -> None:
    """It leaves more room, so what the default would fill up stays."""
    policy = make_policy("repack-frugal")
    for index in range(3):
        policy.add_gpu(GpuSpec(f"g{index}", 100))
    policy.place(Item("a", 68), "g0")
    policy.place(Item("b", 30), "g1")
    assert policy.epoch(0) == []
