"""Events for other systems at a frontend: what it tells of requests, and what operators read there."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from mell_frontend import event_feed
from mell_frontend.app import create_app
from mell_frontend.event_feed import EventFeed
from mell_frontend.generation import GenerationError
from mell_frontend.served import load_models
from mell_frontend.settings import FrontendSettings
from mell_frontend.telling import RequestTeller
from mell_shared.events.data import EventData, FrontendState, RequestArrived, RequestFinished, RequestRefused
from mell_shared.events.memory import MemoryEventStore
from mell_shared.events.store import EventRecord, StoredEvent
from tests.frontend.scripted_gateway import ScriptedGateway, deltas

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "secret words"}]}


class Told:
    """An app with the events on, and what it told."""

    def __init__(self, gateway: ScriptedGateway, folder: Path) -> None:
        self.events: list[EventData] = []
        self.store = MemoryEventStore()
        self.teller = RequestTeller(self.events.append)
        self.feed = EventFeed(self.store, 60.0)
        settings = FrontendSettings(_env_file=None, models=["fake"], model_dir=folder, api_keys=["k"])
        models = load_models(settings.models, folder, None)
        app = create_app(settings, gateway, models, CollectorRegistry(), teller=self.teller, feed=self.feed)
        transport = httpx.ASGITransport(app=app)
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers={"authorization": "Bearer k"}
        )

    async def put(self, first: int, last: int, kind: str = "worker.active") -> None:
        """Let the stream have events with these numbers, as another process writes them."""
        records = [
            EventRecord(kind, f"s/{number}", json.dumps({"n": number, "ü": "ü"}).encode())
            for number in range(first, last + 1)
        ]
        await self.store.append(records)

    async def read(self, query: str = "", **headers: str) -> list[int]:
        """The numbers of the events that a reader gets."""
        answer = await self.client.get(f"/admin/events?{query}", headers=headers)
        assert answer.status_code == 200, answer.text
        return [json.loads(line[6:])["n"] for line in answer.text.splitlines() if line.startswith("data: ")]


@pytest.fixture
def told(gateway: ScriptedGateway, tmp_path: Path) -> Told:
    """An app with the events on."""
    return Told(gateway, tmp_path)


async def test_a_request_is_told_when_it_arrives_and_when_it_is_over(told: Told) -> None:
    """Two events, with what it was and what it cost."""
    answer = (await told.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})).json()
    arrived, finished = told.events
    assert isinstance(arrived, RequestArrived)
    assert isinstance(finished, RequestFinished)
    assert (arrived.request_id, arrived.answer_id, arrived.model, arrived.choices) == ("mine", answer["id"], "fake", 1)
    assert arrived.prompt_tokens == finished.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert finished.completion_tokens == answer["usage"]["completion_tokens"]
    assert (finished.outcome, finished.finish_reasons) == ("complete", {"stop": 1})
    assert 0 <= finished.ttft_s <= finished.duration_s


async def test_no_event_holds_a_word_of_the_request_or_its_answer(told: Told) -> None:
    """Whatever a client asks, and whatever it is answered."""
    await told.client.post("/v1/chat/completions", json=CHAT | {"stop": ["secret stop"], "user": "secret user"})
    written = "".join(event.model_dump_json() for event in told.events)
    assert "Hello" not in written
    assert "secret" not in written


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (GenerationError("queue_full", "later", retry_after_s=1.0), 429, "queue_full"),
        (GenerationError("unavailable", "no worker"), 503, "unavailable"),
    ],
)
async def test_a_request_without_room_is_told_as_refused(
    told: Told, gateway: ScriptedGateway, error: GenerationError, status: int, code: str
) -> None:
    """It arrived, and got no token; the code is the one its client saw."""
    gateway.script = lambda _request: [error]
    answer = await told.client.post("/v1/chat/completions", json=CHAT)
    arrived, refused = told.events
    assert isinstance(arrived, RequestArrived)
    assert isinstance(refused, RequestRefused)
    assert (refused.status, answer.status_code) == (status, status)
    assert refused.error == answer.json()["error"]["code"]


async def test_a_failure_in_mid_answer_is_told(told: Told, gateway: ScriptedGateway) -> None:
    """It got tokens, and not all of them."""
    gateway.script = lambda _request: [*deltas("Hello")[:3], GenerationError("failed", "broken")]
    await told.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    finished = told.events[-1]
    assert isinstance(finished, RequestFinished)
    assert (finished.outcome, finished.completion_tokens) == ("failed", 3)
    assert finished.error


async def test_what_was_not_read_is_not_told(told: Told) -> None:
    """A body that is none, a wrong key, another path: nothing arrived."""
    await told.client.post("/v1/chat/completions", json={"model": "fake"})
    await told.client.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer wrong"})
    await told.client.get("/v1/models")
    assert told.events == []


async def test_the_state_names_the_open_requests(told: Told, gateway: ScriptedGateway) -> None:
    """A reader that missed something knows what still runs; one that leaves is over."""
    gateway.script = lambda _request: []  # waits for ever
    asked = asyncio.create_task(told.client.post("/v1/chat/completions", json=CHAT))
    async with asyncio.timeout(60):
        while not gateway.streams:  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)
    arrived = told.events[0]
    assert isinstance(arrived, RequestArrived)
    assert told.teller.state() == FrontendState(open_requests=(arrived.answer_id,))
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert told.teller.state() == FrontendState(open_requests=())


async def test_operators_read_the_last_events_or_those_after_one(told: Told) -> None:
    """In order; by number of the last, by position, or as a browser resumes."""
    await told.put(1, 600)
    assert await told.read() == list(range(581, 601))
    assert await told.read("last=500") == list(range(101, 601))
    assert await told.read("last=0") == []
    assert await told.read("after=598") == [599, 600]
    assert await told.read("", **{"last-event-id": "599"}) == [600]


async def test_events_are_chosen_by_type(told: Told) -> None:
    """A pattern chooses; the position is that of the whole stream."""
    await told.put(1, 3, "worker.active")
    await told.put(4, 5, "request.placed")
    assert await told.read("type=request.*") == [4, 5]
    answer = await told.client.get("/admin/events?type=request.placed")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.startswith("id: 4\nevent: request.placed\ndata: {")
    assert answer.text.isascii()


async def test_who_follows_gets_what_comes_until_the_frontend_stops(told: Told) -> None:
    """New events come without asking again; a stop ends the answer in order."""
    await told.put(1, 2)
    reading = asyncio.create_task(told.read("follow=true&after=1"))
    await asyncio.sleep(0)
    await told.put(3, 4)
    told.feed.stop()
    async with asyncio.timeout(60):
        assert await reading == [2, 3, 4]


async def test_who_waits_for_what_is_rare_hears_that_the_connection_lives_and_how_far_it_is(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while other events come all the time; whoever asks again goes on there, and misses nothing."""
    monkeypatch.setattr(event_feed, "_QUIET_S", 0.0)
    read, reads = told.store.read, 0

    async def read_busily(after: int, limit: int) -> list[StoredEvent]:
        nonlocal reads
        reads += 1
        if reads == 30:
            told.feed.stop()
        elif reads < 30:
            await told.put(reads, reads, "request.placed")
        return await read(after, limit)

    monkeypatch.setattr(told.store, "read", read_busily)
    text = (await told.client.get("/admin/events?follow=true&last=0&type=worker.lost")).text
    ids = [int(line.removeprefix("id: ")) for line in text.splitlines() if line.startswith("id: ")]
    assert ids == list(range(30))
    assert "data:" not in text


