import asyncio
from collections.abc import Callable

import pytest

from mell_console.bench.client import Target, ask
from mell_console.bench.http1 import HttpClient
from mell_console.bench.measure import Outcome
from mell_console.bench.settings import BenchSettings
from mell_shared.clock import Clock, SystemClock
from tests.console.openai_server import Exchange, LockstepClock, event, piece, plain_answer, serving, usage
from tests.ports import free_port

Answer = Callable[[Exchange], object]


def settings(url: str, *flags: str) -> BenchSettings:
    """Return the settings of a bench of `url`."""
    return BenchSettings.from_command_line(["--url", url, *flags])


async def asked(answer: Answer, *flags: str, clock: Clock | None = None) -> Outcome:
    """Return the outcome of one request to a server that answers so."""
    async with serving(answer) as server:
        http = HttpClient(server.url, {})
        outcome = await ask(Target(settings(server.url, *flags), "m", http, clock or SystemClock()), "a prompt", 3)
        http.close()
    return outcome


async def test_times_are_those_at_which_pieces_arrive() -> None:
    """First token, gaps, last token and end are measured at the moment the client reads them."""
    clock = LockstepClock()

    async def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        for step_us, text in ((5000, piece("a")), (700, piece("b")), (900, piece("c") + piece("d"))):
            await clock.pass_us(step_us)
            exchange.send(text)
            await clock.reads.acquire()
        await clock.pass_us(40)
        exchange.send(piece("", finish="stop") + usage(7, 4, cached=2) + "data: [DONE]\n\n")
        exchange.end()

    outcome = await asked(answer, clock=clock)
    assert outcome.error == ""
    assert (outcome.first_us, outcome.last_us, outcome.ended_us) == (5000, 6600, 6640)
    assert outcome.gaps_us == [700, 900, 0]
    assert (outcome.pieces, outcome.output_tokens, outcome.prompt_tokens, outcome.cached_tokens) == (4, 4, 7, 2)


async def test_the_request_is_plain_openai() -> None:
    """Model, lengths, sampling, usage and the prompt stand where OpenAI's API has them."""
    async with serving() as server:
        http = HttpClient(server.url, {"authorization": "Bearer k"})
        target = Target(settings(server.url, "--temperature", "0.5"), "m", http, SystemClock())
        assert (await ask(target, "one two", 3)).output_tokens == 3
        http.close()
    request = server.requests[0]
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer k"
    assert request.body == {
        "model": "m",
        "max_tokens": 3,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "one two"}],
        "ignore_eos": True,
    }


async def test_the_completions_endpoint_takes_the_prompt_as_text() -> None:
    """`--endpoint completions` loads the other API; `--no-ignore-eos` leaves out what OpenAI does not know."""
    async with serving() as server:
        http = HttpClient(server.url, {})
        target = Target(settings(server.url, "--endpoint", "completions", "--no-ignore-eos"), "m", http, SystemClock())
        await ask(target, "one two", 3)
        http.close()
    assert server.requests[0].path == "/v1/completions"
    assert server.requests[0].body["prompt"] == "one two"
    assert "ignore_eos" not in server.requests[0].body


async def test_without_usage_pieces_are_counted_and_said_so() -> None:
    """A server that sends no usage is measured by its pieces, marked as such."""

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(piece("a") + piece("b") + piece("", finish="stop") + "data: [DONE]\n\n")
        exchange.end()

    outcome = await asked(answer)
    assert (outcome.output_tokens, outcome.counted, outcome.error) == (2, False, "")


def _refuse(exchange: Exchange) -> None:
    text = '{"error": {"message": "full", "type": "rate_limit_error", "code": "queue_full"}}'
    exchange.begin(429, "application/json", len(text))
    exchange.send(text)


def _gateway_page(exchange: Exchange) -> None:
    exchange.begin(502, "text/html", 6)
    exchange.send("<html>")


def _error_in_mid_stream(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send(piece("a") + event({"error": {"message": "lost", "type": "server_error", "code": None}}))
    exchange.end()


def _break_off(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send(piece("a"))
    exchange.writer.close()


def _break_off_sized(exchange: Exchange) -> None:
    exchange.begin(length=1000)
    exchange.send(piece("a"))
    exchange.writer.close()


def _no_end(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send(piece("a"))
    exchange.end()


def _no_http(exchange: Exchange) -> None:
    exchange.writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
    exchange.writer.close()


def _broken_chunk(exchange: Exchange) -> None:
    exchange.begin()
    exchange.writer.write(b"zz\r\n")


def _say_nothing(exchange: Exchange) -> None:
    exchange.writer.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (_refuse, "429 queue_full"),
        (_gateway_page, "502 no OpenAI error body"),
        (_error_in_mid_stream, "in mid-stream: server_error"),
        (_break_off, "broken off"),
        (_break_off_sized, "broken off"),
        (_no_end, "an answer without an end"),
        (_no_http, "no HTTP answer"),
        (_broken_chunk, "a broken chunk"),
        (_say_nothing, "no HTTP answer"),
    ],
)
async def test_every_failure_has_a_kind_and_is_not_raised(answer: Answer, kind: str) -> None:
    """What goes wrong with one request is counted, never ends the run."""
    assert (await asked(answer)).error == kind


async def test_a_server_that_never_answers_is_a_timeout() -> None:
    """A request has a time limit of its own."""

    async def answer(_: Exchange) -> None:
        await asyncio.sleep(0.5)

    assert (await asked(answer, "--timeout-s", "0.01")).error == "timeout"


async def test_a_port_where_nobody_listens_is_told() -> None:
    """A refused connection has its own kind."""
    url = f"http://127.0.0.1:{free_port()}"
    http = HttpClient(url, {})
    outcome = await ask(Target(settings(url), "m", http, SystemClock()), "a", 1)
    assert outcome.error == "connection refused"


async def test_connections_are_used_again_unless_the_answer_broke() -> None:
    """Whole answers leave their connection for the next request; one that ends with its connection does not."""
    flaky = iter([plain_answer, plain_answer, _break_off, plain_answer])

    def answer(exchange: Exchange) -> object:
        return next(flaky)(exchange)

    async with serving(answer) as server:
        http = HttpClient(server.url, {})
        target = Target(settings(server.url), "m", http, SystemClock())
        errors = [(await ask(target, "a", 2)).error for _ in range(4)]
        http.close()
    assert errors == ["", "", "broken off", ""]
    assert [request.connection for request in server.requests] == [1, 1, 1, 2]


async def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    """A server may close an idle connection; the next request is then asked on a new one."""

    async def answer_and_close(exchange: Exchange) -> None:
        await plain_answer(exchange)
        await exchange.writer.drain()
        exchange.writer.close()

    async with serving(answer_and_close) as server:
        http = HttpClient(server.url, {})
        target = Target(settings(server.url), "m", http, SystemClock())
        errors = [(await ask(target, "a", 2)).error for _ in range(3)]
        http.close()
    assert errors == ["", "", ""]
    assert [request.connection for request in server.requests] == [1, 2, 3]


async def test_an_answer_may_end_with_its_connection() -> None:
    """A server without chunks and length is read to the end of the connection."""

    def answer(exchange: Exchange) -> None:
        exchange.begin(length=-1)
        exchange.send(piece("a") + piece("", finish="stop") + usage(1, 1) + "data: [DONE]\n\n")
        exchange.writer.close()

    outcome = await asked(answer)
    assert (outcome.error, outcome.output_tokens) == ("", 1)
