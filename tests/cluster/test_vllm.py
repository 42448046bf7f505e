"""Workers before vLLM servers, all as real processes; the servers are stand-ins whose text depends on every token.

A token that is lost, comes twice or out of turn changes all that follows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.cluster.stack import LOSING, Service, Stack, StreamedChat, eventually
from tests.cluster.test_operators import holder, mell
from tests.ports import free_port

pytestmark = pytest.mark.connected

BLOCK_TOKENS = 16
"""Of the stand-in's cache."""
TOKENS, TOKEN_S = 400, 0.1
"""A stream of forty seconds: long enough for all that is to happen within it; its rest is then made in a hurry."""


@dataclass
class Pair:
    """A worker and the server behind it."""

    stack: Stack
    name: str
    port: int
    server: Service
    worker: Service

    def knobs(self, **changes: object) -> dict[str, Any]:
        """Turn the server's knobs; returns what it has seen."""
        url = f"http://127.0.0.1:{self.port}/knobs"
        return dict(httpx.post(url, json=changes, trust_env=False, timeout=60).json())

    def restart_server(self) -> None:
        """Start the server again, where it was."""
        self.server = _serve(self.stack, self.port)


def _serve(stack: Stack, port: int) -> Service:
    # A connector that is one in name: the fake server's tokens need no KV.
    connector = ("--kv-address", f"tcp://127.0.0.1:{port}")
    server = stack.start("tests.vllm_server", "--port", str(port), "--token-s", str(TOKEN_S), *connector)
    url = f"http://127.0.0.1:{port}/health"

    def answers() -> bool:
        assert server.process.poll() is None, server.lines()
        try:
            return httpx.get(url, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    eventually(answers, "the server answers")
    return server


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker and a scheduler."""
    with Stack(tmp_path_factory.mktemp("vllm"), LOSING) as stack:
        stack.start_scheduler().ready()
        yield stack


@pytest.fixture(scope="module")
def frontend(stack: Stack) -> Service:
    """A frontend; operators show it a key."""
    service = stack.start_frontend("--admin-key", "secret")
    service.ready()
    return service


@pytest.fixture(scope="module")
def client(stack: Stack, frontend: Service) -> Iterator[httpx.Client]:
    """A client of the frontend."""
    with stack.client(frontend) as client:
        yield client


@pytest.fixture(scope="module")
def pairs(stack: Stack) -> dict[str, Pair]:
    """Two workers with a server each."""
    made = {}
    for name in ("one", "two"):
        port = free_port()
        server = _serve(stack, port)
        url = f"http://127.0.0.1:{port}"
        flags = (
            "--engine",
            "vllm",
            "--model",
            "fake",
            "--worker-name",
            name,
            "--vllm-url",
            url,
            "--vllm-away-s",
            "0.5",
        )
        made[name] = Pair(stack, name, port, server, stack.start("mell_gpu_worker", *flags))
    for pair in made.values():
        pair.worker.ready()
    return made


@pytest.fixture(scope="module")
def story(client: httpx.Client, pairs: dict[str, Pair]) -> str:
    """The undisturbed text of `TOKENS` tokens."""
    text = read_quickly(StreamedChat(client, TOKENS, temperature=0), pairs)
    assert len(text) == TOKENS
    return text


@pytest.fixture
def chat(client: httpx.Client, pairs: dict[str, Pair], story: str) -> StreamedChat:
    """A slow stream that has begun, and is to become `story`."""
    for pair in pairs.values():
        pair.knobs(token_s=TOKEN_S)
    chat = StreamedChat(client, len(story), temperature=0)
    chat.read(10)
    return chat


def read_quickly(chat: StreamedChat, pairs: dict[str, Pair]) -> str:
    """Read a stream to its end from servers that do not take their time any more."""
    for pair in pairs.values():
        if pair.server.process.poll() is None:
            pair.knobs(token_s=0.0)
    return chat.read()


def test_a_worker_says_what_stands_behind_it(frontend: Service, pairs: dict[str, Pair]) -> None:
    """Its server's address, what it can do, and how its blocks are."""

    def shown_workers() -> dict[str, Any]:
        _, status = mell(frontend, "status")
        return {worker["name"]: worker for worker in status["workers"]}

    shown = eventually(lambda: (seen := shown_workers()).keys() == pairs.keys() and seen, "both are known")
    for name, pair in pairs.items():
        assert (shown[name]["engine"], shown[name]["device"]) == ("vllm", f"127.0.0.1:{pair.port}")
        assert shown[name]["migration_modes"] == ["kv", "tokens"]


@pytest.mark.parametrize("mode", ["tokens", "kv"])
def test_a_chat_moves_between_servers(
    chat: StreamedChat, frontend: Service, pairs: dict[str, Pair], story: str, mode: str
) -> None:
    """There and back in mid-stream: each server goes on after the other's last token, and ends what it did before.

    By KV the server that it goes to is told where the other's connector is.
    """
    chat.read(2 * BLOCK_TOKENS)  # a server's cache, and a connector, have whole blocks only
    here, sequence = holder(frontend, chat.id)
    (there,) = set(pairs) - {here}
    for target, source in ((there, here), (here, there)):
        before = len(pairs[target].knobs()["bodies"])
        code, moved = mell(frontend, "migrate", sequence, "--to", target, "--mode", mode)
        assert (code, [move["state"] for move in moved["moves"]]) == (0, ["committed"])
        chat.read(len(chat.text) + 10)
        told = pairs[target].worker.events("migration_committed")[-1]
        assert told["mode"] == mode
        asked = [body.get("kv_transfer_params") for body in pairs[target].knobs()["bodies"][before:]]
        address = f"tcp://127.0.0.1:{pairs[source].port}"
        # Sometimes it ends just where what the target has from the test before does: then there is nothing to fetch.
        fetched = mode == "kv" and told["copied_bytes"] + told["prefilled_tokens"] > 0
        assert (told["copied_bytes"] > 0, {"mell": {"from": address}} in asked) == (fetched, fetched)
    assert not chat.done, "both moves were made in mid-stream"
    assert read_quickly(chat, pairs) == story
    assert chat.finish_reason == "length"
    for pair in pairs.values():
        eventually(lambda pair=pair: pair.knobs()["running"] == 0, "nothing is left at a server")
    eventually(lambda: pairs[there].knobs()["left"], "it was ended there by closing its connection")


def test_a_worker_is_drained_in_mid_stream(
    chat: StreamedChat, frontend: Service, pairs: dict[str, Pair], story: str
) -> None:
    """Its request goes on before the other server, to the same text; undrained it takes work again."""
    name, _ = holder(frontend, chat.id)
    (other,) = set(pairs) - {name}
    assert mell(frontend, "drain", name, "--deadline", "60s", "--wait", "--timeout", "60s")[0] == 0
    assert not chat.done, "it was drained in mid-stream"
    _, status = mell(frontend, "status")
    assert {worker["name"]: worker["state"] for worker in status["workers"]} == {name: "drained", other: "active"}
    assert read_quickly(chat, pairs) == story
    assert mell(frontend, "undrain", name)[0] == 0


def test_structured_output_stays_where_it_began(
    client: httpx.Client, frontend: Service, pairs: dict[str, Pair], story: str
) -> None:
    """A grammar begins anew with each request: such a stream is not moved, and ends with an error with its server."""
    for pair in pairs.values():
        pair.knobs(token_s=TOKEN_S)
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 2 * len(story)}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": schema}}
    chat = StreamedChat(client, 4 * len(story), temperature=0, ignore_eos=False, response_format=form)
    assert chat.read(5).startswith('{"a"')
    name, sequence = holder(frontend, chat.id)
    (other,) = set(pairs) - {name}
    code, moved = mell(frontend, "migrate", sequence, "--to", other, "--mode", "tokens")
    assert (code, [move["state"] for move in moved["moves"]]) == (1, ["failed"])
    assert moved["moves"][0]["reason"] == "bound"
    chat.read(len(chat.text) + 5)
    away, back = (len(pairs[name].worker.events(f"engine_{where}")) for where in ("away", "back"))
    pairs[name].server.kill()
    assert "could not go on" in chat.read_error()["message"]
    eventually(lambda: len(pairs[name].worker.events("engine_away")) > away, "the server is missed")
    pairs[name].restart_server()
    eventually(lambda: len(pairs[name].worker.events("engine_back")) > back, "the worker finds its server again")


