"""A server that answers completions from a script, for the load generator's tests: real sockets, no model."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mell_shared.clock import ManualClock


class LockstepClock(ManualClock):
    """A clock moved by the server before each piece, and held until the client has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = asyncio.Semaphore(0)

    def now_us(self) -> int:
        """Return the time, and let the server go on."""
        self.reads.release()
        return super().now_us()

    async def pass_us(self, step_us: int) -> None:
        """Move on by `step_us` and forget earlier reads."""
        self.advance_us(step_us)
        while not self.reads.locked():
            await self.reads.acquire()


@dataclass(slots=True)
class Request:
    """One request as the server read it."""

    path: str
    headers: dict[str, str]
    body: dict[str, object]
    connection: int


@dataclass(slots=True)
class Exchange:
    """One answer being given; `send` writes body text, `sized` and `chunked` begin it."""

    request: Request
    writer: asyncio.StreamWriter
    chunks: bool = True

    def begin(self, status: int = 200, kind: str = "text/event-stream", length: int | None = None) -> None:
        """Write the head; with `length` the body is not chunked, with -1 it lasts until the end of the connection."""
        self.chunks = length is None
        framing = {None: "transfer-encoding: chunked\r\n", -1: "connection: close\r\n"}.get(
            length, f"content-length: {length}\r\n"
        )
        self.writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{framing}\r\n".encode())

    def send(self, text: str) -> None:
        """Write a part of the body."""
        data = text.encode()
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data) if self.chunks else data)

    def end(self) -> None:
        """Write the end of a chunked body."""
        self.writer.write(b"0\r\n\r\n")


def event(value: object) -> str:
    """Return one server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def piece(text: str, finish: str | None = None) -> str:
    """Return one chat chunk."""
    delta = {"content": text} if text else {}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})


def usage(prompt: int, output: int, cached: int = 0) -> str:
    """Return the last chunk."""
    details = {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return event({"choices": [], "usage": counts})


async def plain_answer(exchange: Exchange) -> None:
    """Answer as a good server does: as many one-word pieces as tokens asked for; a prompt has words + 10 tokens."""
    body = exchange.request.body
    prompt = str(body.get("prompt") or body["messages"][0]["content"])  # type: ignore[index]
    count = int(str(body["max_tokens"]))
    exchange.begin()
    exchange.send(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    for _ in range(count):
        exchange.send(piece("word "))
        await asyncio.sleep(0)
    exchange.send(piece("", finish="length"))
    exchange.send(usage(len(prompt.split()) + 10, count))
    exchange.send("data: [DONE]\n\n")
    exchange.end()


@dataclass(slots=True)
class Server:
    """Answers every POST with `answer`; keeps what was asked."""

    answer: Callable[[Exchange], object] = plain_answer
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests until it closes."""
        self.connections += 1
        connection = self.connections
        try:
            while (request := await _read_request(reader, connection)) is not None:
                self.requests.append(request)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    await self._answer(Exchange(request, writer))
                finally:
                    self.in_flight -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.request.path == "/v1/models":
            text = json.dumps({"data": [{"id": "listed"}]})
            exchange.begin(kind="application/json", length=len(text))
            exchange.send(text)
            return
        result = self.answer(exchange)
        if asyncio.iscoroutine(result):
            await result


@asynccontextmanager
async def serving(answer: Callable[[Exchange], object] = plain_answer) -> AsyncIterator[Server]:
    """Run a server on a free port of loopback."""
    made = Server(answer)
    listener = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        listener.close()
        await listener.wait_closed()


async def _read_request(reader: asyncio.StreamReader, connection: int) -> Request | None:
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    if not head:
        return None
    first, *lines = head.decode().strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(first.split()[1], headers, json.loads(body or b"{}"), connection)
