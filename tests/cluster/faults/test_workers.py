import pytest

from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, is_struck, standing, thaw, worker_id
from tests.cluster.stack import eventually

pytestmark = pytest.mark.connected


@pytest.mark.reliability
def test_a_crowd_that_nothing_happens_to(scene: Scene) -> None:
    """What there is to compare the others with."""
    with scene.crowd() as crowd:
        crowd.answered_anew()
    told("none", "none", "", "nothing", __name__, crowd)


@pytest.mark.parametrize("point", [pytest.param("prefill", marks=pytest.mark.reliability), "decode"])
def test_a_worker_killed_at_its_work_costs_its_clients_a_pause(scene: Scene, point: str) -> None:
    """Its streams go on elsewhere; each text is whole, and that of an undisturbed run."""
    victim = scene.victim(point, "KILL")
    victim.ready()
    scene.shut(*scene.well)
    with scene.crowd() as crowd:
        eventually(lambda: crowd.well() and victim.process.poll() is not None, "it is struck")
        scene.open(*scene.well)
        before = crowd.progress()
        eventually(lambda: crowd.on_since(before), "all go on")
    assert is_struck(victim)
    told("worker", "kill -9", f"in {point}", "nothing", __name__, crowd)
    scene.nothing_left()


@pytest.mark.parametrize("point", ["prefill", pytest.param("decode", marks=pytest.mark.reliability)])
def test_a_worker_that_stands_still_is_replaced_and_told_so(scene: Scene, point: str) -> None:
    """As if it were dead; when it goes on, what it says is not heard, it lets go of all, and gets work again."""
    victim = scene.victim(point, "STOP")
    victim.ready()
    scene.shut(*scene.well)
    with scene.crowd() as crowd:
        eventually(lambda: crowd.well() and is_struck(victim) and standing(victim), "it is struck")
        scene.open(*scene.well)
        before = crowd.progress()
        eventually(lambda: crowd.on_since(before, 60), "all go on without it")
        thaw(victim)
        scene.shut(*scene.well)
        eventually(lambda: crowd.well() and scene.held(worker_id(victim)), "it is given work again")
    told("worker", "SIGSTOP, later SIGCONT", f"in {point}", "nothing", __name__, crowd)
    scene.open(*scene.well)
    scene.nothing_left()
    scene.stop(victim)
