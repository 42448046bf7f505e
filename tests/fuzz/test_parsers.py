"""What comes from files and from other servers: traces, event streams, HTTP bodies, frames of the data path."""

import asyncio
import gzip
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_console.bench.http1 import ChunkedBody, HttpError, _body, _head
from mell_console.bench.sse import StreamReader, error_kind
from mell_console.bench.workload import TraceError as BenchTraceError
from mell_console.bench.workload import read_trace as read_bench_trace
from mell_frontend.http_protocol import bounded_protocol
from mell_gpu_worker.transport.base import ProtocolError
from mell_gpu_worker.transport.frames import FRAME_BYTES, MAX_GROUP, Answer, Group, Hello, Verdict
from mell_scheduler.sim.trace import TraceError, read_trace
from tests.fuzz.budget import examples

Count = Callable[[str], None]

CSV = "arrival_s,prompt_tokens,output_tokens\n0,10,10\n1.5,20,30\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
MOONCAKE = '{"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": [1, 2]}\n'

tokens = st.sampled_from(
    ["0", "1", "-1", "1e400", "nan", "inf", "9" * 5000, '"', "\n", ",", "{", "[" * 3000, "²", "\x00", "null", "true"]
)


@st.composite
def damaged(draw: st.DrawFn, whole: str) -> str:
    """Return a valid text with pieces cut out, doubled, or put in."""
    text = whole * draw(st.integers(1, 3))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(text)))
        end = draw(st.integers(at, min(len(text), at + 12)))
        text = text[:at] + draw(tokens | st.text(max_size=6)) + text[end:]
    return text


traces = st.one_of(
    st.text(max_size=200).map(str.encode),
    st.binary(max_size=200),
    *(damaged(whole).map(str.encode) for whole in (CSV, AZURE, MOONCAKE)),
)


@st.composite
def trace_files(draw: st.DrawFn) -> bytes:
    """Return a trace, perhaps compressed, perhaps broken after that."""
    data = draw(traces)
    if draw(st.booleans()):
        packed = bytearray(gzip.compress(data, mtime=0))
        for _ in range(draw(st.integers(0, 2))):
            packed[draw(st.integers(2, len(packed) - 1))] ^= draw(st.integers(1, 255))
        data = bytes(packed[: draw(st.integers(2, len(packed)))])
    return data


