"""Requests and tokens per minute of each key: token buckets; pure, whole numbers only, time is an argument.

A bucket holds a minute's worth, is full at first and fills evenly. A request takes one from the first bucket when it
arrives. From the second it takes what it may need before it runs, its prompt and its output limit; what it did not
need is given back when it ends. What a request without an output limit needed is taken then, even if that leaves the
bucket in debt, which later requests wait out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["requests", "tokens"]

_UNITS = 60_000_000
"""A bucket counts in such parts of one, so that a limit of N a minute fills by N of them each microsecond."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Most requests and tokens per minute; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Why a request is refused. `wait_us`: how long until it would be admitted; None: never, it is over the limit."""

    kind: Kind
    limit: int
    used: int
    requested: int
    wait_us: int | None


@dataclass(frozen=True, slots=True)
class Standing:
    """What is left of a limit now, and when all of it will be if nothing more is asked."""

    kind: Kind
    limit: int
    remaining: int
    reset_us: int


class Bucket:
    """Fills by `limit` a minute up to `limit`; `take` may leave it in debt."""

    __slots__ = ("_level", "_since_us", "limit")

    def __init__(self, limit: int, now_us: int) -> None:
        self.limit = limit
        self._level = limit * _UNITS
        self._since_us = now_us

    def left(self, now_us: int) -> int:
        """How many can be taken now: never below 0."""
        self._fill(now_us)
        return max(0, self._level // _UNITS)

    def wait_us(self, count: int, now_us: int) -> int | None:
        """How long until `count` can be taken; None if that never comes."""
        self._fill(now_us)
        if count > self.limit:
            return None
        return self._until(count * _UNITS)

    def reset_us(self, now_us: int) -> int:
        """How long until the bucket is full."""
        self._fill(now_us)
        return self._until(self.limit * _UNITS)

    def take(self, count: int, now_us: int) -> None:
        """Take `count`, whether they are there or not; a negative count gives back."""
        self._fill(now_us)
        self._level = min(self._level - count * _UNITS, self.limit * _UNITS)

    def change(self, limit: int, now_us: int) -> None:
        """Set another limit; what has been taken stays taken."""
        self._fill(now_us)
        self._level += (limit - self.limit) * _UNITS
        self.limit = limit

    def _fill(self, now_us: int) -> None:
        assert now_us >= self._since_us, "time does not run backwards"
        self._level = min(self._level + (now_us - self._since_us) * self.limit, self.limit * _UNITS)
        self._since_us = now_us

    def _until(self, level: int) -> int:
        return max(0, -(-(level - self._level) // self.limit))


class RateLimiter:
    """The buckets of every key that has a limit, by the key's name; one without is never refused."""

    def __init__(self) -> None:
        self._buckets: dict[str, dict[Kind, Bucket]] = {}

    def set_limits(self, limits: Mapping[str, Limits], now_us: int) -> None:
        """Set the limits of all keys; those not named are forgotten, the others keep what they have used."""
        old, self._buckets = self._buckets, {}
        for name, wanted in limits.items():
            kept = old.get(name, {})
            by_kind: dict[Kind, int | None] = {
                "requests": wanted.requests_per_minute,
                "tokens": wanted.tokens_per_minute,
            }
            self._buckets[name] = {
                kind: _changed(kept.get(kind), limit, now_us) for kind, limit in by_kind.items() if limit is not None
            }

    def take(self, name: str, kind: Kind, count: int, now_us: int) -> Exceeded | None:
        """Take `count` if they are there, else nothing; says why not."""
        bucket = self._bucket(name, kind)
        if bucket is None:
            return None
        wait_us = bucket.wait_us(count, now_us)
        if wait_us == 0:
            bucket.take(count, now_us)
            return None
        return Exceeded(kind, bucket.limit, bucket.limit - bucket.left(now_us), count, wait_us)

    def settle(self, name: str, reserved: int, used: int, now_us: int) -> None:
        """A request that took `reserved` tokens has ended, having used `used`."""
        bucket = self._bucket(name, "tokens")
        if bucket is not None:
            bucket.take(used - reserved, now_us)

    def standing(self, name: str, now_us: int) -> list[Standing]:
        """What is left of each of the key's limits, requests first."""
        return [
            Standing(kind, bucket.limit, bucket.left(now_us), bucket.reset_us(now_us))
            for kind, bucket in self._buckets.get(name, {}).items()
        ]

    def _bucket(self, name: str, kind: Kind) -> Bucket | None:
        return self._buckets.get(name, {}).get(kind)


def _changed(bucket: Bucket | None, limit: int, now_us: int) -> Bucket:
    if bucket is None:
        return Bucket(limit, now_us)
    if bucket.limit != limit:
        bucket.change(limit, now_us)
    return bucket
