from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster.faults.crowd import TOKENS, ask_for
from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, freeze, thaw, worker_id
from tests.cluster.stack import Service, StreamedChat, eventually

pytestmark = pytest.mark.connected


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A broker, a frontend, two workers; each test brings its schedulers."""
    with Scene(tmp_path_factory.mktemp("schedulers")) as scene:
        first = scene.stack.start_scheduler()
        scene.well = [scene.worker(f"well-{n}") for n in (1, 2)]
        scene.serve(first, *scene.well)
        scene.stop(first)
        yield scene


@pytest.fixture
def leader(stage: Scene) -> Iterator[Service]:
    """A scheduler that leads."""
    scheduler = stage.stack.start_scheduler()
    eventually(lambda: leads(scheduler), "it leads")
    yield scheduler
    stage.stack.kill(scheduler)


@pytest.fixture
def standby(stage: Scene, leader: Service) -> Iterator[Service]:
    """Another, on standby."""
    scheduler = stage.stack.start_scheduler()
    assert scheduler.ready()["role"] == "standby"
    yield scheduler
    stage.stack.kill(scheduler)


def leads(scheduler: Service) -> bool:
    """Whether the last that it said of itself is that it leads."""
    roles = [event for event in scheduler.events("ready") + scheduler.events("leadership_lost") if event]
    last = max(roles, key=lambda event: str(event["timestamp"]), default={})
    return last.get("role") == "leader"


def test_a_leader_is_killed_and_the_standby_takes_over(stage: Scene, leader: Service, standby: Service) -> None:
    """What runs runs on; who asks in between waits until the standby leads."""
    with stage.crowd() as crowd:
        crowd.amid_answers()
        leader.kill()
        eventually(lambda: crowd.well() and leads(standby), "the standby leads")
        crowd.answered_anew()
    told("scheduler", "kill -9", "leader, with a standby", "nothing", __name__, crowd)
    stage.nothing_left()


@pytest.mark.reliability
def test_a_leader_stands_still_and_leads_no_more_when_it_goes_on(
    stage: Scene, leader: Service, standby: Service
) -> None:
    """It finds its lease gone before it decides anything, and is the standby from then on."""
    with stage.crowd() as crowd:
        crowd.amid_answers()
        freeze(leader)
        eventually(lambda: crowd.well() and leads(standby), "the standby leads")
        thaw(leader)
        eventually(lambda: crowd.well() and leader.events("leadership_lost"), "the old one knows")
        crowd.answered_anew()
        assert leads(standby)
        assert not leads(leader)
    told("scheduler", "SIGSTOP, later SIGCONT", "leader, with a standby", "nothing", __name__, crowd)
    stage.nothing_left()


@pytest.mark.reliability
def test_the_only_scheduler_is_killed_and_started_again(stage: Scene, leader: Service) -> None:
    """What runs runs on; who asks in between waits."""
    with stage.crowd() as crowd:
        crowd.amid_answers()
        leader.kill()
        again = stage.stack.start_scheduler()
        eventually(lambda: crowd.well() and leads(again), "the new one leads")
        crowd.answered_anew()
    told("scheduler", "kill -9, started again", "the only one", "nothing", __name__, crowd)
    stage.nothing_left()
    stage.stack.kill(again)


@pytest.mark.reliability
def test_the_only_scheduler_stands_still_for_a_while(stage: Scene, leader: Service) -> None:
    """Its lease is over by then; it takes it again."""
    with stage.crowd() as crowd:
        crowd.amid_answers()
        freeze(leader)
        before = crowd.progress()
        eventually(lambda: crowd.well() and stage.status()["workers"] == [], "no scheduler answers")
        assert crowd.progress() != before, "who runs goes on"
        thaw(leader)
        crowd.answered_anew()
    told("scheduler", "SIGSTOP, later SIGCONT", "the only one", "nothing", __name__, crowd)
    stage.nothing_left()


def test_without_any_scheduler_what_runs_ends_well_and_new_requests_are_told(stage: Scene, leader: Service) -> None:
    """A 503 that says why and when to come back, after `place_deadline_s`; nothing that runs notices."""
    flags = ["--models", "fake", "--port", "0", "--place-deadline-s", "1"]
    impatient = stage.stack.start("mell_frontend", *flags)
    assert stage.frontend is not None
    with stage.stack.client(stage.frontend) as patient, stage.stack.client(impatient) as client:
        running = StreamedChat(patient, 1_000)
        running.read(20)
        leader.kill()
        body = {"model": "fake", "prompt": "x", "max_tokens": 1}
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 503, refused.text
        assert "scheduler" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert not running.done, "all this happened in mid-stream"
        assert len(running.read()) == 1_000
    stage.stop(impatient)


@pytest.mark.reliability
def test_a_pause_of_moves_outlasts_the_only_scheduler(stage: Scene, leader: Service) -> None:
    """It is kept by the broker, also while that is restarted."""
    stage.admin("POST", "moves/pause").raise_for_status()
    leader.kill()
    stage.stack.broker.kill()
    stage.stack.broker.start()
    again = stage.stack.start_scheduler()
    eventually(lambda: leads(again), "the new one leads")
    eventually(lambda: stage.status().get("moves_paused"), "moves are paused")
    stage.admin("POST", "moves/resume").raise_for_status()
    assert not stage.status()["moves_paused"]
    stage.stack.kill(again)


@pytest.mark.reliability
def test_a_drain_outlasts_its_leader(stage: Scene, leader: Service, standby: Service) -> None:
    """The worker goes on to refuse, and the next leader to empty it."""
    with stage.crowd() as crowd:
        crowd.answered_anew()
        held = eventually(lambda: [w for w in stage.well if stage.held(worker_id(w))], "somebody works")
        stage.shut(held[0])
        leader.kill()
        eventually(lambda: crowd.well() and leads(standby), "the standby leads")
        eventually(lambda: crowd.well() and state_of(stage, held[0]) == "drained", "it is drained")
        crowd.answered_anew()
    stage.open(held[0])
    told("scheduler", "kill -9", "leader, during a drain, with a standby", "nothing", __name__, crowd)
    stage.nothing_left()


@pytest.mark.reliability
def test_an_operator_s_move_outlasts_its_leader(stage: Scene, leader: Service, standby: Service) -> None:
    """The next leader, asked the same, tells how the move came out that the first has begun."""
    flags = ("--fake-prefill-token-us", "12000", "--max-sequences", "8", "--max-step-tokens", "16")
    slow = stage.worker("slow", *flags)  # its prefill takes longer than a change of leaders
    slow.ready()
    assert stage.frontend is not None
    with stage.crowd(1) as crowd, stage.stack.client(stage.frontend) as client, ThreadPoolExecutor(1) as pool:
        eventually(lambda: state_of(stage, slow) != "unknown", "the slow one is known")
        stage.shut(slow)  # or the request might begin there
        moved = StreamedChat(client, 2_500, **ask_for(0))
        moved.read(20)
        stage.open(slow)
        eventually(
            lambda: moved.id in {row["sequence"].partition(".")[0] for row in stage.status()["sequences"]}, "known"
        )
        order = {"to": worker_id(slow), "mode": "tokens", "wait_s": 60}
        asked = pool.submit(stage.admin, "POST", f"requests/{moved.id}/migrate", **order)
        eventually(lambda: crowd.well() and (asked.done() or stage.status().get("migrating")), "it moves")
        assert not asked.done(), asked.result().text
        leader.kill()
        eventually(lambda: crowd.well() and leads(standby), "the standby leads")
        answer = asked.result(90)
        assert answer.status_code == 200, answer.text
        assert [move["state"] for move in answer.json()["moves"]] in (["committed"], ["there"]), answer.text
        assert moved.read(TOKENS + 20).startswith(stage.stories[0])
        moved.leave()
    told("scheduler", "kill -9", "leader, during an operator's move, with a standby", "nothing", __name__, crowd)
    stage.nothing_left()
    stage.stop(slow)


def state_of(stage: Scene, worker: Service) -> str:
    """Return how operators see a worker."""
    states = {row["worker"]: row["state"] for row in stage.status()["workers"]}
    return str(states.get(worker_id(worker), "unknown"))
