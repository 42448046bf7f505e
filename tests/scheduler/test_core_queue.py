from mell_scheduler.core import LeadershipEnded, PlaceRequested, Reply
from mell_shared.messages.scheduler import Rejected
from tests.scheduler.script import SECOND, Script, only_reply, place_request, placed, queued, reason, replies


def full_script(**settings: int) -> Script:
    """One worker, filled by `big` (99 blocks of 100)."""
    script = Script(**settings)
    script.up("a")
    script.ask("big", 1_584, 16)
    script.report("a", ("big", 1, 1_584, 99))
    return script


def hold_up(script: Script, seconds: float) -> None:
    """Pass time while worker `a` goes on with `big`."""
    for _ in range(round(seconds)):
        script.wait(1)
        script.report("a", ("big", 1, 1_584, 99))


def test_a_waiting_request_is_held_then_told_its_position() -> None:
    """Without room the answer comes after the hold, once."""
    script = full_script()
    script.ask("s1")
    script.ask("s2")
    assert replies(script.wait(0.7)) == {}
    assert replies(script.wait(0.1)) == {"s1": queued(0), "s2": queued(1)}
    assert replies(script.wait(0.5)) == {}


def test_a_renewed_request_keeps_its_position() -> None:
    """Asking again is how one waits: it does not send a request to the back."""
    script = full_script()
    script.ask("s1")
    script.wait(0.8)
    script.ask("s2")
    script.ask("s1", waited_s=0.8)
    assert replies(script.wait(0.8)) == {"s1": queued(0), "s2": queued(1)}


def test_only_a_request_that_is_asked_for_now_is_placed() -> None:
    """Between the `Queued` reply and the repeat nobody would hear of a place; the repeat gets it."""
    script = full_script()
    script.ask("s1")
    script.wait(0.8)
    assert script.finish("a", "big") == []
    assert script.answer("s1", waited_s=0.8) == placed("a")


def test_a_repeat_while_the_first_is_held_answers_the_first() -> None:
    """Every held request gets exactly one reply, also when its frontend lost patience and asked again."""
    script = full_script()
    script.ask("s1")
    again = script.ask("s1")
    assert again == [Reply("s1#2", "s1", queued(0))]
    assert script.wait(0.8) == [Reply("s1#3", "s1", queued(0))]


def test_a_request_that_the_broker_delivered_twice_is_held_once() -> None:
    """The same handle again is the same ask."""
    script = full_script()
    event = PlaceRequested("inbox", place_request("s1"))
    assert script.send(event) == []
    assert script.send(event) == []
    assert script.wait(0.8) == [Reply("inbox", "s1", queued(0))]


def test_a_request_not_renewed_is_dropped() -> None:
    """A frontend that went away must not keep its place in the queue."""
    script = full_script(queue_renew_us=3 * SECOND)
    script.ask("gone")
    hold_up(script, 2)
    script.ask("s1")
    assert replies(script.wait(0.8)) == {"s1": queued(1)}
    script.ask("s1", waited_s=0.8)
    assert replies(script.wait(0.8)) == {"s1": queued(0)}


def test_higher_priority_goes_first() -> None:
    """Priority comes before time waited."""
    script = full_script()
    script.ask("low", 1_500, 16)
    script.ask("high", 1_500, 16, priority=1)
    assert only_reply(script.finish("a", "big"), "high") == placed("a")


def test_who_waited_longer_goes_first_after_a_failover() -> None:
    """A new leader rebuilds the order from what the frontends say they have waited."""
    script = full_script()
    script.ask("young", 1_500, 16, waited_s=1.0)
    script.ask("old", 1_500, 16, waited_s=9.0)
    assert only_reply(script.finish("a", "big"), "old") == placed("a")


def test_a_wait_of_any_length_is_taken() -> None:
    """An absurd `waited_s` is bounded, not an error."""
    script = full_script()
    script.ask("liar", waited_s=1e300)
    script.ask("other", waited_s=1e300)
    assert only_reply(script.wait(0.8)[:1], "liar") == queued(0)