def test_a_server_that_is_killed_loses_its_streams_to_the_other(
    chat: StreamedChat, frontend: Service, pairs: dict[str, Pair], story: str
) -> None:
    """The worker stays, says so, and takes nothing until its server is back."""
    name, _ = holder(frontend, chat.id)
    pair = pairs[name]
    away, back = (len(pair.worker.events(f"engine_{where}")) for where in ("away", "back"))
    placed = len(frontend.events("sequence_placed_again"))
    pair.server.kill()
    assert read_quickly(chat, pairs) == story
    eventually(lambda: len(pair.worker.events("engine_away")) > away, "the server is missed")
    eventually(lambda: len(frontend.events("sequence_placed_again")) > placed, "it is placed again")
    pair.restart_server()
    eventually(lambda: len(pair.worker.events("engine_back")) > back, "the worker finds its server again")
    assert pair.worker.process.poll() is None


def test_servers_that_all_restart_cost_time_only(chat: StreamedChat, pairs: dict[str, Pair], story: str) -> None:
    """With nobody to go on elsewhere the stream waits, and ends as it would have."""
    away = {name: len(pair.worker.events("engine_away")) for name, pair in pairs.items()}
    for pair in pairs.values():
        pair.server.kill()
    for name, pair in pairs.items():
        eventually(lambda n=name, p=pair: len(p.worker.events("engine_away")) > away[n], "the server is missed")
    for pair in pairs.values():
        pair.restart_server()
    assert read_quickly(chat, pairs) == story
    assert chat.finish_reason == "length"


def test_a_killed_worker_leaves_nothing_running_at_its_server(
    chat: StreamedChat, frontend: Service, pairs: dict[str, Pair], story: str
) -> None:
    """Its connections end with it; the stream goes on before the other server."""
    name, _ = holder(frontend, chat.id)
    pairs[name].worker.kill()
    assert read_quickly(chat, pairs) == story
    eventually(lambda: pairs[name].knobs()["running"] == 0, "nothing is left at the server")


def test_a_worker_without_its_server_does_not_start(stack: Stack) -> None:
    """One line that says what to do."""
    worker = stack.start("mell_gpu_worker", "--engine", "vllm", "--model", "fake", "--vllm-url", "http://127.0.0.1:9")
    assert worker.exit_code() == 1
    (line,) = worker.lines()
    assert "no vLLM server answers at http://127.0.0.1:9" in line
    assert "--vllm-url" in line
