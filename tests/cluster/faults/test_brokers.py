import os
import shutil
import signal

import pytest

from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, is_struck, thaw
from tests.cluster.stack import eventually

pytestmark = pytest.mark.connected


def noticed(scene: Scene, before: list[int]) -> bool:
    """Whether every worker has missed its connection once more."""
    return all(now > then for now, then in zip(losses(scene), before, strict=True))


def losses(scene: Scene) -> list[int]:
    """Return how often each worker has lost its connection."""
    return [len(worker.events("connection_lost")) for worker in scene.well]


@pytest.mark.parametrize(
    "wiped",
    [
        pytest.param(False, id="store kept", marks=pytest.mark.reliability),
        pytest.param(True, id="store wiped"),
    ],
)
def test_a_broker_that_is_killed_comes_back(scene: Scene, wiped: bool) -> None:
    """What was lost is sent again, who leads leads on or again, also if the broker has forgotten the lease."""
    with scene.crowd() as crowd:
        crowd.amid_answers()
        before = losses(scene)
        scene.stack.broker.kill()
        eventually(lambda: crowd.well() and noticed(scene, before), "all have noticed")
        if wiped:
            shutil.rmtree(scene.stack.broker_folder / "jetstream")
        scene.stack.broker.start()
        crowd.answered_anew()
    where = "broker, its store wiped" if wiped else "broker"
    told("broker", "kill -9, started again", where, "nothing", __name__, crowd)
    scene.nothing_left()


@pytest.mark.reliability
@pytest.mark.parametrize("point", ["target:chunk", "target:claiming!", "target:settling!"])
def test_a_broker_is_killed_in_the_middle_of_a_move(scene: Scene, point: str) -> None:
    """The target stands there while the broker is away: what it says, and what is said to it, is lost."""
    target = scene.victim(point, "STOP")
    target.ready()
    scene.shut(scene.well[1])
    with scene.crowd() as crowd:
        scene.move(scene.well[0], target, lambda: is_struck(target))
        before = losses(scene)
        scene.stack.broker.kill()
        eventually(lambda: crowd.well() and noticed(scene, before), "all have noticed")
        scene.stack.broker.start()
        thaw(target)
        crowd.answered_anew()
    scene.open(scene.well[1])
    told("broker", "kill -9, started again", f"broker, during a move ({point})", "nothing", __name__, crowd)
    scene.nothing_left()
    scene.stop(target)


@pytest.mark.reliability
def test_a_broker_that_stands_still_is_noticed(scene: Scene) -> None:
    """Connections that say nothing are given up after three pings; then it is as if it had been killed."""
    with scene.crowd() as crowd:
        crowd.amid_answers()
        before = losses(scene)
        os.kill(scene.stack.broker.pid, signal.SIGSTOP)
        eventually(lambda: crowd.well() and noticed(scene, before), "all have noticed")
        os.kill(scene.stack.broker.pid, signal.SIGCONT)
        crowd.answered_anew()
    told("broker", "SIGSTOP, later SIGCONT", "broker", "nothing", __name__, crowd)
    scene.nothing_left()