def test_a_changed_priority_changes_the_position() -> None:
    """A repeat with another priority is put in its new place."""
    script = full_script()
    script.ask("s1", 1_500, 16)
    script.ask("s2", 1_500, 16)
    script.ask("s2", 1_500, 16, priority=5)
    assert only_reply(script.finish("a", "big"), "s2") == placed("a")


def test_small_requests_use_the_room_elsewhere_but_not_on_the_claimed_worker() -> None:
    """The first in line keeps its claim on one worker; others may pass it on the rest."""
    script = Script()
    script.up("a", "b")
    script.ask("s1", 1_000, 16)  # a: 63 of 100
    script.ask("s2", 1_100, 16)  # b: 70 of 100
    assert script.answer("large", 1_000, 16) is None  # claims a, with 36 free
    assert script.answer("small1", 300, 16) == placed("b")
    assert script.answer("small2", 300, 16) is None, "only the claimed worker has room for it"
    said = script.finish("a", "s1")
    assert replies(said) == {"large": placed("a"), "small2": placed("a")}


def test_a_stream_of_small_requests_never_starves_a_large_one() -> None:
    """Without the claim, room would always be taken in small pieces before a large piece is free."""
    script = Script()
    script.up("a", "b")
    for number in range(12):
        script.ask(f"s{number}", 240, 16)
    script.ask("large", 1_500, 16)
    placements: list[str] = []
    for number in range(12):
        script.ask(f"t{number}", 240, 16)
        found = script.finish("a" if number < 6 else "b", f"s{number}")
        placements += replies(found)
        if "large" in placements:
            break
    assert placements[-1] == "large"
    assert len(placements) <= 7, "it waited for more than one worker's sequences to end"


def test_the_claim_stays_where_it_is() -> None:
    """A claim that followed the freest worker would let each fill up again in its turn."""
    script = Script()
    script.up("a", "b")
    script.ask("s1", 1_000, 16)
    script.ask("s2", 1_100, 16)
    script.ask("large", 1_500, 16)
    script.report("a", ("s1", 1, 1_500, 94))
    script.report("b", ("s2", 1, 1_100, 69))
    assert script.answer("small", 16, 1) == placed("b")


def test_the_claim_moves_on_when_its_worker_is_gone() -> None:
    """A claim on a worker that takes nothing any more is worth nothing."""
    script = Script()
    script.up("a", "b")
    script.ask("s1", 1_000, 16)
    script.ask("s2", 1_100, 16)
    script.ask("large", 1_500, 16)
    script.leave("a")
    assert script.answer("small", 16, 1) is None
    assert replies(script.finish("b", "s2")) == {"large": placed("b"), "small": placed("b")}


def test_a_claimant_may_be_placed_elsewhere() -> None:
    """The claim keeps others away; it does not bind the claimant."""
    script = Script()
    script.up("a", "b")
    script.ask("s1", 1_000, 16)
    script.ask("s2", 1_100, 16)
    script.ask("large", 1_500, 16)
    assert only_reply(script.finish("b", "s2"), "large") == placed("b")
    assert script.answer("small", 300, 16) == placed("a")


def test_a_claim_ends_with_its_claimant() -> None:
    """When the first in line gives up, the room it kept is for the others."""
    script = full_script(queue_renew_us=2 * SECOND)
    script.ask("large", 1_500, 16)
    script.wait(0.8)
    script.finish("a", "big")
    script.wait(0.7)
    assert script.answer("small", 16, 1) is None, "the one before it may still ask again"
    assert only_reply(script.wait(0.6), "small") == placed("a")


def test_each_model_has_its_own_line() -> None:
    """A model without room holds up no other."""
    script = full_script()
    script.up("b", model="other")
    assert script.answer("s1") is None
    assert script.answer("s2", model="other") == placed("b")


