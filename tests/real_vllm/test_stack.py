"""Mell before two real vLLM servers: a whole stack of processes, a worker for each server, a small real model."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mell_shared.models import DEFAULT_MODEL
from tests.cluster.stack import QUICK, Service, Stack, eventually
from tests.cluster.test_operators import holder, mell
from tests.vllm_process import VllmProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

TOKENS = 400
QUESTION = [{"role": "user", "content": "Tell me a long story about the Moon."}]
PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker and a scheduler."""
    # Servers that compute on the same cores leave workers little of them, so silence has to be long to mean anything.
    with Stack(tmp_path_factory.mktemp("stack"), {**QUICK, "MELL_WORKER_SILENCE_S": "10"}) as stack:
        stack.start_scheduler().ready()
        yield stack


@pytest.fixture(scope="module")
def servers(real_vllm: VllmProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, VllmProcess]]:
    """A server for each worker."""
    with VllmProcess(tmp_path_factory.mktemp("second-vllm")) as second:
        yield {"one": real_vllm, "two": second}


@pytest.fixture(scope="module")
def workers(stack: Stack, servers: dict[str, VllmProcess]) -> dict[str, Service]:
    """A worker before each server."""
    return stack.start_before({name: server.url for name, server in servers.items()}, DEFAULT_MODEL, PATIENCE_S)


@pytest.fixture(scope="module")
def frontend(stack: Stack) -> Service:
    """The frontend."""
    service = stack.start_frontend("--admin-key", "secret", model=DEFAULT_MODEL)
    service.ready(PATIENCE_S)
    return service


@pytest.fixture(scope="module")
def client(stack: Stack, frontend: Service, workers: dict[str, Service]) -> Iterator[httpx.Client]:
    """A client of the frontend, once there are workers."""
    del workers
    with httpx.Client(base_url=frontend.ready()["url"], timeout=PATIENCE_S, trust_env=False) as client:
        eventually(lambda: client.get("/ready").status_code == 200, "ready")
        yield client


def ask(client: httpx.Client, **more: Any) -> dict[str, Any]:
    """A whole answer."""
    body = {"model": DEFAULT_MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24, **more}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


class Streamed:
    """A streamed answer of `TOKENS` tokens, event by event."""

    def __init__(self, client: httpx.Client) -> None:
        body = {"model": DEFAULT_MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": TOKENS}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        request = client.build_request("POST", "/v1/chat/completions", json=body)
        self._lines = client.send(request, stream=True).iter_lines()
        self.id = ""
        self.text = ""
        self.usage: dict[str, Any] | None = None
        self.done = False

    def read(self, characters: int | None = None) -> str:
        """Read until there are so many characters more, or to the end."""
        goal = None if characters is None else len(self.text) + characters
        while not self.done and (goal is None or len(self.text) < goal):
            line = next(self._lines)
            if line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                said = json.loads(line[6:])
                assert "error" not in said, said
                self.id = said["id"]
                self.usage = said.get("usage") or self.usage
                self.text += "".join(choice["delta"].get("content") or "" for choice in said["choices"])
        return self.text


@pytest.fixture(scope="module")
def story(client: httpx.Client) -> str:
    """The undisturbed answer."""
    return Streamed(client).read()


def test_what_clients_ask_for_they_get(client: httpx.Client) -> None:
    """Choices, log-probabilities, stop strings, a JSON schema."""
    several = ask(client, n=2, temperature=1.0, seed=5)
    assert len({choice["message"]["content"] for choice in several["choices"]}) == 2
    scored = ask(client, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(scored) == 24
    assert all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in scored)
    text = ask(client)["choices"][0]["message"]["content"]
    stopped = ask(client, stop=[text[10:14]])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert text.startswith(stopped["message"]["content"])
    schema = {"type": "object", "properties": {"moons": {"type": "integer"}}, "required": ["moons"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    told = ask(client, response_format=form, max_tokens=80)["choices"][0]
    assert list(json.loads(told["message"]["content"])) == ["moons"]


def test_a_stream_moves_in_mid_stream(
    client: httpx.Client, frontend: Service, workers: dict[str, Service], story: str
) -> None:
    """There and back by tokens: as many tokens as were asked for, the text that a server alone gives."""
    chat = Streamed(client)
    chat.read(20)
    here, sequence = holder(frontend, chat.id)
    (there,) = set(workers) - {here}
    for target in (there, here):
        code, moved = mell(frontend, "migrate", sequence, "--to", target, "--mode", "tokens")
        assert code == 0, moved
        assert [move["state"] for move in moved["moves"]] == ["committed"]
        chat.read(20)
    assert not chat.done, "both moves were made in mid-stream"
    assert chat.read() == story
    assert chat.usage is not None
    assert chat.usage["completion_tokens"] == TOKENS
    for name, worker in workers.items():
        for event in worker.events("migration_committed"):
            print(f"moved to {name}:", {k: v for k, v in event.items() if k.endswith(("_us", "_tokens"))})  # noqa: T201


def test_a_killed_server_s_stream_goes_on_at_the_other(
    client: httpx.Client,
    frontend: Service,
    workers: dict[str, Service],
    servers: dict[str, VllmProcess],
    story: str,
) -> None:
    """After the last token delivered, with the text of one server alone; the killed one's worker stays."""
    chat = Streamed(client)
    chat.read(20)
    here, _ = holder(frontend, chat.id)
    servers[here].kill()
    assert chat.read() == story
    assert chat.usage is not None
    assert chat.usage["completion_tokens"] == TOKENS
    assert workers[here].events("engine_away")
    servers[here].start()
    eventually(lambda: workers[here].events("engine_back"), "its server is used again", 120.0)


def test_servers_that_are_all_killed_and_started_again_cost_time_only(
    client: httpx.Client, workers: dict[str, Service], servers: dict[str, VllmProcess], story: str
) -> None:
    """Their workers stay; the stream waits in the queue and goes on after the last token delivered."""
    chat = Streamed(client)
    chat.read(20)
    before = {name: len(worker.events("engine_away")) for name, worker in workers.items()}
    for server in servers.values():
        server.kill()
    for name, worker in workers.items():
        seen = before[name]
        eventually(lambda worker=worker, seen=seen: len(worker.events("engine_away")) > seen, "it is missed", 60.0)
    for server in servers.values():
        server.start()
    assert chat.read() == story
    assert chat.usage is not None
    assert chat.usage["completion_tokens"] == TOKENS
