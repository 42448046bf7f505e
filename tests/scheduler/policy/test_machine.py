"""Random lives of a cluster under every policy, with `check()` after each step."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mell_scheduler.policy import POLICY_NAMES, make_policy
from mell_scheduler.policy.base import GpuSpec, GpuState, Item, Move, PolicySettings, Reason, StepProfile

CAPACITY = 96
MODELS = ("a", "b")


class PolicyMachine(RuleBasedStateMachine):
    """Arrivals, growth, departures, epochs, moves that commit or fail, GPUs that come, drain and die."""

    policy_name = ""
    policy_settings = PolicySettings()
    step: StepProfile | None = None

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy(self.policy_name, self.policy_settings)
        self.sizes: dict[str, int] = {}
        self.in_flight: dict[str, Move] = {}
        self.names = 0
        self.now_us = 0
        self.epochs = 0
        self.moved_in: dict[str, int] = {}
        """Item -> the epoch in which its last move was committed."""
        for _ in range(4):
            self.gpu_arrives("a", CAPACITY)
        self.gpu_arrives("b", CAPACITY)

    def name(self, prefix: str) -> str:
        """A fresh id."""
        self.names += 1
        return f"{prefix}{self.names}"

    def forget(self, item_id: str) -> None:
        """The item is gone."""
        del self.sizes[item_id]
        self.in_flight.pop(item_id, None)
        self.moved_in.pop(item_id, None)

    @rule(model=st.sampled_from(MODELS), capacity=st.sampled_from((CAPACITY, CAPACITY // 2)))
    def gpu_arrives(self, model: str, capacity: int) -> None:
        """A new GPU comes up."""
        host = f"host{self.names % 2}"
        self.policy.add_gpu(GpuSpec(self.name("g"), capacity, model, host, self.step))

    @rule(data=st.data(), size=st.integers(1, CAPACITY), model=st.sampled_from(MODELS))
    def arrive(self, data: st.DataObject, size: int, model: str) -> None:
        """A request arrives; it may not overload the GPU it gets."""
        growth = data.draw(st.integers(0, 2))
        item = Item(self.name("i"), size, model, growth)
        before = {g: self.policy.used_blocks(g) for g in self.policy.gpu_ids()}
        excluded = data.draw(st.lists(st.sampled_from(self.policy.gpu_ids()), max_size=2))
        gpu = self.policy.allocate(item, excluded)
        if gpu is not None:
            assert gpu not in excluded
            assert self.policy.used_blocks(gpu) == before[gpu] + size + growth
            assert gpu not in self.policy.overloaded(), "an arrival overloaded a GPU"
            self.sizes[item.item_id] = size

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def depart(self, data: st.DataObject) -> None:
        """A request ends."""
        item_id = data.draw(st.sampled_from(sorted(self.sizes)))
        self.policy.depart(item_id)
        self.forget(item_id)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), by=st.integers(-3, 30))
    def grow_one(self, data: st.DataObject, by: int) -> None:
        """One request changes its size."""
        item_id = data.draw(st.sampled_from(sorted(self.sizes)))
        self.sizes[item_id] = max(1, min(CAPACITY // 2, self.sizes[item_id] + by))
        self.policy.update(item_id, self.sizes[item_id])

    @rule(by=st.integers(0, 3))
    def report_all(self, by: int) -> None:
        """Every GPU reports; an id nobody knows is named."""
        for gpu_id in self.policy.gpu_ids():
            item_ids = self.policy.items_on(gpu_id)
            for item_id in item_ids:
                self.sizes[item_id] += by
            unknown = self.policy.update_gpu(gpu_id, [*item_ids, "nobody"], [*(self.sizes[i] for i in item_ids), 5])
            assert unknown == [len(item_ids)]

    @rule()
    def epoch(self) -> None:
        """Moves are planned; none may overload its target."""
        self.now_us += 1_000_000
        self.epochs += 1
        over = set(self.policy.overloaded())
        moves = self.policy.epoch(self.now_us)
        assert [m.priority for m in moves] == sorted(m.priority for m in moves)
        for move in moves:
            assert move.item_id not in self.in_flight, "moved twice at once"
            assert self.policy.gpu_of(move.item_id) == move.source
            assert self.policy.moving_to(move.item_id) == move.target
            assert move.reason is not Reason.OVERLOAD or move.source in over
            assert move.reason in (Reason.OVERLOAD, Reason.DRAIN) or self.rested(move.item_id), "it bounces"
            self.in_flight[move.item_id] = move
        assert set(self.policy.overloaded()) <= over, "a plan overloaded a GPU, counting both ends"

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), committed=st.booleans())
    def settle(self, data: st.DataObject, committed: bool) -> None:
        """A move commits or fails."""
        move = self.in_flight.pop(data.draw(st.sampled_from(sorted(self.in_flight))))
        if committed:
            self.policy.moved(move.item_id)
            self.moved_in[move.item_id] = self.epochs
        else:
            self.policy.failed(move.item_id)
        expected = move.target if committed else move.source
        assert self.policy.gpu_of(move.item_id) == expected
        assert self.policy.moving_to(move.item_id) is None

    def rested(self, item_id: str) -> bool:
        """Whether an item's rest since its last move is over."""
        moved_in = self.moved_in.get(item_id)
        return moved_in is None or self.epochs - moved_in > self.policy_settings.cooldown_epochs

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def order(self, data: st.DataObject) -> None:
        """An operator moves an item: only into room there is now, on a GPU that takes something."""
        item_id = data.draw(st.sampled_from(sorted(self.sizes)))
        source = self.policy.gpu_of(item_id)
        assert source is not None
        model = self.model_of(source)
        others = [g for g in self.policy.gpu_ids() if g != source and self.model_of(g) == model]
        if not others:
            return
        target = data.draw(st.sampled_from(others))
        over = set(self.policy.overloaded())
        state = self.policy.state(target)
        move = self.policy.order_move(item_id, target)
        if move is None:
            return
        assert (move.source, move.target, move.reason) == (source, target, Reason.MANUAL)
        assert item_id not in self.in_flight
        assert state in (GpuState.ACTIVE, GpuState.STANDBY)
        assert set(self.policy.overloaded()) <= over, "an operator's move overloaded a GPU"
        self.in_flight[item_id] = move

    @rule(data=st.data())
    def rehearse(self, data: st.DataObject) -> None:
        """What a drain would do is told without doing it, and each target has room."""
        gpu_id = data.draw(st.sampled_from(self.policy.gpu_ids()))
        before = {g: (self.policy.used_blocks(g), self.policy.state(g)) for g in self.policy.gpu_ids()}
        order = {g: self.policy.items_on(g) for g in self.policy.gpu_ids()}
        targets = self.policy.rehearse_drain(gpu_id)
        assert {g: self.policy.items_on(g) for g in self.policy.gpu_ids()} == order
        assert {g: (self.policy.used_blocks(g), self.policy.state(g)) for g in self.policy.gpu_ids()} == before
        assert [item_id for item_id, _ in targets] == self.policy.items_on(gpu_id)
        for item_id, target in targets:
            assert target is None or self.model_of(target) == self.model_of(gpu_id)
            moving = self.policy.moving_to(item_id)
            assert moving is None or target == moving

    @precondition(lambda self: len(self.policy.gpu_ids()) > 2)
    @rule(data=st.data())
    def gpu_dies(self, data: st.DataObject) -> None:
        """A GPU is lost with what it physically holds."""
        gpu_id = data.draw(st.sampled_from(self.policy.gpu_ids()))
        here = set(self.policy.items_on(gpu_id))
        lost = {item.item_id for item in self.policy.remove_gpu(gpu_id)}
        assert lost == here
        for item_id in sorted(lost):
            self.forget(item_id)
        self.in_flight = {i: m for i, m in self.in_flight.items() if m.target != gpu_id}

    @rule(data=st.data(), action=st.sampled_from(("drain_gpu", "undrain_gpu", "pause_gpu", "resume_gpu")))
    def operate(self, data: st.DataObject, action: str) -> None:
        """An operator drains or pauses a GPU, or ends that."""
        getattr(self.policy, action)(data.draw(st.sampled_from(self.policy.gpu_ids())))

    @precondition(lambda self: self.policy.gpu_ids())
    @rule(data=st.data(), size=st.integers(1, CAPACITY // 2))
    def appear(self, data: st.DataObject, size: int) -> None:
        """An item found by a report, whatever the room."""
        gpu_id = data.draw(st.sampled_from(self.policy.gpu_ids()))
        model = self.model_of(gpu_id)
        item = Item(self.name("i"), size, model)
        self.policy.place(item, gpu_id)
        self.sizes[item.item_id] = size

    def model_of(self, gpu_id: str) -> str:
        """The model a GPU serves."""
        return self.policy.spec(gpu_id).model

    @invariant()
    def agrees(self) -> None:
        """Every index agrees with every other, and with what was told."""
        self.policy.check()
        listed = [i for g in self.policy.gpu_ids() for i in self.policy.items_on(g)]
        assert sorted(listed) == sorted(self.sizes)
        for gpu_id in self.policy.gpu_ids():
            idle = self.policy.state(gpu_id) in (GpuState.STANDBY, GpuState.RELEASED)
            assert not idle or not self.policy.items_on(gpu_id)


STEP = StepProfile(1_000, 50, 10, 2_000)
VARIANTS = {
    "both ends held": (PolicySettings(), None),
    "instant moves": (PolicySettings(hold_both_ends=False, cooldown_epochs=3), None),
    "two capacities": (PolicySettings(head_room=0.1), STEP),
    "two capacities, instant moves": (PolicySettings(hold_both_ends=False, cooldown_epochs=1), STEP),
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_survives_any_life(name: str, variant: str) -> None:
    """Indices stay right, arrivals and plans never overload, and failed moves leave items where they were."""
    chosen, profile = VARIANTS[variant]

    class Machine(PolicyMachine):
        policy_name = name
        policy_settings = replace(chosen)
        step = profile

    case = Machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
    case("runTest").runTest()
