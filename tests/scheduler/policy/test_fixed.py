"""GPUs whose items cannot be moved, and which standby GPU light load falls on."""

import random

import pytest

from mell_scheduler.policy import POLICY_NAMES, Policy, PolicySettings, make_policy
from mell_scheduler.policy.base import GpuSpec, Item

LIKE = {"repack": "best-fit", "repack-frugal": "best-fit", "mell": "best-fit", "load-balance": "worst-fit"}


def fixed_cluster(name: str) -> Policy:
    """Six GPUs of 100 blocks that move nothing."""
    policy = make_policy(name, PolicySettings(fixed_head_room=0.1))
    for number in range(6):
        policy.add_gpu(GpuSpec(f"g{number}", 100, "m", fixed=True))
    return policy


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_nothing_is_planned_where_nothing_can_move(name: str) -> None:
    """Neither overload nor a drain nor an almost empty GPU leads to a move."""
    policy = fixed_cluster(name)
    for number in range(8):
        policy.allocate(Item(f"i{number}", 30, "m"))
    policy.update("i0", 95)
    policy.drain_gpu(policy.gpu_of("i7") or "")
    assert policy.overloaded()
    assert [policy.epoch(now_us) for now_us in range(0, 5_000_000, 1_000_000)] == [[]] * 5


@pytest.mark.parametrize(("name", "baseline"), LIKE.items())
def test_without_moves_a_policy_places_as_its_baseline(name: str, baseline: str) -> None:
    """So where no worker can move sequences the default policy is exactly best fit."""
    random_ = random.Random(3)
    policies = [fixed_cluster(name), fixed_cluster(baseline)]
    here: list[str] = []
    for number in range(400):
        if here and random_.random() < 0.45:
            gone = here.pop(random_.randrange(len(here)))
            for policy in policies:
                policy.depart(gone)
        item = Item(f"i{number}", random_.randint(1, 60), "m", random_.randint(0, 4))
        first, second = [policy.allocate(item) for policy in policies]
        assert first == second
        if first is not None:
            here.append(item.item_id)
        for policy in policies:
            policy.check()


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_light_load_stays_on_the_same_few_gpus(name: str) -> None:
    """Of those standing by the one known longest is used, not the one idle longest."""
    policy = make_policy(name)
    for number in range(4):
        policy.add_gpu(GpuSpec(f"g{number}", 100, "m"))
    used = set()
    for number in range(12):
        used.add(policy.allocate(Item(f"i{number}", 30, "m")))
        policy.depart(f"i{number}")
    assert used == {"g0"}
