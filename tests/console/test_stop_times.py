"""What containers are given to stop is enough for what our services take at most, with the settings users have."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mell_frontend.settings import FrontendSettings
from mell_gpu_worker.core.evictions import ATTEMPTS
from mell_gpu_worker.core.farewell import LINGER_US
from mell_gpu_worker.peers import FRONTEND_TIMEOUT_S
from mell_gpu_worker.settings import WorkerSettings
from mell_shared import nats_bus

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"
SPARE_S = 4.0
"""For the process itself: Python's end, a machine that is busy with all the others that stop."""
BUS_S = 2 * nats_bus._CLOSE_TIMEOUT_S


def grace_s(service: str) -> float:
    """Return a service's time between SIGTERM and SIGKILL."""
    told: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    grace: str = told["services"][service]["stop_grace_period"]
    assert grace.endswith("s")
    return float(grace.removesuffix("s"))


@pytest.mark.parametrize("service", ["gpu_worker", "gpu_worker_cuda"])
def test_a_worker_has_time_to_be_emptied_and_to_give_back_the_rest(service: str) -> None:
    """Its deadline, then the last acknowledgements or evictions, and its goodbye to the broker."""
    deadline_s = WorkerSettings.model_fields["stop_deadline_s"].default
    afterwards_s = LINGER_US / 1e6 + ATTEMPTS * FRONTEND_TIMEOUT_S + BUS_S
    assert grace_s(service) >= deadline_s + afterwards_s + SPARE_S


def test_a_frontend_has_time_to_finish_its_streams() -> None:
    """Longer than its workers, so that what they give back is placed elsewhere while it waits."""
    deadline_s = FrontendSettings.model_fields["stop_deadline_s"].default
    assert grace_s("frontend") >= deadline_s + BUS_S + SPARE_S
    assert grace_s("frontend") >= grace_s("gpu_worker")


def test_a_scheduler_has_time_to_give_its_lease_back() -> None:
    """So that another leads at once, and not when the lease has expired."""
    assert grace_s("scheduler") >= 1.0 + BUS_S + SPARE_S
