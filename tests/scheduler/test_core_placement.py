import pytest

from mell_scheduler.core import AskReport, LeadershipTaken
from mell_shared.messages.scheduler import SequenceFinished
from tests.scheduler.script import SECOND, Script, only_reply, placed, queued, replies


def test_new_leader_asks_all_workers_to_report() -> None:
    """A leader that knows nothing asks everybody."""
    assert Script().send(LeadershipTaken(term=7)) == [AskReport(None)]


def test_places_on_the_fullest_worker_with_room() -> None:
    """Best fit: a second sequence joins the first rather than waking the empty worker."""
    script = Script()
    script.up("a", "b")
    assert script.answer("s1") == placed("a")
    assert script.answer("s2") == placed("a")


def test_moves_on_when_the_worker_is_full() -> None:
    """What no longer fits on one worker goes to the next."""
    script = Script()
    script.up("a", "b")
    assert [script.answer(f"s{i}", 480, 16) for i in range(4)] == [placed("a")] * 3 + [placed("b")]


def test_arrivals_leave_head_room_but_an_empty_worker_takes_all_that_fits() -> None:
    """Head-room keeps a used worker from being filled up; a request of a whole worker still finds an empty one."""
    script = Script(head_room=0.2)
    script.up("a", "b")
    assert script.answer("big", 1_584, 16) == placed("a")
    assert script.answer("s1", 1_100, 16) == placed("b")
    assert script.answer("s2", 100, 16) == placed("b")
    assert script.answer("s3", 160, 16) is None


def test_pending_placements_count_before_any_report() -> None:
    """Room given away is gone at once, long before a report can tell."""
    script = Script()
    script.up("a")
    assert script.answer("s1", 1_584, 16) == placed("a")
    assert script.answer("s2", 16, 1) is None


def test_a_pending_placement_survives_a_report_that_does_not_know_it_yet() -> None:
    """A report composed before the submission arrived frees nothing."""
    script = Script()
    script.up("a")
    script.ask("s1", 1_584, 16)
    script.report("a")
    assert script.answer("s2", 16, 1) is None


