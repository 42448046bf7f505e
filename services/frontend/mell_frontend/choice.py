"""One choice of an answer: token ids in, text and calls out, up to the first stop string; pure."""

from dataclasses import dataclass, field
from typing import Literal

from mell_frontend.detokenizer import Detokenizer
from mell_frontend.generation import Delta
from mell_frontend.stop import StopMatcher
from mell_frontend.tools import ParsedCall, ToolParser
from mell_shared.messages.frontend import TokenLogprobs

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Piece:
    """What one delta adds to a choice; `finish` says that it ends here."""

    text: str = ""
    calls: list[ParsedCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None


class ChoiceText:
    """Turns the deltas of one sequence into pieces.

    `min_tokens`: the text of so many first tokens is not searched for stop strings.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: StopMatcher | None, tools: ToolParser | None, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._tools = tools
        self._min_tokens = min_tokens
        self._plain = stop is None and tools is None
        self.tokens = 0
        self.cached_tokens = 0

    def push(self, delta: Delta) -> Piece:
        """Return what `delta` adds; after a piece with a finish nothing more may be pushed."""
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if self._plain and delta.finish_reason is None:
            self.tokens += len(delta.token_ids)
            return Piece(self._detokenizer.push(delta.token_ids), [], delta.token_ids, delta.logprobs)
        return self._examine(delta)

    def _examine(self, delta: Delta) -> Piece:
        """Return what a delta adds where its text is searched, or is the last."""
        used, text = len(delta.token_ids), ""
        if self._stop is None:
            text = self._detokenizer.push(delta.token_ids)
        else:
            used, text = self._until_stop(self._stop, delta.token_ids)
        self.tokens += used
        stopped = self._stop is not None and self._stop.stopped
        ended = stopped or delta.finish_reason is not None
        if ended and not stopped:
            text += self._rest()
        piece = Piece(text=text, token_ids=delta.token_ids[:used], logprobs=delta.logprobs[:used])
        if self._tools is not None:
            self._split(self._tools, piece, ended=ended)
        if ended:
            piece.finish = self._finish(delta)
        return piece

    def _until_stop(self, stop: StopMatcher, token_ids: list[int]) -> tuple[int, str]:
        """Return how many tokens were used up to the end of a stop string, and the text that is safe to show."""
        shown: list[str] = []
        for position, token in enumerate(token_ids):
            text = self._detokenizer.push((token,))
            if self.tokens + position < self._min_tokens:
                shown.append(text)
                continue
            shown.append(stop.push(text))
            if stop.stopped:
                return position + 1, "".join(shown)
        return len(token_ids), "".join(shown)

    def _rest(self) -> str:
        rest = self._detokenizer.flush()
        if self._stop is None:
            return rest
        shown = self._stop.push(rest)
        return shown if self._stop.stopped else shown + self._stop.flush()

    def _split(self, tools: ToolParser, piece: Piece, *, ended: bool) -> None:
        piece.text, piece.calls = tools.push(piece.text)
        if ended:
            text, calls = tools.flush()
            piece.text += text
            piece.calls += calls

    def _finish(self, delta: Delta) -> Finish:
        if self._tools is not None and self._tools.called:
            return "tool_calls"
        stopped = self._stop is not None and self._stop.stopped
        return "length" if delta.finish_reason == "length" and not stopped else "stop"
