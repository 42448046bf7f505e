"""The official client, sync and async, against a real server on a loopback port."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import httpx
import openai
import pytest
import pytest_asyncio
import uvicorn

from mell_frontend.asgi import App
from mell_frontend.generation import Delta, GenerationError
from mell_frontend.http_protocol import bounded_protocol
from tests.frontend.scripted_gateway import ScriptedGateway, deltas, say, scored

pytestmark = pytest.mark.connected

USER = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def make_server(app: App, head_timeout_s: float = 60.0, connections: int = 100) -> uvicorn.Server:
    """Return a server of `app` that takes no signals and logs nothing."""
    config = uvicorn.Config(
        app, http=bounded_protocol(2**17, head_timeout_s, connections), log_config=None, ws="none", lifespan="off"
    )
    return uvicorn.Server(config)


@pytest.fixture
def loopback() -> Iterator[socket.socket]:
    """A listening socket on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def url_of(listening: socket.socket) -> str:
    """Return the address to connect to."""
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@asynccontextmanager
async def serving(server: uvicorn.Server, listening: socket.socket) -> AsyncIterator[str]:
    """Run a server in this event loop; yields its address."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.serve(sockets=[listening]))
        yield url_of(listening)
        server.should_exit = True
        await task


@pytest_asyncio.fixture
async def url(build_app: Callable[..., App], loopback: socket.socket) -> AsyncIterator[str]:
    """A real server in this event loop."""
    async with serving(make_server(build_app(max_body_bytes=2**20)), loopback) as address:
        yield address


@pytest_asyncio.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official asynchronous client."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="anything", max_retries=0) as made:
        yield made


@pytest.fixture
def sync_client(build_app: Callable[..., App], loopback: socket.socket) -> Iterator[openai.OpenAI]:
    """The official synchronous client, its server in a thread with its own event loop."""
    server = make_server(build_app())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [loopback]})
    thread.start()
    with openai.OpenAI(base_url=f"{url_of(loopback)}/v1", api_key="anything", max_retries=0) as made:
        yield made
    server.should_exit = True
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_the_synchronous_client(sync_client: openai.OpenAI, gateway: ScriptedGateway) -> None:
    """Models, chat and legacy completions, streamed and not, work as the client's documentation shows them."""
    assert [model.id for model in sync_client.models.list()] == ["fake"]
    assert sync_client.models.retrieve("fake").owned_by == "mell"
    answer = sync_client.chat.completions.create(model="fake", messages=USER)
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    with sync_client.chat.completions.create(model="fake", messages=USER, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello, world!"
    legacy = sync_client.completions.create(model="fake", prompt="Once")
    assert legacy.choices[0].text == "Hello, world!"
    assert all(made.closed.is_set() for made in gateway.streams)


async def test_streaming_with_usage(client: openai.AsyncOpenAI) -> None:
    """The last chunk says what was used."""
    stream = await client.chat.completions.create(
        model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, world!"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 14


async def test_calls_and_structured_answers(client: openai.AsyncOpenAI, gateway: ScriptedGateway) -> None:
    """The client's own parsers understand calls and JSON."""
    gateway.script = say(CALL)
    answer = await client.chat.completions.create(model="fake", messages=USER, tools=TOOLS)
    [call] = answer.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
    async with client.chat.completions.stream(model="fake", messages=USER, tools=TOOLS) as stream:
        final = await stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert call.function.arguments == '{"city": "Rome"}'
    assert final.choices[0].finish_reason == "tool_calls"


async def test_log_probabilities(client: openai.AsyncOpenAI, gateway: ScriptedGateway) -> None:
    """The client's types take both forms of log-probabilities."""
    gateway.script = scored("hi")
    answer = await client.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    assert [entry.bytes for entry in answer.choices[0].logprobs.content or []] == [[104], [105]]
    legacy = await client.completions.create(model="fake", prompt="x", logprobs=2)
    assert legacy.choices[0].logprobs is not None
    assert legacy.choices[0].logprobs.tokens == ["h", "i"]


async def test_errors_are_the_clients_own(client: openai.AsyncOpenAI, gateway: ScriptedGateway) -> None:
    """Each kind of problem raises the client's exception for it, in mid-stream too."""
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        await client.chat.completions.create(model="gpt-9", messages=USER)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(model="fake", messages=USER, temperature=9)
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        await client.embeddings.create(model="fake", input="x")
    gateway.script = lambda _request: [GenerationError("queue_full", "busy", retry_after_s=3)]
    with pytest.raises(openai.RateLimitError) as limited:
        await client.chat.completions.create(model="fake", messages=USER)
    assert limited.value.response.headers["retry-after"] == "3"
    gateway.script = lambda _request: [GenerationError("unavailable", "no worker")]
    with pytest.raises(openai.InternalServerError, match="no worker"):
        await client.chat.completions.create(model="fake", messages=USER, stream=True)
    gateway.script = lambda _request: [Delta([65]), GenerationError("failed", "the engine broke")]
    stream = await client.chat.completions.create(model="fake", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="the engine broke"):
        _ = [chunk async for chunk in stream]


async def test_a_client_that_leaves_cancels_at_once(client: openai.AsyncOpenAI, gateway: ScriptedGateway) -> None:
    """Closing a stream, or giving up on an answer, closes the sequence behind it."""
    gateway.script = lambda _request: [Delta([65])]
    stream = await client.chat.completions.create(model="fake", messages=USER, stream=True)
    assert (await anext(aiter(stream))).choices[0].delta.role == "assistant"
    await stream.close()
    async with asyncio.timeout(60):
        await gateway.streams[0].closed.wait()
    asked = asyncio.create_task(client.chat.completions.create(model="fake", messages=USER))
    async with asyncio.timeout(60):
        while len(gateway.streams) < 2:  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)
        asked.cancel()
        await gateway.streams[1].closed.wait()


async def test_many_streams_at_once(client: openai.AsyncOpenAI, gateway: ScriptedGateway) -> None:
    """Streams that run together do not get in each other's way."""
    gateway.script = lambda request: deltas(f"answer {request.sampling.seed} " * 5)

    async def ask(seed: int) -> str:
        stream = await client.chat.completions.create(model="fake", messages=USER, seed=seed, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*(ask(seed) for seed in range(40)))
    assert answers == [f"answer {seed} " * 5 for seed in range(40)]


async def test_a_hundred_megabytes_are_refused(url: str) -> None:
    """A body far over the limit gets its 413, and the server goes on."""

    async def body(chunks: int) -> AsyncIterator[bytes]:
        for _ in range(chunks):
            yield b"x" * 2**20

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        length = {"content-length": str(100 * 2**20)}
        response = await http.post("/v1/chat/completions", content=body(100), headers=length)
        assert response.status_code == 413
        response = await http.post("/v1/chat/completions", content=body(100))
        assert response.status_code == 413
        assert (await http.get("/health")).status_code == 200


async def exchange(url: str, data: bytes) -> bytes:
    """Send raw bytes and return all that comes back until the server closes."""
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(60):
            writer.write(data)
            return await reader.read()
    finally:
        writer.close()


async def test_what_is_no_http_is_told_so(url: str) -> None:
    """Garbage, and a head that never ends, get an OpenAI error and a closed connection."""
    answer = await exchange(url, b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code": "invalid_http"' in answer
    # Not a byte more than it takes: unread bytes would make the close a reset.
    answer = await exchange(url, b"GET /health HTTP/1.1\r\nx-endless: ".ljust(2**17 + 1, b"y"))
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code": "headers_too_large"' in answer


async def test_a_head_that_does_not_come_is_not_waited_for(
    build_app: Callable[..., App], loopback: socket.socket
) -> None:
    """A connection that sends nothing, or half a head, is closed after a while; later requests have their own time."""
    async with serving(make_server(build_app(), head_timeout_s=0.2), loopback) as url:
        for data in (b"", b"GET /health HTTP/1.1\r\n"):
            assert (await exchange(url, data)).startswith(b"HTTP/1.1 408 ")
        request = b"GET /health HTTP/1.1\r\nhost: x\r\n"
        answer = await exchange(url, (request + b"\r\n") * 2 + request + b"connection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200 ") == 3


async def test_too_many_connections_are_turned_away(build_app: Callable[..., App], loopback: socket.socket) -> None:
    """Beyond the bound a connection gets a 503 at once and is closed; when others have gone the next is served."""
    async with serving(make_server(build_app(), connections=2), loopback) as url:
        parts = httpx.URL(url)
        idle = [await asyncio.open_connection(parts.host, parts.port) for _ in range(2)]
        answer = await exchange(url, b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        for _, writer in idle:
            writer.close()
        request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        async with asyncio.timeout(60):
            answer = b""
            while not answer.startswith(b"HTTP/1.1 200 "):
                with suppress(ConnectionError):  # turned away before it was heard
                    answer = await exchange(url, request)
                await asyncio.sleep(0.01)
