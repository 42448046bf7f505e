"""Tells other systems of requests: what arrived, and how it ended; no prompts, no outputs."""

from mell_frontend.record import RequestRecord
from mell_shared.events.data import FrontendState, RequestArrived, RequestFinished, RequestRefused
from mell_shared.events.outbox import Emit

_MOST_REQUESTS = 5_000
"""Rows of a state; a message has its limit."""


class RequestTeller:
    """Emits one event when a request is about to be placed, and one when it is over; knows those between."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._open: dict[str, None] = {}

    def arrived(self, record: RequestRecord, prompt_tokens: int) -> None:
        """A valid request, whose prompts are so many tokens in all, is about to be placed."""
        self._open[record.answer_id] = None
        self._emit(
            RequestArrived(
                request_id=record.request_id,
                answer_id=record.answer_id,
                model=record.model,
                key=record.key,
                stream=record.stream,
                choices=record.choices,
                prompt_tokens=prompt_tokens,
            )
        )

    def ended(self, record: RequestRecord, now_us: int) -> None:
        """It is over, however."""
        self._open.pop(record.answer_id, None)
        if record.first_token_us is None:
            self._emit(_refused(record, now_us))
        else:
            self._emit(_finished(record, record.first_token_us, now_us))

    def state(self) -> FrontendState:
        """Which requests are open."""
        names = tuple(self._open)
        return FrontendState(open_requests=names[:_MOST_REQUESTS], left_out=max(0, len(names) - _MOST_REQUESTS))


def _refused(record: RequestRecord, now_us: int) -> RequestRefused:
    return RequestRefused(
        request_id=record.request_id,
        answer_id=record.answer_id,
        model=record.model,
        key=record.key,
        status=499 if record.disconnected else record.status,
        error=record.error,
        duration_s=(now_us - record.started_us) / 1e6,
    )


def _finished(record: RequestRecord, first_token_us: int, now_us: int) -> RequestFinished:
    outcome = "client_gone" if record.disconnected else "failed" if record.error else "complete"
    return RequestFinished.model_validate(
        {
            "request_id": record.request_id,
            "answer_id": record.answer_id,
            "model": record.model,
            "key": record.key,
            "outcome": outcome,
            "error": record.error,
            "choices": record.choices,
            "finish_reasons": record.finish_reasons,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "ttft_s": (first_token_us - record.started_us) / 1e6,
            "duration_s": (now_us - record.started_us) / 1e6,
        }
    )
