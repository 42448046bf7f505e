"""Requests and tokens per minute: the buckets by property, and what a client sees of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mell_frontend.allowance import EVERYBODY, Allowances, duration
from mell_frontend.errors import ApiError
from mell_frontend.generation import GenerationError
from mell_frontend.key_store import KeyStore
from mell_frontend.keys import ApiKey, key_digest, show_entry
from mell_frontend.rate_limits import Bucket, Limits, RateLimiter
from mell_shared.clock import ManualClock
from tests.frontend.scripted_gateway import ScriptedGateway, say

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
MINUTE_US = 60_000_000


class BucketAgainstHistory(RuleBasedStateMachine):
    """A bucket beside the plain list of what was taken from it, and when."""

    LIMIT = 7

    def __init__(self) -> None:
        super().__init__()
        self.now_us = 0
        self.bucket = Bucket(self.LIMIT, 0)
        self.taken: list[tuple[int, int]] = []

    @rule(step_us=st.integers(0, MINUTE_US // 3))
    def wait(self, step_us: int) -> None:
        """Let time pass."""
        self.now_us += step_us

    @rule(count=st.integers(0, 9))
    def ask(self, count: int) -> None:
        """Take if it is admitted; the wait told is exact: a microsecond sooner is too soon."""
        wait_us = self.bucket.wait_us(count, self.now_us)
        if count > self.LIMIT:
            assert wait_us is None
        elif wait_us == 0:
            assert self.bucket.left(self.now_us) >= count
            self.bucket.take(count, self.now_us)
            self.taken.append((self.now_us, count))
        else:
            assert wait_us is not None
            assert self.bucket.left(self.now_us) < count
            self.now_us += wait_us - 1
            assert self.bucket.wait_us(count, self.now_us) == 1
            self.now_us += 1
            assert self.bucket.wait_us(count, self.now_us) == 0

    @invariant()
    def never_more_than_was_allowed(self) -> None:
        """In any stretch of time, no more went than a full bucket and what flowed in meanwhile."""
        for position, (since_us, _) in enumerate(self.taken):
            went = sum(count for _, count in self.taken[position:])
            assert went * MINUTE_US <= self.LIMIT * (MINUTE_US + self.now_us - since_us)
        assert 0 <= self.bucket.left(self.now_us) <= self.LIMIT
        full_us = self.now_us + self.bucket.reset_us(self.now_us)
        assert Bucket(self.LIMIT, 0).left(full_us) == self.LIMIT


TestBucketAgainstHistory = BucketAgainstHistory.TestCase


@given(st.integers(1, 2**31 - 1), st.lists(st.integers(0, 10**12), max_size=8))
def test_filling_in_steps_is_filling_at_once(limit: int, steps_us: list[int]) -> None:
    """How often a bucket is looked at changes nothing: no rounding adds up."""
    watched, left_alone = Bucket(limit, 0), Bucket(limit, 0)
    for bucket in (watched, left_alone):
        bucket.take(2 * limit, 0)
    now_us = 0
    for step_us in steps_us:
        now_us += step_us
        watched.left(now_us)
    assert watched.left(now_us) == left_alone.left(now_us)
    assert watched.reset_us(now_us) == left_alone.reset_us(now_us)


def test_a_minute_s_worth_at_once_then_evenly() -> None:
    """A limit of 3 lets three in, then one each twenty seconds."""
    limiter = RateLimiter()
    limiter.set_limits({"a": Limits(requests_per_minute=3)}, 0)
    assert [limiter.take("a", "requests", 1, 0) for _ in range(3)] == [None] * 3
    refused = limiter.take("a", "requests", 1, 0)
    assert refused is not None
    assert (refused.limit, refused.used, refused.requested, refused.wait_us) == (3, 3, 1, 20_000_000)
    assert limiter.take("a", "requests", 1, 20_000_000) is None
    assert limiter.take("a", "requests", 1, 20_000_001) is not None


def test_what_was_not_used_is_given_back_and_debt_is_waited_out() -> None:
    """Tokens reserved and not needed are there again at once; more than was reserved delays the next."""
    limiter = RateLimiter()
    limiter.set_limits({"a": Limits(tokens_per_minute=600)}, 0)
    assert limiter.take("a", "tokens", 500, 0) is None
    assert limiter.take("a", "tokens", 200, 0) is not None
    limiter.settle("a", 500, 100, 0)
    assert limiter.standing("a", 0)[0].remaining == 500
    assert limiter.take("a", "tokens", 10, 0) is None
    limiter.settle("a", 10, 700, 0)
    [standing] = limiter.standing("a", 0)
    assert (standing.remaining, standing.reset_us) == (0, 80_000_000)
    refused = limiter.take("a", "tokens", 1, 0)
    assert refused is not None
    assert refused.wait_us == 20_100_000
    assert refused.used == 600


def test_a_request_over_the_limit_itself_never_fits() -> None:
    """Asking for more than a minute's worth is refused without a time to come back."""
    limiter = RateLimiter()
    limiter.set_limits({"a": Limits(tokens_per_minute=100)}, 0)
    refused = limiter.take("a", "tokens", 101, 0)
    assert refused is not None
    assert refused.wait_us is None
    assert limiter.standing("a", 0)[0].remaining == 100