@pytest.mark.parametrize(
    "query", ["type=request.finish", "follow=maybe", "last=-1", "last=10001", "last=x", "after=1.5", f"after={2**70}"]
)
async def test_a_bad_question_is_told_what_is_wrong(told: Told, query: str) -> None:
    """Before anything is asked of the broker."""
    answer = await told.client.get(f"/admin/events?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


async def test_without_broker_or_with_events_off_it_says_so(
    told: Told, connect: Callable[..., httpx.AsyncClient]
) -> None:
    """A 503 that names the reason."""
    told.store.reachable = False
    answer = await told.client.get("/admin/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    answer = await connect().get("/admin/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "events_off")


async def test_a_broker_lost_while_reading_ends_the_answer_with_the_reason(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader sees an error instead of an end."""
    await told.put(1, 2)
    read = told.store.read

    async def read_once(after: int, limit: int) -> list[StoredEvent]:
        told.store.reachable = after == 0
        return await read(after, limit)

    monkeypatch.setattr(told.store, "read", read_once)
    text = (await told.client.get("/admin/events?follow=true&after=0")).text
    assert [line[:5] for line in text.splitlines() if line.startswith("id: ")] == ["id: 0", "id: 1", "id: 2"]
    assert json.loads(text.splitlines()[-2].removeprefix("data: "))["error"]["code"] == "unavailable"


async def test_events_need_the_admin_key(connect: Callable[..., httpx.AsyncClient]) -> None:
    """Request ids and hosts are not for everybody."""
    client = connect(admin_key="secret")
    assert (await client.get("/admin/events")).status_code == 401


async def test_the_description_knows_the_events(told: Told) -> None:
    """The OpenAPI document names the parameters and that it streams."""
    document: dict[str, Any] = (await told.client.get("/openapi.json")).json()
    operation = document["paths"]["/admin/events"]["get"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {"last", "after", "follow", "type"}
    assert "text/event-stream" in operation["responses"]["200"]["content"]
