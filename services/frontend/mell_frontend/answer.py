"""The answer to a request as it grows: pieces of choices in, SSE text or one JSON body out; pure."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from mell_frontend.choice import Finish, Piece
from mell_frontend.logprobs import LegacyLogprobs, chat_logprobs
from mell_frontend.prepare import Job
from mell_frontend.sse import DONE, ChatChunks, CompletionChunks
from mell_frontend.tools import ParsedCall


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk and body of one answer says about itself; `created` in seconds since 1970."""

    id: str
    created: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request used, in tokens; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        """Return the `usage` of an OpenAI answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class StreamedAnswer(Protocol):
    """An answer sent bit by bit; every method returns SSE text, perhaps none."""

    def begin(self) -> str:
        """What comes before any piece."""
        ...

    def piece(self, choice: int, piece: Piece) -> str:
        """What a piece of a choice adds."""
        ...

    def end(self, usage: Usage) -> str:
        """What comes when all choices have ended."""
        ...


class WholeAnswer(Protocol):
    """An answer sent at the end."""

    def piece(self, choice: int, piece: Piece) -> None:
        """Take a piece of a choice."""
        ...

    def body(self, usage: Usage) -> dict[str, Any]:
        """Return the JSON body when all choices have ended."""
        ...


def _call_id(answer_id: str, choice: int, position: int) -> str:
    return f"call_{answer_id.rpartition('-')[2]}_{choice}_{position}"


class StreamedChat:
    """A streamed chat completion."""

    def __init__(self, job: Job, head: Head) -> None:
        self._job = job
        self._head = head
        self._chunks = ChatChunks(head.id, head.created, job.model.name, include_usage=job.include_usage)
        self._calls = [0] * job.choices
        self._scored = job.sampling.logprobs is not None

    def begin(self) -> str:
        """Return each choice's role."""
        return "".join(map(self._chunks.role, range(self._job.choices)))

    def piece(self, choice: int, piece: Piece) -> str:
        """Return the chunks of a piece: text, then calls, then the end."""
        parts = []
        if self._scored and piece.logprobs:
            scores = chat_logprobs(self._job.model.tokenizer, piece.token_ids, piece.logprobs)
            parts.append(self._chunks.text(choice, piece.text, scores))
        elif piece.text:
            parts.append(self._chunks.text(choice, piece.text))
        for call in piece.calls:
            position = self._calls[choice]
            self._calls[choice] += 1
            parts.append(self._chunks.call(choice, position, _call_id(self._head.id, choice, position), call))
        if piece.finish is not None:
            parts.append(self._chunks.finish(choice, piece.finish))
        return "".join(parts)

    def end(self, usage: Usage) -> str:
        """Return the usage if it was asked for, and the mark of the end."""
        return (self._chunks.usage(usage.body()) if self._job.include_usage else "") + DONE


class StreamedCompletion:
    """A streamed legacy completion."""

    def __init__(self, job: Job, head: Head) -> None:
        self._job = job
        self._chunks = CompletionChunks(head.id, head.created, job.model.name, include_usage=job.include_usage)
        self._scores = _legacy_scores(job)

    def begin(self) -> str:
        """Return each choice's prompt if it is to be echoed."""
        n = self._job.n
        return "".join(
            self._chunks.text(prompt * n + choice, echo)
            for prompt, echo in enumerate(self._job.echoes)
            for choice in range(n)
        )

    def piece(self, choice: int, piece: Piece) -> str:
        """Return the chunks of a piece: text, then the end."""
        text = ""
        if self._scores and piece.logprobs:
            text = self._chunks.text(choice, piece.text, self._scores[choice].columns(piece.token_ids, piece.logprobs))
        elif piece.text:
            text = self._chunks.text(choice, piece.text)
        return text if piece.finish is None else text + self._chunks.finish(choice, piece.finish)

    def end(self, usage: Usage) -> str:
        """Return the usage if it was asked for, and the mark of the end."""
        return (self._chunks.usage(usage.body()) if self._job.include_usage else "") + DONE


@dataclass(slots=True)
class _Choice:
    """One choice of a whole answer, as far as it has come."""

    text: list[str] = field(default_factory=list)
    calls: list[ParsedCall] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.calls += piece.calls
        self.finish = piece.finish


class WholeChat:
    """A chat completion in one body."""

    def __init__(self, job: Job, head: Head) -> None:
        self._job = job
        self._head = head
        self._choices = [_Choice() for _ in range(job.choices)]

    def piece(self, choice: int, piece: Piece) -> None:
        """Take a piece of a choice."""
        self._choices[choice].take(piece)
        if self._job.sampling.logprobs is not None:
            scores = chat_logprobs(self._job.model.tokenizer, piece.token_ids, piece.logprobs)
            self._choices[choice].scores += scores

    def body(self, usage: Usage) -> dict[str, Any]:
        """Return the JSON body."""
        choices = [self._shown(position, choice) for position, choice in enumerate(self._choices)]
        return _body(self._job, self._head, "chat.completion", choices, usage)

    def _shown(self, position: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {
                    "id": _call_id(self._head.id, position, place),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for place, call in enumerate(choice.calls)
            ]
        scored = self._job.sampling.logprobs is not None
        logprobs = {"content": choice.scores, "refusal": None} if scored else None
        return {"index": position, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}


class WholeCompletion:
    """A legacy completion in one body."""

    def __init__(self, job: Job, head: Head) -> None:
        self._job = job
        self._head = head
        self._choices = [_Choice() for _ in range(job.choices)]
        self._columns = _legacy_scores(job)

    def piece(self, choice: int, piece: Piece) -> None:
        """Take a piece of a choice."""
        self._choices[choice].take(piece)
        if self._columns:
            self._choices[choice].scores.append(self._columns[choice].columns(piece.token_ids, piece.logprobs))

    def body(self, usage: Usage) -> dict[str, Any]:
        """Return the JSON body."""
        choices = [self._shown(position, choice) for position, choice in enumerate(self._choices)]
        return _body(self._job, self._head, "text_completion", choices, usage)

    def _shown(self, position: int, choice: _Choice) -> dict[str, Any]:
        echo = self._job.echoes[position // self._job.n] if self._job.echoes else ""
        logprobs = None
        if self._columns:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [item for part in choice.scores for item in part[name]] for name in names}
        text = echo + "".join(choice.text)
        return {"index": position, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}


def _legacy_scores(job: Job) -> list[LegacyLogprobs]:
    if job.sampling.logprobs is None:
        return []
    return [LegacyLogprobs(job.model.tokenizer) for _ in range(job.choices)]


def _body(job: Job, head: Head, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": job.model.name,
        "choices": choices,
        "usage": usage.body(),
    }