def test_keys_have_buckets_of_their_own_and_keep_them() -> None:
    """One key's hunger is not another's; a new limit keeps what was used; a key without one is never refused."""
    limiter = RateLimiter()
    limiter.set_limits({"a": Limits(2), "b": Limits(2), "free": Limits()}, 0)
    for _ in range(2):
        assert limiter.take("a", "requests", 1, 0) is None
    assert limiter.take("a", "requests", 1, 0) is not None
    assert limiter.take("b", "requests", 1, 0) is None
    assert all(limiter.take(name, "requests", 10**9, 0) is None for name in ("free", "never heard of"))
    limiter.set_limits({"a": Limits(3)}, 0)
    assert [limiter.take("a", "requests", 1, 0) is None for _ in range(2)] == [True, False]
    limiter.set_limits({"a": Limits(1)}, 0)
    assert limiter.standing("a", 0)[0].remaining == 0
    assert limiter.standing("b", 0) == []


@pytest.mark.parametrize(
    ("time_us", "shown"),
    [
        (0, "0ms"),
        (1, "1ms"),
        (17_000, "17ms"),
        (999_999, "1s"),
        (1_500_000, "1.5s"),
        (59_999_999, "1m0s"),
        (90_951_000, "1m30.951s"),
        (360_000_000, "6m0s"),
    ],
)
def test_durations_look_as_openai_s(time_us: int, shown: str) -> None:
    """Times in headers are written as OpenAI writes them, rounded up."""
    assert duration(time_us) == shown


def allowances(tmp_path: Path, clock: ManualClock) -> Allowances:
    """Return allowances of a key with limits of its own, one without, and nobody in particular."""
    path = tmp_path / "keys.toml"
    path.write_text(show_entry("own", "one", 2, 100) + show_entry("general", "two", None, None))
    return Allowances(KeyStore([], path), Limits(1, None), clock)


def test_a_key_s_own_limits_come_first(tmp_path: Path) -> None:
    """General limits hold for keys without their own, and for everybody together where there are no keys."""
    clock = ManualClock()
    made = allowances(tmp_path, clock)
    limits = {}
    for name in ("own", "general", None):
        key = None if name is None else ApiKey(name, key_digest(b""))
        limits[name or EVERYBODY] = {
            header.decode(): value.decode() for header, value in made.of(key).headers() if b"-limit-" in header
        }
    own = {"x-ratelimit-limit-requests": "2", "x-ratelimit-limit-tokens": "100"}
    general = {"x-ratelimit-limit-requests": "1"}
    assert limits == {"own": own, "general": general, EVERYBODY: general}


def test_a_refused_request_may_come_back_when_it_is_told(tmp_path: Path) -> None:
    """`Retry-After` is the truth: then the same request is admitted."""
    clock = ManualClock()
    made = allowances(tmp_path, clock)
    own = ApiKey("own", key_digest(b"one"))
    for _ in range(2):
        made.of(own).admit()
    with pytest.raises(ApiError) as refused:
        made.of(own).admit()
    assert refused.value.headers == {"Retry-After": "30", "retry-after-ms": "30000"}
    clock.advance_us(30_000_000)
    made.of(own).admit()


