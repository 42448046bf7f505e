"""The simulator's figures, kept: a change must be explained where it is made.

Regenerate with `mell simulate paper:1.1 --seed 7 --until-s 240 --warmup-s 60 --capacity-tokens 15500
--policy <all> --json tests/scheduler/sim/golden.json`.
"""

import json
from pathlib import Path

import pytest

from mell_scheduler.policy import POLICY_NAMES
from mell_scheduler.sim.memory import MemorySettings
from mell_scheduler.sim.requests import Scaling
from mell_scheduler.sim.simulate import Simulation, simulate

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_figures_are_those_kept(name: str) -> None:
    """Every figure but the times taken to decide is the same on every machine."""
    simulation = Simulation("paper:1.1", MemorySettings(15_500), (name,), Scaling(seed=7), 60.0, 240.0)
    (figures,) = simulate(simulation, lambda: 0).as_json()["policies"].values()  # type: ignore[attr-defined]
    kept = GOLDEN["policies"][name]
    timed = ("decision_p50_us", "decision_p99_us")
    assert {k: v for k, v in figures.items() if k not in timed} == {k: v for k, v in kept.items() if k not in timed}
