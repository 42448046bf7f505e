import pytest

from mell_shared.messages.scheduler import Rejected
from tests.scheduler.script import SECOND, Script, only_reply, placed, queued, reason, replies


def test_no_worker_at_all() -> None:
    """Once the grace is over, there is nothing to wait for; the client is told when to try again."""
    script = Script(worker_grace_us=5 * SECOND)
    script.wait(5)
    reply = script.answer("s1")
    assert isinstance(reply, Rejected)
    assert (reply.reason, reply.retry_after_s) == ("no_worker", 5.0)


def test_a_start_without_workers_is_given_time() -> None:
    """Requests that come before the workers are held, and placed when one appears."""
    script = Script(worker_grace_us=5 * SECOND, queue_hold_us=SECOND)
    script.wait(1)
    assert script.answer("s1") is None
    script.join("a")
    assert only_reply(script.report("a"), "s1") == placed("a")


def test_a_model_whose_last_worker_went_is_given_time_again() -> None:
    """A worker that is restarted must not cost its clients an error."""
    script = Script(worker_grace_us=5 * SECOND)
    script.up("a")
    script.wait(8)
    script.report("a")
    script.leave("a")
    script.wait(4)
    assert script.answer("s1") is None
    assert replies(script.wait(1)) == {"s1": queued(0)}
    assert reason(script.answer("s1", waited_s=1)) == "no_worker"


def test_an_unknown_model_while_others_are_served() -> None:
    """The client asked for something else; what is served is named."""
    script = Script()
    script.up("a", "b")
    script.up("c", model="other")
    script.settle()
    reply = script.answer("s1", model="gpt-5")
    assert isinstance(reply, Rejected)
    assert reply.reason == "unknown_model"
    assert "'gpt-5'" in reply.message
    assert "m, other" in reply.message


def test_an_unknown_model_is_held_while_workers_may_still_appear() -> None:
    """A new leader has not heard everybody; it must not send a client away for that."""
    script = Script()
    script.up("a")
    assert script.answer("s1", model="other") is None
    script.join("b", model="other")
    assert only_reply(script.report("b"), "s1") == placed("b")


@pytest.mark.parametrize(
    ("tokens", "output", "limit"),
    [(1_600, None, 1_600), (1_000, 601, 1_600), (1, 2**40, 1_600)],
    ids=["prompt alone", "prompt and output", "absurd output"],
)
def test_too_large_for_every_worker(tokens: int, output: int | None, limit: int) -> None:
    """What no worker of the model could ever hold is rejected, with the limit."""
    script = Script()
    script.up("a")
    script.up("b", model="other", kv_blocks=10_000)
    script.settle()
    reply = script.answer("s1", tokens, output)
    assert isinstance(reply, Rejected)
    assert (reply.reason, reply.limit_tokens) == ("too_large", limit)


def test_exactly_the_limit_fits() -> None:
    """The limit is the last length that works, not the first that does not."""
    script = Script()
    script.up("a")
    script.settle()
    assert script.answer("s1", 1_000, 600) == placed("a")


def test_the_context_is_a_limit_too() -> None:
    """A model's context binds where memory would not."""
    script = Script()
    script.up("a", max_model_len=100)
    script.settle()
    reply = script.answer("s1", 100, 1)
    assert isinstance(reply, Rejected)
    assert reply.limit_tokens == 100


def test_a_large_request_is_held_while_larger_workers_may_still_appear() -> None:
    """A new leader does not know the largest worker yet."""
    script = Script()
    script.up("a")
    assert script.answer("s1", 3_000, 16) is None
    script.join("large", kv_blocks=1_000)
    assert only_reply(script.report("large"), "s1") == placed("large")


def test_workers_that_drain_do_not_raise_the_limit() -> None:
    """A request that only a leaving worker could hold would wait in vain."""
    script = Script()
    script.up("a")
    script.up("large", kv_blocks=1_000)
    script.settle()
    script.report("large", draining=True)
    assert reason(script.answer("s1", 3_000, 16)) == "too_large"


def test_a_queued_request_is_judged_again_at_each_repeat() -> None:
    """What can no longer be placed is rejected instead of waiting for ever."""
    script = Script()
    script.up("a")
    script.up("large", kv_blocks=300)
    script.settle()
    script.ask("big", 4_000, 16)
    assert script.answer("s1", 3_990, 16) is None
    script.wait(0.9)
    script.leave("large")
    assert reason(script.answer("s1", 3_990, 16, waited_s=0.9)) == "too_large"
