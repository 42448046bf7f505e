"""Where the frontend's time goes for a token: text, chunk, in-process HTTP; no sockets, no broker, no worker."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry

from mell_frontend.app import create_app
from mell_frontend.asgi import App, Message
from mell_frontend.choice import ChoiceText
from mell_frontend.generation import Delta
from mell_frontend.served import load_models
from mell_frontend.settings import FrontendSettings
from mell_frontend.sse import ChatChunks
from mell_frontend.stop import StopMatcher
from mell_frontend.tokenizer import ByteTokenizer, FolderTokenizer, Tokenizer
from mell_frontend.tools import ToolParser
from tests.benchmarks.figures import memory_read_gb_per_s, print_table, size, spread
from tests.frontend import folders
from tests.frontend.scripted_gateway import ScriptedGateway, say

pytestmark = pytest.mark.benchmark

ROUNDS = 7
TOKENS = 20_000
URL = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Log lines would be measured too, and printed."""
    configuration = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.configure(**configuration)


def us_per_item(work: Callable[[], int]) -> list[float]:
    """Return the CPU microseconds per item of `work`, which says how many it did, for each round."""
    figures = []
    for _ in range(ROUNDS):
        begun_s = time.process_time()
        items = work()
        figures.append((time.process_time() - begun_s) * 1e6 / items)
    return figures


def generate(tokenizer: Tokenizer, stop: StopMatcher | None, tools: ToolParser | None) -> int:
    """Turn tokens into chunks, one by one; return how many."""
    ids = (tokenizer.encode("the quick brown fox jumps over the lazy dog ", add_special_tokens=False) * 2000)[:TOKENS]
    choice = ChoiceText(tokenizer.detokenizer(ids[:1]), stop, tools)
    chunks = ChatChunks("chatcmpl-x", 1, "m")
    for token in ids:
        piece = choice.push(Delta([token]))
        if piece.text:
            chunks.text(0, piece.text).encode("ascii")
    return len(ids)


def test_text_and_chunks(tmp_path: Path) -> None:
    """From a token id to the bytes of its event."""
    byte_level = FolderTokenizer(folders.save(tmp_path / "byte-level", folders.byte_level()))
    windowed = FolderTokenizer(folders.save(tmp_path / "windowed", folders.word_piece()))
    ways: dict[str, Callable[[], int]] = {
        "bytes (`fake`)": lambda: generate(ByteTokenizer(), None, None),
        "byte-level BPE": lambda: generate(byte_level, None, None),
        "byte-level BPE, 4 stop strings": lambda: generate(
            byte_level, StopMatcher(["xq", "the end", "\n\n", "</"]), None
        ),
        "byte-level BPE, tools": lambda: generate(byte_level, None, ToolParser()),
        "decoded over a window": lambda: generate(windowed, None, None),
    }
    rows = [(name, spread(us_per_item(work), 2)) for name, work in ways.items()]
    print_table("Text and chunk of one token", ("way", "CPU us a token"), rows)


async def ask(app: App, body: bytes) -> int:
    """Send one request to the app as a server would; return the bytes of its answer."""
    sent = 0
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": URL, "raw_path": URL.encode(), "headers": headers}
    await app({**scope, "query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send)
    return sent


def test_requests_and_streams(tmp_path: Path) -> None:
    """A whole short request, and a token within many streams, through the application without a socket."""
    settings = FrontendSettings(models=["fake"], model_dir=tmp_path)
    gateway = ScriptedGateway(say("x"))
    app = create_app(settings, gateway, load_models(["fake"], tmp_path), CollectorRegistry())
    question = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    body = json.dumps(question).encode()
    streams, tokens = size("STREAMS", 200), 100

    async def run(count: int) -> None:
        await asyncio.gather(*(ask(app, body) for _ in range(count)))
        gateway.streams.clear()

    def requests() -> int:
        gateway.script = say("x")
        asyncio.run(run(500))
        return 500

    def tokens_of_streams() -> int:
        gateway.script = say("x" * tokens)
        asyncio.run(run(streams))
        return streams * tokens

    rows = [
        ("a request of one token", spread(us_per_item(requests), 1)),
        (f"a token of {streams} streams of {tokens}, one chunk each", spread(us_per_item(tokens_of_streams), 1)),
        ("memory read, GB/s", f"{memory_read_gb_per_s():.1f}"),
    ]
    print_table("The HTTP side, without sockets", ("what", "CPU us"), rows)
