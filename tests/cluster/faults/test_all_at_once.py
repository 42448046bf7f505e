import os
import signal
import time

import pytest

from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, freeze, thaw
from tests.cluster.stack import eventually

pytestmark = [pytest.mark.connected, pytest.mark.reliability]

ASLEEP_S = 7.0
"""Longer than anybody's patience with anybody, in quick settings and in users' own."""


def test_a_machine_falls_asleep_and_wakes_up(scene: Scene) -> None:
    """All stand still, the broker too; nobody takes anybody for lost because of that, and no text is lost."""
    with scene.crowd() as crowd:
        crowd.amid_answers()
        assert scene.frontend is not None
        services = [scene.frontend, *scene.well, *scene.schedulers]
        os.kill(scene.stack.broker.pid, signal.SIGSTOP)
        for service in services:
            freeze(service)
        time.sleep(ASLEEP_S)  # this is the fault
        os.kill(scene.stack.broker.pid, signal.SIGCONT)
        for service in services:
            thaw(service)
        crowd.answered_anew()
    told("all", "SIGSTOP, later SIGCONT", f"every process at once, {ASLEEP_S:.0f} s", "nothing", __name__, crowd)
    scene.nothing_left()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_all_workers_go_at_once_and_others_come(scene: Scene, how: str) -> None:
    """There is nowhere to move to: sequences wait for the next worker, and go on there with all their text."""
    old = scene.well
    with scene.crowd() as crowd:
        crowd.amid_answers()
        for worker in old:
            worker.process.send_signal(signal.Signals[how])
        scene.well = [scene.worker(f"well-{n}", "--stop-deadline-s", "1") for n in (1, 2)]
        for worker in scene.well:
            worker.ready()
        crowd.answered_anew()
    for worker in old:
        assert worker.exit_code() == (0 if how == "SIGTERM" else -signal.SIGKILL)
    told("all", how, "every worker at once, others started", "nothing", __name__, crowd)
    scene.nothing_left()
    eventually(lambda: scene.serving() == len(scene.well), "both serve")
