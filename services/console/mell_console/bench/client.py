"""Sends one request to an OpenAI-compatible server and notes what comes back, and when."""

import asyncio
import json
from dataclasses import dataclass

from mell_console.bench.http1 import HttpClient, HttpError, Response
from mell_console.bench.measure import Outcome
from mell_console.bench.settings import BenchSettings
from mell_console.bench.sse import StreamReader, error_kind
from mell_shared.clock import Clock

_OK = 200


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load: its model, the settings of each request, a connection pool, a clock."""

    settings: BenchSettings
    model: str
    http: HttpClient
    clock: Clock

    @property
    def path(self) -> str:
        """The endpoint's path."""
        return "/v1/chat/completions" if self.settings.endpoint == "chat" else "/v1/completions"

    def body(self, prompt: str, output_tokens: int) -> bytes:
        """Return the JSON body of a streamed request for `output_tokens` tokens."""
        body = {
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": self.settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.settings.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.settings.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()


async def ask(target: Target, prompt: str, output_tokens: int, late_us: int = 0) -> Outcome:
    """Send one request and read its answer to the end; failures are in the outcome, none is raised."""
    outcome = Outcome(sent_us=target.clock.now_us(), late_us=late_us)
    stream = StreamReader()
    try:
        async with (
            asyncio.timeout(target.settings.timeout_s),
            target.http.post(target.path, target.body(prompt, output_tokens)) as response,
        ):
            if response.status == _OK:
                await _read(response, stream, outcome, target.clock)
            else:
                outcome.error = f"{response.status} {error_kind(await response.read_all())}"
    except TimeoutError:
        outcome.error = "timeout"
    except (OSError, HttpError) as error:
        outcome.error = _kind(error)
    outcome.ended_us = target.clock.now_us()
    _conclude(outcome, stream)
    return outcome


async def _read(response: Response, stream: StreamReader, outcome: Outcome, clock: Clock) -> None:
    while data := await response.read():
        pieces = stream.feed(data)
        if not pieces:
            continue
        now_us = clock.now_us()
        if outcome.last_us is None:
            outcome.first_us = now_us
        else:
            outcome.gaps_us.append(now_us - outcome.last_us)
        # Pieces that came in one read reached the client at once.
        outcome.gaps_us.extend([0] * (pieces - 1))
        outcome.last_us = now_us


def _conclude(outcome: Outcome, stream: StreamReader) -> None:
    outcome.pieces = stream.pieces
    outcome.counted = bool(stream.usage)
    outcome.output_tokens = int(stream.usage.get("completion_tokens", stream.pieces))
    outcome.prompt_tokens = int(stream.usage.get("prompt_tokens", 0))
    details = stream.usage.get("prompt_tokens_details") or {}
    outcome.cached_tokens = int(details.get("cached_tokens") or 0)
    if not outcome.error and stream.error:
        outcome.error = f"in mid-stream: {stream.error}"
    elif not outcome.error and not (stream.done and stream.finish_reason):
        outcome.error = "an answer without an end"


def _kind(error: OSError | HttpError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError):
        return "connection lost"
    return str(error) if isinstance(error, HttpError) else type(error).__name__
