"""How fast answers begin and tokens come just now, for who watches; forgets what is older than a minute."""

from collections import deque

from mell_frontend.generation import Gateway
from mell_shared.messages.live import FrontendFigures

_WINDOW_US = 60_000_000
_MOST = 4096
"""First tokens remembered; with more of them in a minute the latest count."""


class Pulse:
    """Told of each first token; read once for each state that watchers get."""

    def __init__(self) -> None:
        self._first_tokens: deque[tuple[int, int]] = deque(maxlen=_MOST)
        """When it came and how long it took, in microseconds."""
        self._tokens: tuple[int, int] | None = None
        """When the tokens were counted last, and how many they were."""

    def first_token(self, took_us: int, now_us: int) -> None:
        """An answer has begun."""
        self._first_tokens.append((now_us, took_us))

    def read(self, gateway: Gateway, now_us: int) -> FrontendFigures:
        """Return the figures of now; tokens per second since the last reading."""
        while self._first_tokens and self._first_tokens[0][0] < now_us - _WINDOW_US:
            self._first_tokens.popleft()
        took_us = sorted(took for _, took in self._first_tokens)
        return FrontendFigures(
            frontend=gateway.name,
            streams=gateway.open_streams,
            tokens_per_s=self._rate(gateway.tokens_accepted, now_us),
            first_tokens=len(took_us),
            ttft_p50_s=_percentile(took_us, 50) / 1e6,
            ttft_p99_s=_percentile(took_us, 99) / 1e6,
        )

    def _rate(self, tokens: int, now_us: int) -> float:
        before, self._tokens = self._tokens, (now_us, tokens)
        if before is None or now_us <= before[0] or now_us - before[0] > _WINDOW_US:
            return 0.0  # nobody has looked for long: no rate of now
        return (tokens - before[1]) / (now_us - before[0]) * 1e6


def _percentile(ordered: list[int], percent: int) -> int:
    """Return the smallest value that so many percent do not exceed; 0 of none."""
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else 0
