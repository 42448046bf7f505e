"""Runs one job and sends its answer: streams in, one write per wake-up out. Knows no web framework."""

from mell_frontend.answer import Head, StreamedAnswer, Usage, WholeAnswer
from mell_frontend.choice import ChoiceText, Piece
from mell_frontend.errors import ApiError, from_generation
from mell_frontend.exchange import Exchange
from mell_frontend.generation import Gateway, GenerationError, SequenceRequest, Waiting
from mell_frontend.prepare import Job
from mell_frontend.pulse import Pulse
from mell_frontend.reading import Reader, StreamEvent, open_streams
from mell_frontend.record import RequestRecord
from mell_frontend.sse import comment, error_event
from mell_frontend.stop import StopMatcher
from mell_frontend.tools import ToolParser
from mell_frontend.vllm_metrics import TokenMeter, VllmMetrics
from mell_shared.clock import Clock


class Responder:
    """Answers jobs; holds nothing between them."""

    def __init__(self, gateway: Gateway, clock: Clock, metrics: VllmMetrics, pulse: Pulse) -> None:
        self._gateway = gateway
        self._clock = clock
        self._metrics = metrics
        self._pulse = pulse

    async def stream(self, job: Job, head: Head, answer: StreamedAnswer, exchange: Exchange) -> None:
        """Answer with server-sent events; a problem before the first event gets its own HTTP status."""
        async with open_streams(self._gateway, _sequences(job, head, exchange.record)) as reader:
            run = self._run(job, reader, exchange.record)
            try:
                while run.open_choices:
                    text = _shown(answer, await run.next())
                    if not exchange.started:
                        await exchange.start()
                        text = answer.begin() + text
                    if not run.open_choices:
                        text += answer.end(run.usage())
                    if text:
                        await exchange.events(text, last=run.open_choices == 0)
            except ApiError as error:
                await _send_error(exchange, error)
            finally:
                run.note_usage()

    async def whole(self, job: Job, head: Head, answer: WholeAnswer, exchange: Exchange) -> None:
        """Answer with one JSON body."""
        async with open_streams(self._gateway, _sequences(job, head, exchange.record)) as reader:
            run = self._run(job, reader, exchange.record)
            try:
                while run.open_choices:
                    for choice, event in await run.next():
                        if isinstance(event, Piece):
                            answer.piece(choice, event)
                await exchange.body(200, answer.body(run.usage()))
            except ApiError as error:
                await _send_error(exchange, error)
            finally:
                run.note_usage()

    def _run(self, job: Job, reader: Reader, record: RequestRecord) -> "_Run":
        return _Run(job, reader, record, self._clock, self._metrics.meter(job.model.name), self._pulse)


def _sequences(job: Job, head: Head, record: RequestRecord) -> list[SequenceRequest]:
    return job.sequences(head.id, record.request_id, record.traceparent)


async def _send_error(exchange: Exchange, error: ApiError) -> None:
    exchange.record.error = error.code or error.kind
    if exchange.started:
        await exchange.events(error_event(error.body()), last=True)
    else:
        await exchange.body(error.status, error.body(), error.headers)


def _shown(answer: StreamedAnswer, events: list[tuple[int, Waiting | Piece]]) -> str:
    """Return the text of one write."""
    parts = []
    position = -1
    for choice, event in events:
        if isinstance(event, Piece):
            parts.append(answer.piece(choice, event))
        else:
            position = max(position, event.position)
    if position >= 0:
        parts.append(comment(f"queued {position}"))
    return "".join(parts)


class _Run:
    """A job while it runs: each choice's text, and how many of them have not ended."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it works with, and who wants to know
        self, job: Job, reader: Reader, record: RequestRecord, clock: Clock, meter: TokenMeter, pulse: Pulse
    ) -> None:
        self._job = job
        self._reader = reader
        self._record = record
        self._clock = clock
        self._meter = meter
        self._pulse = pulse
        self._last_us: list[int | None] = [None] * job.choices
        """When the last token of each choice came."""
        self._texts = [_choice_text(job, choice) for choice in range(job.choices)]
        self._ended = [False] * job.choices
        self.open_choices = job.choices

    async def next(self) -> list[tuple[int, Waiting | Piece]]:
        """Return what is new in choices that have not ended; raises `ApiError`."""
        events = await self._reader.next()
        return [(choice, self._take(choice, event)) for choice, event in events if not self._ended[choice]]

    def usage(self) -> Usage:
        """Return what has been used so far; of a prompt's choices the least cached counts."""
        n = self._job.n
        cached = [text.cached_tokens for text in self._texts]
        return Usage(
            prompt_tokens=sum(map(len, self._job.prompts)),
            completion_tokens=sum(text.tokens for text in self._texts),
            cached_tokens=sum(min(cached[first : first + n]) for first in range(0, len(cached), n)),
        )

    def note_usage(self) -> None:
        """Write what was used into the record."""
        usage = self.usage()
        self._record.prompt_tokens = usage.prompt_tokens
        self._record.completion_tokens = usage.completion_tokens
        self._record.cached_tokens = usage.cached_tokens

    def _take(self, choice: int, event: StreamEvent) -> Waiting | Piece:
        if isinstance(event, GenerationError):
            raise from_generation(event) from event
        if isinstance(event, Waiting):
            self._record.queued = True
            return event
        if event.finish_reason in ("cancelled", "error"):
            raise from_generation(GenerationError("failed", "The engine could not go on with this request."))
        if event.token_ids:
            self._note_tokens(choice, len(event.token_ids))
        piece = self._texts[choice].push(event)
        if piece.finish is not None:
            self._end(choice, piece.finish)
        return piece

    def _note_tokens(self, choice: int, tokens: int) -> None:
        now_us, last_us = self._clock.now_us(), self._last_us[choice]
        self._last_us[choice] = now_us
        if self._record.first_token_us is None:
            self._record.first_token_us = now_us
            self._pulse.first_token(now_us - self._record.started_us, now_us)
        self._meter.took(tokens, None if last_us is None else now_us - last_us)

    def _end(self, choice: int, reason: str) -> None:
        self._ended[choice] = True
        self.open_choices -= 1
        self._record.finished(reason)
        self._reader.end(choice)


def _choice_text(job: Job, choice: int) -> ChoiceText:
    return ChoiceText(
        job.model.tokenizer.detokenizer(job.prompts[choice // job.n]),
        StopMatcher(job.stops) if job.stops else None,
        ToolParser() if job.parse_tools else None,
        job.sampling.min_tokens,
    )