async def test_headers_tell_what_is_left(connect: Callable[..., httpx.AsyncClient], gateway: ScriptedGateway) -> None:
    """Answers, streams and refusals carry the headers; what was reserved is given back when the answer has ended."""
    gateway.script = say("abc")
    client = connect(requests_per_minute=10, tokens_per_minute=1000)
    prompt = (await client.post("/tokenize", json={"messages": ASK["messages"]})).json()["count"]
    for stream, left in ((False, 8), (True, 7)):
        response = await client.post(CHAT, json={**ASK, "stream": stream})
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "10"
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        assert response.headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(response.headers["x-ratelimit-remaining-tokens"]) <= 1000 - prompt - 4
        assert response.headers["x-ratelimit-reset-requests"].endswith("s")
    wrong = await client.post(CHAT, json={})
    assert wrong.status_code == 400
    assert wrong.headers["x-ratelimit-remaining-requests"] == "6"
    left_tokens = int(wrong.headers["x-ratelimit-remaining-tokens"])
    assert 1000 - 2 * (prompt + 4) <= left_tokens < 1000
    assert "x-ratelimit-limit-requests" not in (await client.get("/v1/models")).headers


async def test_too_many_requests_are_a_429(connect: Callable[..., httpx.AsyncClient], gateway: ScriptedGateway) -> None:
    """Over the limit the error has OpenAI's form, and nothing reaches the gateway."""
    client = connect(requests_per_minute=1)
    assert (await client.post(CHAT, json=ASK)).status_code == 200
    refused = await client.post(CHAT, json=ASK)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("requests", None, "rate_limit_exceeded")
    assert "on requests per min (RPM): Limit 1, Used 1, Requested 1. Please try again in " in error["message"]
    assert 55 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(gateway.streams) == 1
    assert (await client.get("/v1/models")).status_code == 200


async def test_too_many_tokens_are_a_429(connect: Callable[..., httpx.AsyncClient], gateway: ScriptedGateway) -> None:
    """A request that could use more than is left waits its turn; one over the limit itself is not to be repeated."""
    client = connect(tokens_per_minute=200)
    gateway.script = say("a" * 90, "length")
    first = await client.post(CHAT, json={**ASK, "max_tokens": 90, "n": 1})
    assert first.status_code == 200
    refused = await client.post(CHAT, json={**ASK, "max_tokens": 50, "n": 2})
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert "retry-after" in refused.headers
    never = await client.post(CHAT, json={**ASK, "max_tokens": 100, "n": 2})
    assert never.headers["x-should-retry"] == "false"
    assert "retry-after" not in never.headers
    assert "too large" in never.json()["error"]["message"]
    assert len(gateway.streams) == 1


async def test_what_was_never_begun_is_not_charged(
    connect: Callable[..., httpx.AsyncClient], gateway: ScriptedGateway
) -> None:
    """A request that found the queue full costs no tokens."""
    client = connect(tokens_per_minute=100)
    gateway.script = lambda _request: [GenerationError("queue_full", "full", retry_after_s=2.0)]
    for _ in range(5):
        response = await client.post(CHAT, json={**ASK, "max_tokens": 60})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "2"


async def test_openai_s_client_understands_a_limit(connect: Callable[..., httpx.AsyncClient]) -> None:
    """The OpenAI client raises its own `RateLimitError`, and does not repeat what can never succeed."""
    client = connect(tokens_per_minute=50)
    sent = 0

    async def count(_request: httpx.Request) -> None:
        nonlocal sent
        sent += 1

    client.event_hooks["request"].append(count)
    async with openai.AsyncOpenAI(base_url="http://mell/v1", api_key="none", http_client=client) as asking:
        with pytest.raises(openai.RateLimitError) as caught:
            await asking.chat.completions.create(**{**ASK, "max_tokens": 1000})
    assert caught.value.code == "rate_limit_exceeded"
    assert sent == 1