def test_a_placement_nobody_confirms_stops_counting() -> None:
    """After the submit timeout the room is free again, and who waits for it gets it."""
    script = Script(submit_timeout_us=2 * SECOND, queue_hold_us=SECOND * 3 // 2)
    script.up("a")
    script.ask("s1", 1_584, 16)
    script.wait(1)
    assert script.answer("s2", 160, 16) is None
    assert only_reply(script.wait(1), "s2") == placed("a")


def test_a_confirmed_placement_does_not_expire() -> None:
    """Once reported, a sequence counts until a report or its end says otherwise."""
    script = Script(submit_timeout_us=2 * SECOND)
    script.up("a")
    script.ask("s1", 1_584, 16)
    script.report("a", ("s1", 1, 1_584, 99))
    script.wait(2.5)
    script.report("a", ("s1", 1, 1_590, 100))
    assert script.answer("s2", 16, 1) is None


def test_the_end_of_a_sequence_frees_its_room_for_who_waits() -> None:
    """A held request is placed the moment there is room, before its hold is over."""
    script = Script()
    script.up("a")
    script.ask("s1", 1_584, 16)
    assert script.answer("s2") is None
    assert only_reply(script.finish("a", "s1"), "s2") == placed("a")


def test_a_lost_end_is_noticed_in_the_next_report() -> None:
    """A sequence that a newer report no longer lists has ended."""
    script = Script()
    script.up("a")
    script.ask("s1", 1_584, 16)
    script.report("a", ("s1", 1, 1_584, 99))
    assert script.answer("s2") is None
    assert only_reply(script.report("a"), "s2") == placed("a")


def test_ends_of_unknown_sequences_workers_and_old_generations_change_nothing() -> None:
    """Late and misdirected ends are harmless."""
    script = Script()
    script.up("a")
    script.ask("s1", 1_584, 16, generation=3)
    for worker, sequence, generation in (("a", "x", 1), ("gone", "s1", 3), ("a", "s1", 2)):
        event = SequenceFinished(worker=worker, sequence=sequence, generation=generation, reason="stop")
        assert script.send(event) == []
    assert script.answer("s2", 16, 1) is None


def test_a_repeat_gets_the_first_answer() -> None:
    """Asking again for the same generation neither moves the sequence nor counts it twice."""
    script = Script()
    script.up("a", "b")
    assert [script.answer("s1", 800, 16) for _ in range(3)] == [placed("a")] * 3
    assert script.answer("s2", 700, 16) == placed("a")


def test_a_repeat_after_the_report_gets_the_first_answer() -> None:
    """A confirmed placement is as idempotent as a pending one."""
    script = Script()
    script.up("a", "b")
    script.ask("s1")
    script.report("a", ("s1", 1, 160, 10))
    assert script.answer("s1") == placed("a")


def test_an_excluded_worker_is_not_named_and_its_room_is_free_again() -> None:
    """A frontend that excludes the worker it was given has given that place up."""
    script = Script()
    script.up("a", "b")
    assert script.answer("s1", 1_584, 16) == placed("a")
    assert script.answer("s1", 1_584, 16, excluded=("a",)) == placed("b")
    assert script.answer("s2", 1_584, 16) == placed("a")


def test_a_newer_generation_is_placed_anew() -> None:
    """A re-submission goes where there is room; the copy it replaces stays charged until a report forgets it."""
    script = Script()
    script.up("a", "b")
    script.ask("s1", 1_000, 16)
    script.report("a", ("s1", 1, 1_000, 63))
    assert script.answer("s1", 1_000, 16, generation=2) == placed("b")
    script.report("a", ("s1", 1, 1_000, 63))
    assert script.answer("s2", 1_000, 16) is None
    assert only_reply(script.report("a"), "s2") == placed("a")


def test_an_ask_overtaken_by_a_newer_generation_is_told_to_wait_and_changes_nothing() -> None:
    """A late duplicate of an old ask must not take room or displace the newer placement."""
    script = Script()
    script.up("a")
    script.ask("s1", 160, 16, generation=2)
    assert script.answer("s1", 160, 16, generation=1) == queued(0)
    assert script.answer("s1", 160, 16, generation=2) == placed("a")


def test_an_ask_overtaken_in_the_queue_is_told_to_wait() -> None:
    """The same, while the newer one still waits; that one keeps its handle."""
    script = Script()
    script.up("a")
    script.ask("big", 1_584, 16)
    script.ask("s1", 160, 16, generation=2)
    assert script.answer("s1", 160, 16, generation=1) == queued(0)
    assert only_reply(script.finish("a", "big"), "s1") == placed("a")


def test_the_sequence_count_is_a_capacity_of_its_own() -> None:
    """A worker at its sequence limit takes nothing, however much memory is free."""
    script = Script()
    script.up("a", max_sequences=2)
    assert [script.answer(f"s{i}", 16, 1) for i in range(3)] == [placed("a"), placed("a"), None]
    assert only_reply(script.finish("a", "s0"), "s2") == placed("a")


def test_superseded_copies_count_as_sequences_too() -> None:
    """A worker that still runs an old copy has one seat less."""
    script = Script()
    script.up("a", max_sequences=2)
    script.ask("s1", 16, 1)
    script.report("a", ("s1", 1, 16, 1))
    script.up("b")
    assert script.answer("s1", 16, 1, generation=2, excluded=("a",)) == placed("b")
    script.leave("b")
    assert script.answer("s2", 16, 1) == placed("a")
    assert script.answer("s3", 16, 1) is None
    assert only_reply(script.finish("a", "s1"), "s3") == placed("a")


def test_a_worker_slower_than_the_target_gets_nothing_more() -> None:
    """Step time is a capacity where a target is set; an idle worker is never too slow."""
    script = Script(tpot_target_us=50_000)
    script.up("a")
    assert script.answer("s1", 16, 1) == placed("a")
    script.report("a", ("s1", 1, 16, 1), step_us=60_000)
    assert script.answer("s2", 16, 1) is None
    assert only_reply(script.report("a", ("s1", 1, 17, 2), step_us=40_000), "s2") == placed("a")
    script.finish("a", "s2")
    script.report("a", step_us=60_000)
    assert script.answer("s3", 16, 1) == placed("a")


def test_workers_of_one_model_may_differ_in_block_size() -> None:
    """Blocks are counted in each worker's own unit."""
    script = Script()
    script.up("small", block_tokens=4, kv_blocks=100)
    script.up("large", block_tokens=64, kv_blocks=100)
    assert script.answer("s1", 380, 16) == placed("small")
    assert script.answer("s2", 380, 16) == placed("large")


def test_a_request_goes_only_to_a_worker_that_can_hold_all_of_it() -> None:
    """Room for the prompt is not enough where prompt and output together could never fit."""
    script = Script()
    script.up("short", max_model_len=256)
    script.up("long")
    assert script.answer("s1", 160, 16) == placed("short")
    assert script.answer("s2", 160, 200) == placed("long")


def test_a_request_without_an_output_limit_fits_a_worker_it_fills() -> None:
    """Growth is predicted up to what a worker can hold, not beyond: else such a request would wait for ever."""
    script = Script()
    script.up("a", kv_blocks=10)
    assert script.answer("s1", 159, None) == placed("a")


def test_models_do_not_share_workers() -> None:
    """A worker takes its own model's sequences only."""
    script = Script()
    script.up("a", model="m")
    script.up("b", model="other")
    assert script.answer("s1") == placed("a")
    assert script.answer("s2", model="other") == placed("b")


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_equal_workers_are_used_in_order_of_joining(order: list[str]) -> None:
    """Ties are broken by arrival, so that the same events give the same placements."""
    script = Script()
    script.up(*order)
    assert script.answer("s1") == placed(order[0])


def test_a_worker_that_reports_a_waiting_sequence_settles_it() -> None:
    """After a failover a report may say that a queued sequence runs already: its frontend is told where."""
    script = Script()
    script.up("a")
    script.ask("big", 1_584, 16)
    assert script.answer("s1") is None
    said = script.report("a", ("big", 1, 1_584, 90), ("s1", 1, 160, 10))
    assert replies(said) == {"s1": placed("a")}


def test_sequences_of_earlier_leaders_are_counted() -> None:
    """State is rebuilt from reports alone."""
    script = Script()
    script.join("a")
    script.report("a", ("old", 4, 1_500, 94))
    assert script.answer("s1") is None
    assert script.answer("old", 1_500, 16, generation=4) == placed("a")


def test_a_report_that_a_given_up_sequence_runs_does_not_bring_it_back() -> None:
    """A frontend that excluded a worker while the sequence waits is not sent there, whatever that worker reports."""
    script = Script()
    script.up("a")
    script.ask("s1")
    assert script.answer("s1", excluded=("a",)) is None
    assert script.report("a", ("s1", 1, 160, 10)) == []
    script.join("b")
    assert only_reply(script.report("b"), "s1") == placed("b")