@examples(150)
@given(trace_files())
def test_any_file_is_a_trace_or_an_error(tried: Count, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """The simulator's reader says in one message what is wrong, or returns requests in order."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    path.write_bytes(data)
    tried("trace (simulator)")
    try:
        requests = read_trace(str(path)).requests
    except TraceError:
        return
    assert all(early.arrival_us <= late.arrival_us for early, late in itertools.pairwise(requests))


@examples(150)
@given(trace_files(), st.sampled_from(["fuzzed.csv", "fuzzed.csv.gz"]))
def test_any_file_is_a_load_or_an_error(
    tried: Count, tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    """The same for the load generator's reader."""
    path: Path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    tried("trace (bench)")
    try:
        starts = [shot.start_s for shot in read_bench_trace(path)]
    except BenchTraceError:
        return
    assert starts == sorted(starts)  # type: ignore[type-var]


EVENTS = (
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
    b'data: {"error":{"code":"x"}}\r\n\r\n',
    b"data: [DONE]\n\n",
    b": queued 3\n\n",
    b'data: {"usage":{"a":' + b"[" * 3000 + b"\n\n",
    b'data: [{"usage":{}}]\n\n',
    b'data: {"usage": {"usage": 1}, "error": ' + b"[" * 3000 + b"\n\n",
)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Return an event stream, damaged, in pieces."""
    data = b"".join(draw(st.lists(st.sampled_from(EVENTS) | st.binary(max_size=30), max_size=8)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(data)])]


@examples(150)
@given(streams())
def test_any_bytes_are_an_event_stream(tried: Count, pieces: list[bytes]) -> None:
    """The console's reader takes whatever a server sends, the same however it is cut."""
    tried("event stream (console)")
    cut, whole = StreamReader(), StreamReader()
    counted = sum(cut.feed(piece) for piece in pieces)
    assert counted == whole.feed(b"".join(pieces))
    facts = ("pieces", "finish_reason", "usage", "error", "done")
    assert [getattr(cut, fact) for fact in facts] == [getattr(whole, fact) for fact in facts]
    assert isinstance(cut.usage, dict)
    error_kind(b"".join(pieces))


sizes = st.sampled_from([b"5", b"0", b"-5", b"+5", b"a;x=1", b"0x5", b"1_0", b" 5 ", b"f" * 20, b"", b"zz"])
chunks = st.tuples(sizes, st.binary(max_size=12)).map(lambda pair: pair[0] + b"\r\n" + pair[1] + b"\r\n")


@examples(150)
@given(st.lists(chunks | st.binary(max_size=20), max_size=8))
def test_any_chunks_end(tried: Count, pieces: list[bytes]) -> None:
    """A chunked body in whatever state is read, waited for, or refused: never a loop, never another error."""
    tried("chunked body (console)")
    body = ChunkedBody()
    try:
        for piece in pieces:
            body.feed(piece)
    except HttpError:
        return


heads = st.lists(
    st.sampled_from(
        ["HTTP/1.1 200 OK", "HTTP/1.1 ² x", "HTTP/1.1", "content-length: ²", "content-length: " + "9" * 5000]
    )
    | st.sampled_from(["transfer-encoding: chunked", ":", "x"])
    | st.text(max_size=20),
    max_size=5,
).map(lambda lines: "\r\n".join(lines).encode("utf-8", "replace"))


@examples(150)
@given(heads | st.binary(max_size=100))
def test_any_head_is_one_or_an_error(tried: Count, head: bytes) -> None:
    """The head of a server's answer is understood or refused."""
    tried("answer head (console)")
    try:
        _body(_head(head)[1])
    except HttpError:
        return


@examples(200)
@given(
    st.sampled_from([Hello, Verdict, Answer, Group]),
    st.binary(min_size=FRAME_BYTES, max_size=FRAME_BYTES),
    st.booleans(),
)
def test_any_frame_is_one_or_a_protocol_error(
    tried: Count, kind: type[Hello | Verdict | Answer | Group], data: bytes, begin: bool
) -> None:
    """What anybody sends is a frame, which goes back to bytes that say the same, or a `ProtocolError`."""
    tried("frame (data path)")
    frame = b"MELLKV" + data[6:] if begin else data
    try:
        made = kind.decode(frame)
    except ProtocolError:
        return
    assert kind.decode(made.encode()) == made or isinstance(made, Hello)


@examples(200)
@given(st.integers(0, 255), st.binary(min_size=FRAME_BYTES - 3, max_size=FRAME_BYTES - 3), st.booleans())
def test_numbers_in_groups_are_only_numbers(tried: Count, count: int, data: bytes, last: bool) -> None:
    """Groups carry any numbers, judged against the offer and not trusted here, but never more chunks than fit."""
    tried("frame (data path)")
    try:
        group = Group.decode(bytes([1, last, count]) + data)
    except ProtocolError:
        assert count > MAX_GROUP or not (count or last)
        return
    assert len(group.chunks) == count <= MAX_GROUP
    assert all(0 <= chunk.slot < 2**32 and 0 <= chunk.length < 2**32 for chunk in group.chunks)
    assert Group.decode(group.encode()) == group


class Wire(asyncio.Transport):
    """A socket that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        """Keep it."""
        self.written += data

    def close(self) -> None:
        """Note it."""
        self.closed = True

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self.closed

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Nothing is known of it."""
        return default

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There are none."""


LINES = (
    b"GET / HTTP/1.1\r\n",
    b"POST /v1/models HTTP/1.1\r\n",
    b"GET /%zz?\xff HTTP/1.1\r\n",
    b"GET http://[::1 HTTP/1.1\r\n",
    b"PRI * HTTP/2.0\r\n\r\n",
    b"Host: a\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: upgrade\r\n",
    b"Upgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"X: " + b"y" * 5000 + b"\r\n",
    b"\r\n",
    b"hello",
    b"ffffffffffffffffff\r\n",
)


async def served(pieces: list[bytes]) -> Wire:
    """Give a connection these bytes, then its end."""
    import uvicorn
    from uvicorn.server import ServerState

    async def app(scope: object, receive: Callable[[], object], send: Callable[[object], object]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[misc]
        await send({"type": "http.response.body", "body": b""})  # type: ignore[misc]

    config = uvicorn.Config(app, http=bounded_protocol(4096, 5.0, 100), lifespan="off", log_config=None)  # type: ignore[arg-type]
    config.load()
    made = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # type: ignore[call-arg, operator]
    wire = Wire()
    made.connection_made(wire)
    for piece in pieces:
        if wire.closed:
            break
        made.data_received(piece)
        await asyncio.sleep(0)
    made.connection_lost(None)
    await asyncio.sleep(0)
    return wire


@examples(60)
@given(st.lists(st.sampled_from(LINES) | st.binary(max_size=40), max_size=10))
def test_any_bytes_are_http_or_refused(tried: Count, pieces: list[bytes]) -> None:
    """The HTTP port answers, waits or refuses; what it writes is HTTP, and never says that the server failed."""
    tried("HTTP bytes (frontend)")
    wire = asyncio.run(served(pieces))
    assert not wire.written or wire.written.startswith(b"HTTP/1.1 ")
    assert b" 500 " not in wire.written.partition(b"\r\n")[0]
