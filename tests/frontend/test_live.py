"""The feed of the dashboard: one poll for all who watch, none for nobody; what goes wrong is told and passes."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from mell_frontend.asgi import Message
from mell_frontend.exchange import Exchange
from mell_frontend.generation import GenerationError
from mell_frontend.live import LiveFeed
from mell_frontend.pulse import Pulse
from mell_frontend.record import RequestRecord
from mell_shared.messages.admin import NOWHERE, AdminRefused, Live, LiveRequest, MovingReply, Status
from mell_shared.messages.live import LIVE_STATE, LIVE_TROUBLE
from mell_shared.testing import VirtualTimeLoop, run_virtually
from tests.frontend.scripted_gateway import ScriptedGateway

EMPTY = Status(scheduler="s", policy="repack", uptime_s=1.0, workers=(), queued=0, placed=0, rejected=0)


class Watcher:
    """One client of the feed: its connection, and the events that came, each with its time in seconds."""

    def __init__(self, feed: LiveFeed) -> None:
        self.gone = asyncio.Event()
        self.events: list[tuple[float, str, Any]] = []
        self.status = 0
        self.ended = False
        record = RequestRecord("r", "GET", "/admin/live", 0)
        self._exchange = Exchange(self._receive, self._send, self._send, record, write_timeout_s=5.0)
        self.task = asyncio.create_task(self._exchange.run(feed.watch(self._exchange)))

    async def _receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.ended = not message.get("more_body", False)
        for event in message["body"].decode().split("\n\n")[:-1]:
            kind, data = event.split("\n")
            loop = asyncio.get_running_loop()
            self.events.append((loop.time(), kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))

    async def leave(self) -> None:
        """Close the connection."""
        self.gone.set()
        await self.task


class Scene:
    """A feed around a scripted gateway, in virtual time."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        self.gateway = ScriptedGateway()
        self.pulse = Pulse()
        self.feed = LiveFeed(self.gateway, loop, self.pulse, interval_s=1.0)
        self.watchers: list[Watcher] = []

    def watch(self) -> Watcher:
        """One more watches."""
        self.watchers.append(Watcher(self.feed))
        return self.watchers[-1]

    @property
    def polls(self) -> int:
        """How often the scheduler was asked."""
        assert all(isinstance(order, LiveRequest) for order in self.gateway.orders)
        return len(self.gateway.orders)


def in_scene(play: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    """Play in virtual time; everybody leaves at the end."""

    async def main() -> None:
        scene = Scene()
        await play(scene)
        for watcher in scene.watchers:
            await watcher.leave()

    run_virtually(main())


def test_a_watcher_gets_a_state_at_once_and_one_each_interval() -> None:
    """Numbers rise; it is one long response of events."""

    async def play(scene: Scene) -> None:
        watcher = scene.watch()
        await asyncio.sleep(3.5)
        assert watcher.status == 200
        assert [(at, kind, data["number"]) for at, kind, data in watcher.events] == [
            (0.0, "state", 1),
            (1.0, "state", 2),
            (2.0, "state", 3),
            (3.0, "state", 4),
        ]
        LIVE_STATE.validate_python(watcher.events[0][2])

    in_scene(play)


def test_many_watchers_cost_the_scheduler_one_poll() -> None:
    """Whoever comes between gets what the others have; each gets every state once."""

    async def play(scene: Scene) -> None:
        for _ in range(20):
            scene.watch()
            await asyncio.sleep(0.01)
        await asyncio.sleep(4.4)
        assert scene.polls == 5
        for watcher in scene.watchers:
            assert [data["number"] for _, _, data in watcher.events] == [1, 2, 3, 4, 5]
            assert watcher.events[0][0] < 0.3, "the latest state, at once"

    in_scene(play)


def test_nobody_watches_nobody_asks() -> None:
    """The last one to leave ends the polls; the next to come gets a state of now, not an old one."""

    async def play(scene: Scene) -> None:
        await asyncio.sleep(5)
        assert scene.polls == 0
        watcher = scene.watch()
        await asyncio.sleep(1.5)
        await watcher.leave()
        asked = scene.polls
        await asyncio.sleep(10)
        assert scene.polls == asked
        late = scene.watch()
        await asyncio.sleep(0.1)
        assert [data["number"] for _, _, data in late.events] == [asked + 1]

    in_scene(play)


def test_the_others_go_on_when_one_leaves_in_the_middle_of_its_poll() -> None:
    """Its turn passes to the next."""

    async def play(scene: Scene) -> None:
        answering, answer = asyncio.Event(), asyncio.Event()
        usual = scene.gateway.admin

        async def slow(request: Any) -> Any:
            answering.set()
            await answer.wait()
            return await usual(request)

        scene.gateway.admin = slow  # type: ignore[method-assign]
        first, second = scene.watch(), scene.watch()
        await answering.wait()
        await first.leave()
        answer.set()
        await asyncio.sleep(2.5)
        assert len(second.events) >= 2

    in_scene(play)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (GenerationError("unavailable", "no scheduler answers (no responder)"), "no responder"),
        (AdminRefused(reason="not_leader", message="this scheduler does not lead"), "does not lead"),
        (MovingReply(paused=True), "another release"),
    ],
)
def test_trouble_is_told_and_passes(answer: Any, told: str) -> None:
    """While there is no state every watcher hears why, and the next state comes by itself."""

    async def play(scene: Scene) -> None:
        scene.gateway.answers += [answer, answer]
        watcher = scene.watch()
        await asyncio.sleep(2.5)
        assert [kind for _, kind, _ in watcher.events] == ["trouble", "trouble", "state"]
        assert told in LIVE_TROUBLE.validate_python(watcher.events[0][2]).message

    in_scene(play)


