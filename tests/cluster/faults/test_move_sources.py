import pytest

from tests.cluster.faults.points import go_on_without_and_with, struck_at
from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, is_struck
from tests.cluster.stack import Service, eventually

pytestmark = pytest.mark.connected

POINTS = {
    "source:reserving": "source, room asked for",
    "source:copying": "source, room given",
    "source:chunk": "source, KV under way",
    "source:sending": "source, stopped for the rest",
    "source:committing!": "source, about to commit",
    "source:committing": "source, has committed",
    "source:asking": "source, asks who owns it",
}
IN_SHORT = (("source:chunk", "KILL"), ("source:committing", "STOP"))


def bring_about(scene: Scene, victim: Service, target: Service) -> None:
    """Have a sequence of the victim moved, until it is struck."""
    scene.open(*{*scene.well, target})
    scene.move(victim, target, lambda: is_struck(victim))


def target_for(scene: Scene, point: str) -> Service:
    """Return where to move to: one that is gone as it should claim, where the source must be left alone with it."""
    if point != "source:asking":
        return scene.well[1]
    dying = scene.victim("target:claiming!", "KILL")
    dying.ready()
    return dying


@pytest.mark.parametrize(("point", "number"), struck_at(POINTS, "KILL", IN_SHORT))
def test_a_source_is_killed_in_the_middle_of_a_move(scene: Scene, point: str, number: str) -> None:
    """Whoever has the sequence then goes on with it, or it is placed again; its text is as if nothing had happened."""
    victim = scene.victim(point, number)
    target = target_for(scene, point)
    victim.ready()
    scene.shut(*{*scene.well, target})
    with scene.crowd() as crowd:
        bring_about(scene, victim, target)
        before = crowd.progress()
        eventually(lambda: crowd.on_since(before), "all go on")
    told("move", "kill -9", POINTS[point], "nothing", __name__, crowd)
    scene.nothing_left()


@pytest.mark.parametrize(("point", "number"), struck_at(POINTS, "STOP", IN_SHORT))
def test_a_source_stands_still_in_the_middle_of_a_move(scene: Scene, point: str, number: str) -> None:
    """As if it were dead; when it goes on it finds out what it has lost, and lets go of it."""
    victim = scene.victim(point, number)
    target = target_for(scene, point)
    victim.ready()
    scene.shut(*{*scene.well, target})
    with scene.crowd() as crowd:
        bring_about(scene, victim, target)
        go_on_without_and_with(crowd, victim)
    told("move", "SIGSTOP, later SIGCONT", POINTS[point], "nothing", __name__, crowd)
    scene.nothing_left()
    scene.stop(victim)
