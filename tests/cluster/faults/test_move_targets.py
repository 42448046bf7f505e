import pytest

from tests.cluster.faults.points import go_on_without_and_with, struck_at
from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, is_struck
from tests.cluster.stack import eventually

pytestmark = pytest.mark.connected

POINTS = {
    "target:reserved": "target, room given",
    "target:chunk": "target, KV under way",
    "target:joining": "target, commit has come",
    "target:claiming!": "target, about to claim",
    "target:claiming": "target, has claimed",
    "target:settling!": "target, claim granted, nobody told",
    "target:settling": "target, claim granted",
}
IN_SHORT = (("target:settling!", "KILL"), ("target:claiming", "STOP"))


@pytest.mark.parametrize(("point", "number"), struck_at(POINTS, "KILL", IN_SHORT))
def test_a_target_is_killed_in_the_middle_of_a_move(scene: Scene, point: str, number: str) -> None:
    """Its source goes on, or, if the sequence was the target's already, it is placed again: the text is the same."""
    victim = scene.victim(point, number)
    victim.ready()
    scene.shut(scene.well[1])
    with scene.crowd() as crowd:
        scene.move(scene.well[0], victim, lambda: is_struck(victim))
        scene.open(scene.well[1])
        before = crowd.progress()
        eventually(lambda: crowd.on_since(before), "all go on")
    told("move", "kill -9", POINTS[point], "nothing", __name__, crowd)
    scene.nothing_left()


@pytest.mark.parametrize(("point", "number"), struck_at(POINTS, "STOP", IN_SHORT))
def test_a_target_stands_still_in_the_middle_of_a_move(scene: Scene, point: str, number: str) -> None:
    """The same, and when it goes on it takes nothing that is not its own, and keeps nothing."""
    victim = scene.victim(point, number)
    victim.ready()
    scene.shut(scene.well[1])
    with scene.crowd() as crowd:
        scene.move(scene.well[0], victim, lambda: is_struck(victim))
        go_on_without_and_with(crowd, victim)
    scene.open(scene.well[1])
    told("move", "SIGSTOP, later SIGCONT", POINTS[point], "nothing", __name__, crowd)
    scene.nothing_left()
    scene.stop(victim)