def test_a_frontend_that_stops_lets_its_watchers_go() -> None:
    """With a last word, so that it need not wait for them."""

    async def play(scene: Scene) -> None:
        watcher = scene.watch()
        await asyncio.sleep(0.5)
        scene.gateway.stopping = True
        await asyncio.sleep(1)
        assert watcher.ended
        assert "stopping" in watcher.events[-1][2]["message"]
        assert watcher.task.done()

    in_scene(play)


def test_one_that_reads_no_more_is_given_up() -> None:
    """It holds nobody else up, and does not hold its connection for ever."""

    async def play(scene: Scene) -> None:
        stuck, other = scene.watch(), scene.watch()
        stuck._exchange._send = _never  # type: ignore[method-assign,assignment]
        stuck._exchange._send_body = _never  # type: ignore[method-assign,assignment]
        await asyncio.sleep(12)
        assert stuck.task.done()
        assert len(other.events) == 12

    in_scene(play)


async def _never(_message: Message) -> None:
    await asyncio.Event().wait()


def test_rows_and_figures() -> None:
    """Columns as JSON, -1 for nowhere; tokens per second and times to the first token of the last minute."""

    async def play(scene: Scene) -> None:
        scene.gateway.answers.append(
            Live(
                status=EMPTY,
                sequences=("s0", "s\u00e4"),
                workers=[0, NOWHERE],
                targets=[1, NOWHERE],
                tokens=[5, 6],
                blocks=[1, 0],
                states=[2, 3],
                used_lately=[1, 2],
                shadow_lately=[2, 2],
                sample_s=0.5,
            )
        )
        scene.pulse.first_token(9_000_000, 0)
        await asyncio.sleep(61)
        for took_ms in range(1, 101):
            scene.pulse.first_token(took_ms * 1_000, 61_000_000)
        scene.gateway.tokens_accepted = 1_000
        watcher = scene.watch()
        await asyncio.sleep(0.5)
        scene.gateway.tokens_accepted = 1_300
        await asyncio.sleep(1)
        state, later = (LIVE_STATE.validate_python(data) for _, _, data in watcher.events)
        assert state.rows.sequence == ["s0", "s\u00e4"]
        assert (state.rows.worker, state.rows.target, state.rows.state) == ([0, -1], [1, -1], [2, 3])
        assert (state.lately.sample_s, state.lately.used, state.lately.shadow) == (0.5, [1, 2], [2, 2])
        figures = state.frontend
        assert (figures.first_tokens, figures.ttft_p50_s, figures.ttft_p99_s) == (100, 0.05, 0.099)
        assert figures.tokens_per_s == 0.0, "nobody looked before"
        assert later.frontend.tokens_per_s == pytest.approx(300)

    in_scene(play)


# --- over HTTP


@asynccontextmanager
async def streaming(app: Any, **headers: str) -> Any:
    """Ask for `/admin/live` and give the ASGI messages of the answer as they come; leave at the end."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/admin/live",
        "raw_path": b"/admin/live",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *((name.encode(), value.encode()) for name, value in headers.items())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    async with AsyncExitStack() as stack:
        task = asyncio.create_task(app(scope, receive, messages.put))
        stack.push_async_callback(lambda: asyncio.wait_for(task, 60))
        stack.callback(gone.set)
        yield messages


async def test_the_stream_over_http(build_app: Callable[..., Any]) -> None:
    """Events of a type that nothing on the way keeps back, for the admin key alone."""
    app = build_app(admin_key="secret")
    async with streaming(app, authorization="Bearer secret") as messages:
        start = await asyncio.wait_for(messages.get(), 60)
        assert start["status"] == 200
        assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
        assert dict(start["headers"])[b"cache-control"] == b"no-cache"
        body = (await asyncio.wait_for(messages.get(), 60))["body"]
        assert body.startswith(b"event: state\ndata: {")
    async with streaming(app) as messages:
        assert (await asyncio.wait_for(messages.get(), 60))["status"] == 401


async def test_the_feed_is_described(client: httpx.AsyncClient) -> None:
    """As a stream of events, with what a state holds."""
    document = (await client.get("/openapi.json")).json()
    answers = document["paths"]["/admin/live"]["get"]["responses"]["200"]["content"]
    assert answers["text/event-stream"]["schema"]["$ref"].endswith("/LiveState")
    assert "LiveRows" in document["components"]["schemas"]


async def test_answers_tell_the_pulse_when_they_begin(build_app: Callable[..., Any]) -> None:
    """A request that was answered shows in the next state."""
    app = build_app()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        ask = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
        assert (await client.post("/v1/chat/completions", json=ask)).status_code == 200
    async with streaming(app) as messages:
        await asyncio.wait_for(messages.get(), 60)
        body = (await asyncio.wait_for(messages.get(), 60))["body"].decode()
    state = LIVE_STATE.validate_json(body.partition("data: ")[2])
    assert state.frontend.first_tokens == 1
    assert state.frontend.frontend == "frontend-1"
