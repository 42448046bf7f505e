"""Hysteresis: what was moved stays for its rest, whatever the policy, unless overload or a drain moves it."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mell_scheduler.policy import POLICY_NAMES, make_policy
from mell_scheduler.policy.base import GpuSpec, Item, Policy, PolicySettings, Reason

GPUS = 6
CAPACITY = 96
EPOCHS = 120


def live(policy: Policy, chance: random.Random) -> list[tuple[str, int, Reason]]:
    """Requests come, grow and end, every move succeeds; returns (item, epoch, reason) of each."""
    sizes: dict[str, int] = {}
    moves: list[tuple[str, int, Reason]] = []
    for epoch in range(1, EPOCHS):
        for number in range(chance.randint(0, 3)):
            size = chance.randint(1, 40)
            if policy.allocate(Item(f"{epoch}.{number}", size, "a", 1)) is not None:
                sizes[f"{epoch}.{number}"] = size
        for item_id in [item_id for item_id in sizes if chance.random() < 0.12]:
            policy.depart(item_id)
            del sizes[item_id]
        for gpu_id in policy.gpu_ids():
            here = policy.items_on(gpu_id)
            sizes |= {item_id: sizes[item_id] + chance.randint(0, 2) for item_id in here}
            policy.update_gpu(gpu_id, here, [sizes[item_id] for item_id in here])
        for move in policy.epoch(epoch * 1_000_000):
            policy.moved(move.item_id)
            moves.append((move.item_id, epoch, move.reason))
    return moves


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), cooldown=st.integers(1, 8))
def test_no_request_bounces(name: str, seed: int, cooldown: int) -> None:
    """Between a move and the next one that nothing forces lies the cooldown."""
    policy = make_policy(name, PolicySettings(cooldown_epochs=cooldown))
    for number in range(GPUS):
        policy.add_gpu(GpuSpec(f"g{number}", CAPACITY, "a", "host"))
    moved_in: dict[str, int] = {}
    for item_id, epoch, reason in live(policy, random.Random(seed)):
        forced = reason in (Reason.OVERLOAD, Reason.DRAIN)
        assert forced or epoch - moved_in.get(item_id, -cooldown - 1) > cooldown, f"{item_id} bounced in epoch {epoch}"
        moved_in[item_id] = epoch


def test_what_others_moved_rests_too() -> None:
    """A move that the policy did not plan is followed by the same rest."""
    policy = make_policy("repack", PolicySettings(cooldown_epochs=3))
    for number in range(2):
        policy.add_gpu(GpuSpec(f"g{number}", CAPACITY, "a", "host"))
    policy.place(Item("big", 60, "a"), "g0")
    policy.place(Item("small", 10, "a"), "g1")
    policy.rest("small")
    planned = [policy.epoch(second * 1_000_000) for second in range(1, 6)]
    assert [len(moves) for moves in planned] == [0, 0, 0, 1, 0]


def test_what_rests_makes_no_room_for_another() -> None:
    """A plan of `mell` that would need what has just moved to leave again is not begun, and is no overload."""
    policy = make_policy("mell", PolicySettings(hold_both_ends=False, cooldown_epochs=3))
    for number in range(3):
        policy.add_gpu(GpuSpec(f"g{number}", CAPACITY, "a", "host"))
    for item_id, size, gpu_id in (("large", 48, "g0"), ("tiny", 1, "g0"), ("rests", 14, "g1"), ("small", 27, "g2")):
        policy.place(Item(item_id, size, "a"), gpu_id)
    assert [(move.item_id, move.target) for move in policy.epoch(0)] == [("rests", "g0")]
    policy.moved("rests")
    policy.place(Item("medium", 36, "a"), "g2")
    policy.place(Item("new", 1, "a"), "g0")
    assert policy.epoch(1) == []
