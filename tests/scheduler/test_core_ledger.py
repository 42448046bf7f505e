from tests.scheduler.script import SECOND, Script, only_reply, placed


def free_blocks(script: Script, worker: str) -> int:
    """What may still be given away there."""
    ledger = script.core.ledger
    return ledger.free_blocks(ledger.workers[worker])


def test_a_row_is_charged_with_its_size_at_the_end_of_the_next_epoch() -> None:
    """160 tokens are 10 blocks; growing by 40 an epoch they will be 200, which are 13."""
    script = Script()
    script.up("a")
    script.report("a", ("s1", 1, 120, 8))
    script.report("a", ("s1", 1, 160, 10))
    assert free_blocks(script, "a") == 100 - 13


def test_growth_is_counted_per_report_not_per_second() -> None:
    """Reports that arrive in a bunch must not look like a burst of growth; lost ones are counted in."""
    script = Script()
    script.up("a")
    script.report("a", ("s1", 1, 120, 8))
    script.numbers["a"] += 1
    script.report("a", ("s1", 1, 160, 10))
    assert free_blocks(script, "a") == 100 - 12, "20 tokens for each of two epochs"


def test_growth_is_bounded() -> None:
    """An absurd gain is not believed."""
    script = Script(growth_limit_tokens=32)
    script.up("a")
    script.report("a", ("s1", 1, 16, 1))
    script.report("a", ("s1", 1, 816, 51))
    assert free_blocks(script, "a") == 100 - 53


def test_growth_stops_at_what_the_request_asked_for() -> None:
    """A sequence near its output limit is not predicted to pass it."""
    script = Script()
    script.up("a")
    script.ask("s1", 100, 12)
    script.report("a", ("s1", 1, 100, 7))
    script.report("a", ("s1", 1, 111, 7))
    assert free_blocks(script, "a") == 100 - 7


def test_a_stall_does_not_end_the_prediction_at_once() -> None:
    """A sequence that stood still for an epoch behind a prefill goes on growing."""
    script = Script()
    script.up("a")
    script.report("a", ("s1", 1, 100, 7))
    script.report("a", ("s1", 1, 180, 12))
    script.report("a", ("s1", 1, 180, 12))
    assert free_blocks(script, "a") == 100 - 15, "180 and three quarters of 80 are 240 tokens"


def test_new_sequences_are_expected_to_grow_as_others_did() -> None:
    """The mean growth of a model's sequences is learned from reports."""
    script = Script()
    script.up("a")
    tokens = 16
    script.report("a", ("s1", 1, tokens, 1))
    for _ in range(40):
        tokens += 32
        script.report("a", ("s1", 1, tokens, tokens // 16))
    before = free_blocks(script, "a")
    script.ask("s2", 16, None)
    assert before - free_blocks(script, "a") == 3, "16 + 32 tokens"


def test_a_preempted_sequence_is_charged_with_what_it_will_need_again() -> None:
    """It holds no block now, and will be resumed before anything new is placed."""
    script = Script()
    script.up("a")
    script.report("a", ("s1", 1, 1_500, 0), states=[1])
    assert script.answer("s2") is None


def test_blocks_used_by_nothing_known_count() -> None:
    """Used is what is not free, whatever the rows add up to."""
    script = Script()
    script.up("a")
    script.report("a", free_blocks=5, used_blocks=95)
    assert free_blocks(script, "a") == 5


def test_shared_blocks_count_once() -> None:
    """Two sequences over one prefix use less than the sum of their rows."""
    script = Script()
    script.up("a")
    rows = [("s1", 1, 800, 50), ("s2", 1, 800, 50)]
    script.report("a", *rows, free_blocks=40, used_blocks=60)
    assert free_blocks(script, "a") == 40 - 2, "each is about to need one block more"


def test_the_end_of_one_sharer_frees_only_what_surely_was_its_own() -> None:
    """Until the next report nobody knows whether its blocks are still shared."""
    script = Script()
    script.up("a")
    rows = [("s1", 1, 800, 50), ("s2", 1, 800, 50)]
    script.report("a", *rows, free_blocks=40, used_blocks=60)
    script.finish("a", "s1")
    assert free_blocks(script, "a") == 40 - 1 + 10


def test_a_sequence_that_moved_is_followed() -> None:
    """A higher generation in another worker's report takes the sequence over; the old copy counts as other use."""
    script = Script()
    script.up("a", "b")
    script.report("a", ("s1", 1, 800, 50))
    script.report("b", ("s1", 2, 800, 50))
    assert script.answer("s1", generation=2) == placed("b")
    assert free_blocks(script, "a") == 50
    script.report("a")
    assert free_blocks(script, "a") == 100


def test_an_older_copy_elsewhere_is_no_more_than_used_blocks() -> None:
    """A worker that still runs a superseded generation does not get the sequence back."""
    script = Script()
    script.up("a", "b")
    script.report("b", ("s1", 2, 800, 50))
    script.report("a", ("s1", 1, 1_600, 100))
    assert free_blocks(script, "a") == 0
    assert script.answer("s1", generation=2) == placed("b")


def test_an_old_copy_beside_its_own_resubmission() -> None:
    """A sequence re-submitted to the worker that still runs its older generation is charged for both."""
    script = Script()
    script.up("a")
    script.report("a", ("s1", 1, 640, 40))
    assert script.answer("s1", 640, 16, generation=2) == placed("a")
    script.report("a", ("s1", 1, 640, 40))
    assert free_blocks(script, "a") == 100 - 40 - 41
    script.report("a", ("s1", 2, 640, 40))
    assert free_blocks(script, "a") == 100 - 41


def test_an_end_of_the_old_copy_leaves_the_new_one() -> None:
    """Generations tell the two apart."""
    script = Script()
    script.up("a", "b")
    script.report("a", ("s1", 1, 800, 50))
    script.ask("s1", 800, 16, generation=2, excluded=("a",))
    script.finish("a", "s1", generation=1)
    assert script.answer("s1", 800, 16, generation=2) == placed("b")


def test_a_report_that_lists_a_sequence_twice_does_not_count_it_twice() -> None:
    """A peer's mistake must not break the books."""
    script = Script()
    script.up("a")
    script.report("a", ("s1", 1, 160, 10), ("s1", 2, 160, 10))
    assert free_blocks(script, "a") == 100 - 20 - 1


def test_a_placement_that_another_worker_reports_in_the_same_generation_waits_for_its_own() -> None:
    """Two copies of one generation: the pending one stands until it times out, then the running one is taken."""
    script = Script(submit_timeout_us=2 * SECOND)
    script.up("a", "b")
    script.ask("s1", 800, 16, excluded=("a",))
    script.report("a", ("s1", 1, 800, 50))
    assert script.answer("s1", 800, 16) == placed("b")
    script.wait(2)
    script.report("a", ("s1", 1, 800, 50))
    assert script.answer("s1", 800, 16) == placed("a")


def test_room_that_a_report_frees_goes_to_who_waits() -> None:
    """A report with more free blocks than before is an occasion to place."""
    script = Script()
    script.up("a")
    script.report("a", free_blocks=0, used_blocks=100)
    assert script.answer("s1") is None
    assert only_reply(script.report("a"), "s1") == placed("a")
