import asyncio
import signal
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from mell_shared.messages.scheduler import MigrationCommitted, MigrationFailed
from tests.cluster.mover import mover
from tests.cluster.stack import Service, Stack, StreamedChat, eventually, whole_text

pytestmark = pytest.mark.connected

TOKENS, STEP_US = 1_500, 60_000
"""A stream of a minute and a half: long enough for all that is to happen within it, on a slow machine too."""
FLAGS = ("--fake-kv-bytes-per-token", "4096", "--lane-probes", "0")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker, a frontend and a scheduler that moves nothing by itself."""
    with Stack(tmp_path_factory.mktemp("moves")) as stack:
        stack.start_scheduler("--policy", "best-fit").ready()
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[httpx.Client]:
    """A client of the frontend."""
    with stack.client(stack.start_frontend()) as client:
        yield client


@pytest.fixture(scope="module")
def story(stack: Stack, client: httpx.Client) -> str:
    """The undisturbed beginning, of more tokens than are read."""
    worker = stack.start_worker("undisturbed", *FLAGS, step_us=200)
    worker.ready()
    text = whole_text(client, 400)
    worker.ask_to_stop()
    worker.exit_code()
    return text


def data_port(worker: Service) -> tuple[str, int]:
    """Where a worker says that its KV comes in."""
    (told,) = worker.events("data_port") + worker.events("data_port_slow")
    address = urlsplit(told["address"])
    assert address.hostname == "127.0.0.1", "the way to a broker on loopback"
    assert address.port is not None
    return address.hostname, address.port


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_a_streamed_chat_is_moved_in_every_mode(stack: Stack, client: httpx.Client, story: str, transport: str) -> None:
    """There and back by KV, there and back by both, there by tokens, over real links; its reader notices nothing."""
    names = [f"{transport}-1", f"{transport}-2"]
    workers = [stack.start_worker(name, "--transport", transport, *FLAGS, step_us=STEP_US) for name in names]
    for worker in workers:
        worker.ready()

    async def move_about(chat: StreamedChat) -> list[MigrationCommitted | MigrationFailed]:
        async with mover(stack.broker.url) as moves:
            source, *_ = await moves.holder()
            here, there = (names if source.startswith(names[0]) else names[::-1])[:2]
            outcomes = []
            for target, order in (
                (there, {"mode": "kv"}),
                (here, {"mode": "kv"}),
                (there, {"mode": "hybrid", "split_tokens": 16}),
                (here, {"mode": "hybrid", "split_tokens": 32}),
                (there, {"mode": "tokens"}),
            ):
                outcomes.append(await moves.move(target, **order))
                await asyncio.to_thread(chat.read, len(chat.text) + 10)
            return outcomes

    chat = StreamedChat(client, TOKENS)
    chat.read(20)
    outcomes = asyncio.run(move_about(chat))
    assert all(isinstance(outcome, MigrationCommitted) for outcome in outcomes), outcomes
    assert not chat.done, "all moves were made in mid-stream"
    assert story.startswith(chat.read(len(chat.text) + 20))
    chat.leave()
    for worker in workers:
        worker.ask_to_stop()
    for worker in workers:
        assert worker.exit_code() == 0


def test_a_stopped_target_and_a_stranger_cost_nothing(stack: Stack, client: httpx.Client, story: str) -> None:
    """Rubbish at the data port is turned away; a target that stands still is given up, and the stream goes on."""
    flags = ("--transport", "tcp", "--move-timeout-s", "10", *FLAGS)
    workers = {name: stack.start_worker(name, *flags, step_us=STEP_US) for name in ("one", "two")}
    for worker in workers.values():
        worker.ready()
    chat = StreamedChat(client, TOKENS)
    chat.read(5)

    async def disturb() -> tuple[Service, MigrationCommitted | MigrationFailed]:
        async with mover(stack.broker.url) as moves:
            source, *_ = await moves.holder()
            here, there = ("one", "two") if source.startswith("one-") else ("two", "one")
            with socket.create_connection(data_port(workers[there]), timeout=60) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
                moved = await moves.move(there)
            assert isinstance(moved, MigrationCommitted), moved
            workers[here].process.send_signal(signal.SIGSTOP)
            failed = await moves.move(here)
            workers[here].process.send_signal(signal.SIGCONT)
            return workers[there], failed

    visited, failed = asyncio.run(disturb())
    assert isinstance(failed, MigrationFailed)
    assert failed.reason in {"timeout", "unreachable"}
    assert not chat.done, "all of it happened in mid-stream"
    assert story.startswith(chat.read(len(chat.text) + 20))
    chat.leave()
    eventually(
        lambda: visited.events("transport_stranger_turned_away") or visited.events("transport_refused"),
        "the stranger is turned away",
    )
    for worker in workers.values():
        worker.ask_to_stop()
        assert worker.exit_code() == 0
