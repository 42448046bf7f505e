from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.cluster.stack import LOSING, Service, Stack, StreamedChat, eventually, whole_text

pytestmark = pytest.mark.connected

TOKENS, SLOW_US = 250, 200_000
"""A stream of fifty seconds, on a worker that is to lose it: other workers have the time to start meanwhile."""
Team = Callable[..., dict[str, Service]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker and a scheduler, which every test here shares, and whatever a test starts on them."""
    with Stack(tmp_path_factory.mktemp("stack"), LOSING) as stack:
        stack.start_scheduler().ready()
        yield stack


@pytest.fixture(scope="module")
def frontend(stack: Stack) -> Service:
    """A frontend that tests share; they must not stop it."""
    service = stack.start_frontend()
    service.ready()
    return service


@pytest.fixture
def client(stack: Stack, frontend: Service) -> Iterator[httpx.Client]:
    """A client of the shared frontend."""
    with stack.client(frontend) as client:
        yield client


@pytest.fixture(scope="module")
def story(stack: Stack, frontend: Service) -> str:
    """The undisturbed text of `TOKENS` tokens; how long a step takes does not change it."""
    worker = stack.start_worker("undisturbed", step_us=500)
    worker.ready()
    with stack.client(frontend) as client:
        text = whole_text(client, TOKENS)
    worker.ask_to_stop()
    worker.exit_code()
    return text


@pytest.fixture
def team(stack: Stack) -> Iterator[Team]:
    """Start workers of these names, which must be new; they are gone after the test."""
    started: dict[str, Service] = {}

    def start(*names: str, step_us: int = 15_000) -> dict[str, Service]:
        started.update({name: stack.start_worker(name, step_us=step_us) for name in names})
        for worker in started.values():
            worker.ready()
        return started

    yield start
    for worker in started.values():
        worker.ask_to_stop()  # so that the scheduler knows that they are gone
    for worker in started.values():
        worker.exit_code()


def running(client: httpx.Client) -> dict[str, int]:
    """Return how many sequences each worker runs, by name, as the scheduler sees it."""
    status: dict[str, Any] = client.get("/admin/status").raise_for_status().json()
    return {worker["name"]: worker["running"] for worker in status["workers"]}


def test_a_chat_is_streamed_through_all_services(client: httpx.Client, team: Team, story: str) -> None:
    """Streamed and whole answers to the same request hold the same text."""
    team("chat", step_us=1_000)
    assert client.get("/ready").status_code == 200
    stream = StreamedChat(client, TOKENS)
    assert stream.read() == story
    assert len(story) == TOKENS
    assert stream.finish_reason == "length"


def test_a_killed_worker_is_replaced_in_mid_stream(
    client: httpx.Client, frontend: Service, team: Team, story: str
) -> None:
    """The stream goes on elsewhere without a gap or a repeat: its text is that of an undisturbed answer."""
    slow = team("killed-1", step_us=SLOW_US)["killed-1"]
    stream = StreamedChat(client, TOKENS)
    stream.read(5)
    team("killed-2", step_us=1_000)
    before = len(frontend.events("sequence_placed_again"))
    slow.kill()
    assert stream.read() == story
    eventually(lambda: len(frontend.events("sequence_placed_again")) > before, "that it was placed again is logged")


def test_a_worker_that_stops_hands_its_streams_over(client: httpx.Client, team: Team, story: str) -> None:
    """SIGTERM to a worker: its stream is finished there or elsewhere, whole, and it exits cleanly."""
    leaving = team("stopped-1", step_us=SLOW_US)["stopped-1"]
    stream = StreamedChat(client, TOKENS)
    stream.read(5)
    team("stopped-2", step_us=1_000)
    leaving.ask_to_stop()
    assert stream.read() == story
    assert leaving.exit_code() == 0


def test_a_client_that_leaves_frees_its_worker(client: httpx.Client, frontend: Service, team: Team) -> None:
    """Nothing of its sequence is left on the worker, and the frontend serves on."""
    team("left", step_us=40_000)
    stream = StreamedChat(client, 3000)
    stream.read(5)
    eventually(lambda: running(client).get("left") == 1, "the worker is seen to run it")
    stream.leave()
    eventually(lambda: running(client).get("left") == 0, "the worker runs nothing")
    assert len(whole_text(client, 10)) == 10
    (left,) = eventually(
        lambda: [event for event in frontend.events("request") if event.get("disconnected")], "its end is logged"
    )
    assert left["completion_tokens"] < 3000


def test_a_broker_that_crashes_and_returns_costs_no_text(
    stack: Stack, client: httpx.Client, team: Team, story: str
) -> None:
    """What was lost meanwhile is sent again; the text is that of an undisturbed answer."""
    team("cut-off")
    stream = StreamedChat(client, TOKENS)
    stream.read(5)
    stack.broker.kill()
    stack.broker.start()
    assert stream.read() == story
    assert len(whole_text(client, 10)) == 10


def test_a_frontend_that_stops_finishes_its_streams(stack: Stack, team: Team, story: str) -> None:
    """After SIGTERM it is not ready and takes nothing new; what it streams comes to its end."""
    team("outliving", step_us=40_000)
    stopping = stack.start_frontend()
    with stack.client(stopping) as client:
        stream = StreamedChat(client, TOKENS)
        stream.read(5)
        stopping.ask_to_stop()
        eventually(lambda: client.get("/ready").status_code == 503, "not ready")
        refused = client.post("/v1/completions", json={"model": "fake", "prompt": "x", "max_tokens": 1})
        assert refused.status_code == 503
        assert stream.read() == story
    assert stopping.exit_code() == 0


def test_a_stream_that_outlasts_the_stop_deadline_is_cut_with_an_error(stack: Stack, team: Team) -> None:
    """Its reader is told, its worker is freed, and the frontend still ends cleanly."""
    workers = team("cut-short")
    stopping = stack.start_frontend("--stop-deadline-s", "0.1")
    with stack.client(stopping) as client:
        stream = StreamedChat(client, 3000)
        stream.read(5)
        stopping.ask_to_stop()
        assert stream.read_error()["type"]
        assert stopping.exit_code() == 0
    workers["cut-short"].ask_to_stop()  # it would finish what it runs, for up to half a minute
    assert workers["cut-short"].exit_code() == 0
    assert workers["cut-short"].events("stopping")[0]["sequences"] == 0


def test_without_a_worker_the_answer_is_503(client: httpx.Client) -> None:
    """The cluster lives, nobody serves the model: said so, with when to come back."""
    eventually(lambda: not running(client), "no workers")
    response = client.post("/v1/completions", json={"model": "fake", "prompt": "x", "max_tokens": 1})
    assert response.status_code == 503, response.text
    assert response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1


def test_a_taken_port_and_a_missing_broker_are_said_in_one_line(stack: Stack, frontend: Service) -> None:
    """Exit code 1 and one line that says what to do."""
    port = frontend.ready()["url"].rpartition(":")[2]
    second = stack.start("mell_frontend", "--models", "fake", "--port", port)
    lost = stack.start("mell_frontend", "--models", "fake", "--port", "0", "--nats-url", "nats://127.0.0.1:9")
    for service, hint in ((second, "--port"), (lost, "127.0.0.1:9")):
        assert service.exit_code() == 1
        (line,) = service.lines()
        assert hint in line
