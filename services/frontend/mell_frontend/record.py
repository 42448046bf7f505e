"""What is remembered of one HTTP request until its one log line is written; no prompts, no outputs."""

from dataclasses import dataclass, field
from typing import Any

from mell_shared.tracing import trace_of


@dataclass(slots=True)
class RequestRecord:
    """Filled in while a request is answered. Times are microseconds of the frontend's clock."""

    request_id: str
    method: str
    path: str
    started_us: int
    status: int = 0
    answer_id: str = ""
    """What the answer calls itself (`chatcmpl-...`); its sequences are named after it."""
    key: str = ""
    """The name of the API key."""
    model: str = ""
    stream: bool = False
    choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token_us: int | None = None
    queued: bool = False
    finish_reasons: dict[str, int] = field(default_factory=dict)
    error: str = ""
    unknown_fields: list[str] = field(default_factory=list)
    unknown_count: int = 0
    disconnected: bool = False
    traceparent: str = ""
    """Its span, if it is traced."""

    @property
    def used_tokens(self) -> int:
        """What the request has cost: nothing before its first token, then its prompt and all output so far."""
        return 0 if self.first_token_us is None else self.prompt_tokens + self.completion_tokens

    def finished(self, reason: str) -> None:
        """Count a choice's end."""
        self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + 1

    def fields(self, now_us: int) -> dict[str, Any]:
        """Return the fields of the log line; what does not apply is left out."""
        line: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration_ms": _ms(now_us - self.started_us),
        }
        if self.choices:
            line |= {
                "answer_id": self.answer_id,
                "model": self.model,
                "stream": self.stream,
                "choices": self.choices,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "cached_tokens": self.cached_tokens,
                "finish_reasons": self.finish_reasons,
            }
        if self.first_token_us is not None:
            line["ttft_ms"] = _ms(self.first_token_us - self.started_us)
        if self.traceparent:
            line["trace_id"] = trace_of(self.traceparent)
        for name in ("key", "queued", "error", "unknown_fields", "disconnected"):
            if getattr(self, name):
                line[name] = getattr(self, name)
        return line


def _ms(duration_us: int) -> float:
    return round(duration_us / 1000, 3)
