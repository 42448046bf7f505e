import httpx
import pytest

from tests.cluster.faults.crowd import TOKENS, ask_for
from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, freeze, is_struck, thaw, worker_id
from tests.cluster.stack import StreamedChat, eventually

pytestmark = pytest.mark.connected


def test_a_killed_frontend_takes_only_its_own_streams_along(scene: Scene) -> None:
    """Others' clients notice nothing, its own see their connection break, and its sequences are dropped."""
    other = scene.stack.start_frontend()
    with scene.crowd() as crowd, scene.stack.client(other) as client:
        lost = [StreamedChat(client, 3_000, **ask_for(n)) for n in range(3)]
        for chat in lost:
            chat.read(20)
        names = {chat.id for chat in lost}
        eventually(lambda: names <= running(scene), "they run")
        other.kill()
        for chat in lost:
            with pytest.raises(httpx.TransportError):
                chat.read()
        eventually(lambda: crowd.well() and not names & running(scene), "they are dropped", 60)
        before = crowd.progress()
        eventually(lambda: crowd.on_since(before), "the others go on")
    told(
        "frontend", "kill -9", "one of two", "its own clients: the connection breaks; others: nothing", __name__, crowd
    )
    scene.nothing_left()


@pytest.mark.reliability
def test_a_frontend_is_killed_as_one_of_its_sequences_is_claimed(scene: Scene) -> None:
    """Nobody answers the claim: source and target both let go of it in the end."""
    target = scene.victim("target:claiming!", "STOP")
    other = scene.stack.start_frontend()
    target.ready()
    with scene.stack.client(other) as client:
        lost = StreamedChat(client, 3_000, **ask_for(0))
        lost.read(20)
        source = next(
            w for w in scene.well if eventually(lambda: running(scene), "it runs") and scene.held(worker_id(w))
        )
        scene.move(source, target, lambda: is_struck(target))
        other.kill()
        with pytest.raises(httpx.TransportError):
            lost.read()
    with scene.crowd() as crowd:
        thaw(target)
        eventually(lambda: crowd.well() and lost.id not in running(scene), "it is dropped", 60)
    sees = "its own clients: the connection breaks; others: nothing"
    told("frontend", "kill -9", "one of two, as it should grant a claim", sees, __name__, crowd)
    scene.nothing_left()
    scene.stop(target)


@pytest.mark.reliability
def test_a_frontend_stands_still_until_its_workers_have_given_it_up(scene: Scene) -> None:
    """When it goes on it has its sequences placed again, and its clients get the rest."""
    other = scene.stack.start_frontend()
    with scene.stack.client(other) as client, scene.crowd() as crowd:
        chat = StreamedChat(client, 3_000, **ask_for(0))
        chat.read(20)
        eventually(lambda: chat.id in running(scene), "it runs")
        freeze(other)
        eventually(lambda: chat.id not in running(scene), "its worker has given it up", 55)
        thaw(other)
        assert chat.read(TOKENS + 20).startswith(scene.stories[0])
        eventually(lambda: crowd.well() and other.events("sequence_placed_again"), "it is placed again")
        chat.leave()
    sees = "its own clients: no token while it stands, then the rest; others: nothing"
    told("frontend", "SIGSTOP, later SIGCONT", "one of two, until its workers give it up", sees, __name__, crowd)
    scene.nothing_left()
    scene.stop(other)


def running(scene: Scene) -> set[str]:
    """Return the ids of the answers that workers are generating."""
    return {row["sequence"].partition(".")[0] for row in scene.status()["sequences"]}
