"""A small HTTP/1.1 client for streamed answers, a quarter of a general client's cost for each piece read.

The load generator shares a machine with the server under test often enough that its own CPU time would falsify the
result. Connections are kept and used again. Only what a streaming POST needs is here.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

_READ_BYTES = 1 << 16
_LONGEST_HEAD_BYTES = 1 << 16
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")
_DECIMAL = re.compile(r"[0-9]{1,15}")


class HttpError(Exception):
    """The server's answer is no HTTP/1.1, or broke off; the message is a short kind for counting."""


class Body:
    """Takes a body's raw bytes apart; `done` once it is complete. This one ends with the connection."""

    reusable = False

    def __init__(self) -> None:
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Return the content in `data`."""
        return data

    def end(self) -> None:
        """Take note that the server closed the connection; raises `HttpError` if more had to come."""
        self.done = True


class SizedBody(Body):
    """A body whose length the head gives."""

    reusable = True

    def __init__(self, length: int) -> None:
        super().__init__()
        self._left = length
        self.done = length == 0

    def feed(self, data: bytes) -> bytes:
        """Return the content in `data`."""
        taken = data[: self._left]
        self._left -= len(taken)
        self.done = self._left == 0
        return taken

    def end(self) -> None:
        """Raise: the length was not reached."""
        raise HttpError("broken off")


class ChunkedBody(Body):
    """A body in chunks, each behind its length in hexadecimal digits (RFC 9112, section 7.1)."""

    reusable = True

    def __init__(self) -> None:
        super().__init__()
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """Return the content of the chunks that `data` completes."""
        data = self._buffer + data if self._buffer else data
        found = []
        at = 0
        while not self.done:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            size = _chunk_size(data[at:line_end])
            start, end = line_end + 2, line_end + 2 + size
            if len(data) < end + 2:
                break
            found.append(data[start:end])
            at = end + 2
            self.done = size == 0  # trailers are not asked for, so the empty chunk is followed by an empty line
        self._buffer = data[at:]
        return found[0] if len(found) == 1 else b"".join(found)

    def end(self) -> None:
        """Raise: the last chunk had not come."""
        raise HttpError("broken off")


@dataclass(slots=True)
class Response:
    """An answer's status, and its body to be read piece by piece."""

    status: int
    _body: Body
    _first: bytes
    _reader: asyncio.StreamReader

    async def read(self) -> bytes:
        """Return the next bytes of the body as they come; empty at its end. Raises `HttpError`, `OSError`."""
        while not self._body.done:
            data, self._first = self._first or await self._reader.read(_READ_BYTES), b""
            if not data:
                self._body.end()
            elif content := self._body.feed(data):
                return content
        return b""

    async def read_all(self) -> bytes:
        """Return the whole body; raises as `read`."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)


class HttpClient:
    """POSTs to one server over kept connections. `close` ends them."""

    def __init__(self, origin: str, headers: dict[str, str]) -> None:
        parts = urlsplit(origin)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path.rstrip("/")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        fields = {"host": parts.netloc.rpartition("@")[2], "content-type": "application/json", **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[Response]:
        """Send `body`; on the way out an answer not read to its end closes its connection.

        Raises `HttpError`, `OSError`.
        """
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._fields}content-length: {len(body)}\r\n\r\n"
        reader, writer, response = await self._exchange(head.encode() + body)
        try:
            yield response
        finally:
            if response._body.done and response._body.reusable:
                self._kept.append((reader, writer))
            else:
                writer.close()

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._kept:
            self._kept.pop()[1].close()

    async def _exchange(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Response]:
        while self._kept:
            reader, writer = self._kept.pop()
            try:
                return reader, writer, await _ask(reader, writer, request)
            except (HttpError, OSError):
                writer.close()  # the server had closed it; nothing was answered, so it may be asked again
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._ssl)
        try:
            return reader, writer, await _ask(reader, writer, request)
        except BaseException:
            writer.close()
            raise


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Response:
    writer.write(request)
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        data = await reader.read(_READ_BYTES)
        if not data or len(received) > _LONGEST_HEAD_BYTES:
            raise HttpError("no HTTP answer")
        received += data
    status, fields = _head(received[:end])
    return Response(status, _body(fields), received[end + 4 :], reader)


def _head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if not words[0].startswith("HTTP/1.") or len(words) < 2 or not _DECIMAL.fullmatch(words[1]):
        raise HttpError("no HTTP answer")
    pairs = (line.partition(":") for line in lines)
    return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _body(fields: dict[str, str]) -> Body:
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return ChunkedBody()
    if _DECIMAL.fullmatch(length := fields.get("content-length", "")):
        return SizedBody(int(length))
    return Body()


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    # Not `int` alone: a sign, which it takes, would send the reader back to where it was.
    if not _CHUNK_SIZE.fullmatch(digits):
        raise HttpError("a broken chunk")
    return int(digits, 16)
