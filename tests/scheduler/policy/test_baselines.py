"""Each baseline's way of choosing, by hand."""

import pytest

from mell_scheduler.policy import POLICY_NAMES, Policy, PolicySettings, make_policy
from mell_scheduler.policy.base import (
    BalanceSettings,
    GpuSpec,
    GpuState,
    Item,
    Move,
    Reason,
    StepProfile,
)


def cluster(name: str, gpus: int = 4, settings: PolicySettings | None = None) -> Policy:
    """A policy over `gpus` empty GPUs g0, g1, ... of 100 blocks."""
    policy = make_policy(name, settings)
    for index in range(gpus):
        policy.add_gpu(GpuSpec(f"g{index}", 100))
    return policy


def place(policy: Policy, **sizes: tuple[str, int]) -> None:
    """Put items on GPUs: a=("g0", 40)."""
    for item_id, (gpu_id, size) in sizes.items():
        policy.place(Item(item_id, size), gpu_id)


def arrive(policy: Policy, *sizes: int) -> list[str | None]:
    """Where arrivals of these sizes go."""
    return [policy.allocate(Item(f"new{i}", size)) for i, size in enumerate(sizes)]


def test_best_fit_takes_the_fullest_with_room() -> None:
    """An arrival goes to the fullest GPU that still holds it."""
    policy = cluster("best-fit")
    place(policy, a=("g0", 50), b=("g1", 70), c=("g2", 90))
    assert arrive(policy, 20, 10, 60) == ["g1", "g1", "g3"]


def test_worst_fit_takes_the_emptiest_in_use() -> None:
    """An arrival goes to the emptiest GPU in use, and to a standby one only when none has room."""
    policy = cluster("worst-fit")
    place(policy, a=("g0", 50), b=("g1", 70), c=("g2", 90))
    assert arrive(policy, 20, 60) == ["g0", "g3"]


def test_first_fit_takes_the_longest_known() -> None:
    """An arrival goes to the first GPU with room in order of arrival."""
    policy = cluster("first-fit")
    place(policy, a=("g0", 90), b=("g1", 50), c=("g2", 10))
    assert arrive(policy, 40, 40, 90) == ["g1", "g2", "g3"]


def test_round_robin_goes_round() -> None:
    """Arrivals take the GPUs in use in turn, skipping those without room."""
    policy = cluster("round-robin")
    place(policy, a=("g0", 10), b=("g1", 95), c=("g2", 10))
    assert arrive(policy, 10, 10, 10, 10) == ["g0", "g2", "g0", "g2"]


@pytest.mark.parametrize("name", ["best-fit", "worst-fit", "first-fit", "round-robin"])
def test_head_room_is_left_by_arrivals(name: str) -> None:
    """With 20% head-room a GPU is filled to 80, and an empty one takes any item that fits."""
    policy = cluster(name, gpus=2, settings=PolicySettings(head_room=0.2))
    assert arrive(policy, 50, 30, 95, 10) == ["g0", "g0", "g1", None]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_models_do_not_mix(name: str) -> None:
    """A request goes only to a GPU of its model, and to none if there is none."""
    policy = make_policy(name)
    policy.add_gpu(GpuSpec("a0", 100, model="a"))
    policy.add_gpu(GpuSpec("b0", 100, model="b"))
    assert policy.allocate(Item("i", 10, model="b")) == "b0"
    assert policy.allocate(Item("j", 10, model="c")) is None


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_drained_gpu_is_emptied_and_released(name: str) -> None:
    """Draining moves everything away with reason drain; then the GPU is released and takes nothing."""
    policy = cluster(name, gpus=2)
    place(policy, a=("g0", 30), b=("g0", 20))
    policy.drain_gpu("g0")
    moves = policy.epoch(0)
    assert moves == [Move("a", "g0", "g1", 30, Reason.DRAIN), Move("b", "g0", "g1", 20, Reason.DRAIN)]
    policy.moved("a")
    assert policy.state("g0") is GpuState.DRAINING
    policy.moved("b")
    assert policy.state("g0") is GpuState.RELEASED
    assert arrive(policy, 90) == [None]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_memory_is_held_at_both_ends_of_a_move(name: str) -> None:
    """While a move is under way neither end's room is given away; a failure frees the target."""
    policy = cluster(name, gpus=2)
    place(policy, a=("g0", 60))
    policy.drain_gpu("g0")
    policy.epoch(0)
    assert (policy.used_blocks("g0"), policy.used_blocks("g1")) == (60, 60)
    assert arrive(policy, 50) == [None]
    policy.failed("a")
    assert (policy.used_blocks("g0"), policy.used_blocks("g1")) == (60, 0)
    assert policy.gpu_of("a") == "g0"


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_step_time_is_a_second_capacity(name: str) -> None:
    """With memory to spare, a GPU takes only as many items as its step time allows."""
    policy = make_policy(name)
    policy.add_gpu(GpuSpec("g0", 1_000, step=StepProfile(100, 10, 1, 200)))
    assert arrive(policy, 30, 30, 30) == ["g0", "g0", None]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_wanted_gpus_follow_the_queue(name: str) -> None:
    """GPUs wanted are those in use plus room for what is queued."""
    policy = cluster(name)
    place(policy, a=("g0", 30))
    assert policy.gpus_wanted() == 1
    assert policy.gpus_wanted(queued_blocks=150) == 3


def test_load_balance_evens_out() -> None:
    """A GPU filled above the mark sends the item nearest to half the difference to the emptiest."""
    policy = cluster("load-balance")
    place(policy, a=("g0", 50), b=("g0", 30), c=("g0", 18), d=("g1", 40))
    assert policy.epoch(0) == [Move("b", "g0", "g1", 30, Reason.CONSOLIDATE)]


def test_load_balance_relieves_overload() -> None:
    """An overload that balancing cannot end wakes a standby GPU."""
    policy = cluster("load-balance", gpus=3)
    place(policy, a=("g0", 60), b=("g0", 45), c=("g1", 99))
    assert policy.epoch(0) == [Move("b", "g0", "g2", 45, Reason.OVERLOAD)]


def test_load_balance_drain_empties_the_least_loaded() -> None:
    """The least loaded GPU is emptied if the others stay at or below the mark."""
    policy = cluster("load-balance-drain", settings=PolicySettings(balance=BalanceSettings(high=2.0)))
    place(policy, a=("g0", 60), b=("g1", 50), c=("g2", 20))
    assert policy.epoch(0) == [Move("c", "g2", "g1", 20, Reason.CONSOLIDATE)]
    place(policy, d=("g3", 90), e=("g3", 5))
    assert policy.epoch(1_000_000) == []


def test_load_balance_drain_counts_the_step_time_of_every_item() -> None:
    """Two items go where each alone has room: together they are too many for a step."""
    policy = make_policy("load-balance-drain", PolicySettings(head_room=0.1))
    for gpu_id in ("g0", "g1"):
        policy.add_gpu(GpuSpec(gpu_id, 96, step=StepProfile(1_000, 50, 10, 2_000)))
    for item_id, size, gpu_id in (("a", 49, "g0"), ("b", 1, "g0"), ("c", 18, "g1"), ("d", 13, "g1")):
        policy.place(Item(item_id, size), gpu_id)
    assert policy.epoch(0) == []
    policy.depart("b")
    assert {move.item_id for move in policy.epoch(10_000_000)} == {"c", "d"}
    assert policy.overloaded() == []


def test_an_unknown_policy_is_named() -> None:
    """A wrong name raises an error that lists the right ones."""
    with pytest.raises(ValueError, match=r"unknown policy 'magic': choose one of .*repack"):
        make_policy("magic")
