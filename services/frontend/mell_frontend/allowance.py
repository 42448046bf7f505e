"""One request's part in its key's limits: taken at the door, reserved before it runs, settled when it has ended."""

from collections.abc import Sequence

from mell_frontend.errors import rate_limited
from mell_frontend.key_store import KeyStore
from mell_frontend.keys import ApiKey
from mell_frontend.rate_limits import Exceeded, Limits, RateLimiter
from mell_shared.clock import Clock

EVERYBODY = "everybody"
"""Who asks where no keys are set: all of them share one limit."""


class Allowance:
    """What one request may still take. One without a limit takes what it likes."""

    def __init__(self, limiter: RateLimiter, key: str, clock: Clock) -> None:
        self._limiter = limiter
        self._key = key
        self._clock = clock
        self._reserved = 0

    def admit(self) -> None:
        """Count the request; raises `ApiError` (429)."""
        self._refuse(self._limiter.take(self._key, "requests", 1, self._clock.now_us()))

    def reserve(self, tokens: int) -> None:
        """Set aside what the request may need; raises `ApiError` (429)."""
        self._refuse(self._limiter.take(self._key, "tokens", tokens, self._clock.now_us()))
        self._reserved = tokens

    def settle(self, used: int) -> None:
        """The request has ended and used so many tokens; once only."""
        self._limiter.settle(self._key, self._reserved, used, self._clock.now_us())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what is left, in the headers that OpenAI's clients look at."""
        listed = []
        for standing in self._limiter.standing(self._key, self._clock.now_us()):
            shown = {"limit": standing.limit, "remaining": standing.remaining, "reset": duration(standing.reset_us)}
            listed += [
                (f"x-ratelimit-{name}-{standing.kind}".encode(), str(value).encode()) for name, value in shown.items()
            ]
        return listed

    def _refuse(self, exceeded: Exceeded | None) -> None:
        if exceeded is not None:
            raise rate_limited(self._key, exceeded)


class Allowances:
    """Gives every request its allowance, by the keys in force."""

    def __init__(self, keys: KeyStore, general: Limits, clock: Clock) -> None:
        self._general = general
        self._clock = clock
        self._limiter = RateLimiter()
        keys.on_change(self._set_limits)

    def of(self, key: ApiKey | None) -> Allowance:
        """Return the allowance of a request with this key (None: no keys are asked for)."""
        return Allowance(self._limiter, EVERYBODY if key is None else key.name, self._clock)

    def _set_limits(self, keys: Sequence[ApiKey]) -> None:
        limits = {key.name: self._limits(key) for key in keys}
        self._limiter.set_limits({EVERYBODY: self._general, **limits}, self._clock.now_us())

    def _limits(self, key: ApiKey) -> Limits:
        general = self._general
        return Limits(
            general.requests_per_minute if key.requests_per_minute is None else key.requests_per_minute,
            general.tokens_per_minute if key.tokens_per_minute is None else key.tokens_per_minute,
        )


def duration(time_us: int) -> str:
    """Return a time as OpenAI writes it: `17ms`, `1.5s`, `6m0s`."""
    millis = -(-time_us // 1000)
    if millis < 1000:
        return f"{millis}ms"
    minutes, millis = divmod(millis, 60_000)
    seconds = f"{millis / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