def test_a_full_queue_rejects_and_says_when_to_come_back() -> None:
    """With no end seen lately the client is sent away for half a minute."""
    script = full_script(queue_limit=2)
    script.ask("s1")
    script.ask("s2")
    reply = script.answer("s3")
    assert isinstance(reply, Rejected)
    assert (reply.reason, reply.retry_after_s) == ("queue_full", 30.0)


def test_retry_after_follows_the_recent_rate_of_ends() -> None:
    """Ten waiting and two ends a second: five seconds."""
    script = full_script(queue_limit=10)
    for number in range(20):
        script.finish("a", f"x{number}")
        script.now_us += SECOND // 2
    for number in range(10):
        script.ask(f"s{number}")
    reply = script.answer("late")
    assert isinstance(reply, Rejected)
    assert reply.retry_after_s is not None
    assert 5.0 <= reply.retry_after_s <= 6.0


def test_a_full_queue_makes_way_for_a_more_urgent_request() -> None:
    """The last in order is rejected, whoever came last."""
    script = full_script(queue_limit=1)
    script.ask("low")
    said = replies(script.ask("high", priority=1))
    assert list(said) == ["low"]
    assert reason(said["low"]) == "queue_full"
    assert only_reply(script.wait(0.8), "high") == queued(0)


def test_one_that_nobody_asks_for_now_makes_way_silently() -> None:
    """It is told when it asks again."""
    script = full_script(queue_limit=1)
    script.ask("low")
    script.wait(0.8)
    assert script.ask("high", priority=1) == []
    assert reason(script.answer("low", waited_s=0.8)) == "queue_full"


def test_a_full_queue_still_renews_those_who_wait() -> None:
    """The bound is on how many wait, not on how often they ask."""
    script = full_script(queue_limit=1)
    script.ask("s1")
    script.wait(0.8)
    assert script.answer("s1", waited_s=0.8) is None


def test_who_finds_room_at_once_never_meets_the_bound() -> None:
    """A queue that is full for one model rejects nobody of a model with room."""
    script = full_script(queue_limit=1)
    script.up("b", model="other")
    script.ask("s1")
    assert script.answer("s2", model="other") == placed("b")


def test_a_leader_that_stops_tells_who_waits_to_ask_again() -> None:
    """The repeat reaches the next leader at once instead of after a timeout."""
    script = full_script()
    script.ask("s1")
    script.ask("s2")
    assert replies(script.send(LeadershipEnded())) == {"s1": queued(0), "s2": queued(1)}


def test_requests_far_back_are_not_tried() -> None:
    """The work for one event is bounded: only the first of the line are tried when room appears."""
    script = full_script(overtake_window=1)
    script.ask("large", 1_500, 16)
    script.ask("small", 16, 1)
    script.up("b", kv_blocks=2)
    assert replies(script.wait(0.8)) == {"large": queued(0), "small": queued(1)}


def test_a_request_between_two_asks_is_not_overtaken_by_its_like() -> None:
    """The moment between a `Queued` reply and the repeat must not cost a request its turn; smaller ones may pass."""
    script = Script(queue_hold_us=SECOND // 2)
    script.up("a", "b", "c")
    for number in range(3):
        script.ask(f"big{number}", 1_500, 16)
    script.ask("head", 1_500, 16)
    script.ask("second", 800, 16)
    script.wait(0.3)
    script.ask("third", 800, 16)
    script.ask("small", 100, 16)
    script.wait(0.2)
    assert replies(script.finish("b", "big1")) == {"small": placed("b")}
    assert replies(script.ask("second", 800, 16)) == {"second": placed("b")}


def test_who_says_to_have_waited_for_ever_is_first_and_no_harm() -> None:
    """A time that no clock can hold counts as the longest there is."""
    script = full_script()
    script.ask("s1")
    script.ask("liar", waited_s=1e308)
    assert replies(script.wait(0.8)) == {"liar": queued(0), "s1": queued(1)}
