"""What the scheduler remembers of a request: by hand, and within its bounds."""

import pytest

from mell_scheduler.core import CoreSettings
from mell_scheduler.core.explain import explain
from mell_scheduler.core.history import History, Page
from mell_shared.messages.admin import AdminRefused, Explanation, Story
from tests.scheduler.script import SECOND, Script
from tests.scheduler.test_core_moves import KV, Packed


def story(scene: Script, name: str) -> Story:
    """The one story that goes by a name."""
    told = explain(scene.core, name, scene.now_us)
    assert isinstance(told, Explanation)
    (only,) = told.stories
    return only


def happened(scene: Script, name: str) -> list[tuple[str, str, int]]:
    """What happened to a sequence: what, where, in which generation."""
    return [(h.what, h.worker, h.generation) for h in story(scene, name).happenings]


def test_a_placement_is_remembered_with_its_reasons() -> None:
    """Which worker, how much it needed and how much room there was, how long it had waited, who was excluded."""
    script = Script()
    script.up("a", "b")
    script.ask("s", 160, 16, waited_s=2.5, request_id="mine", excluded=("a",))
    told = story(script, "s")
    (placed,) = told.happenings
    assert (told.state, told.worker, told.request_id, told.model) == ("placed", "b", "mine", "m")
    assert (placed.what, placed.worker, placed.blocks, placed.free_blocks) == ("placed", "b", 11, 100)
    assert placed.waited_s == 2.5
    assert "best-fit" in placed.why
    assert "a" in placed.why
    script.now_us += 3 * SECOND
    assert story(script, "mine").happenings[0].ago_s == 3.0


def test_a_move_is_told_with_what_it_was_to_cost_and_what_it_cost() -> None:
    """While it is under way, and when it is over."""
    scene = Packed()
    order = scene.order()
    assert story(scene, "small").state == "moving"
    (found, begun) = story(scene, "small").happenings
    assert (found.what, begun.what, begun.why) == ("found", "moving", "consolidate")
    assert begun.move is not None
    assert begun.move.outcome == "moving"
    scene.now_us += SECOND // 2
    scene.commit(order, copied_bytes=1_000_000, copy_us=200_000, stopped_us=5_000)
    moved = story(scene, "small").happenings[-1]
    assert (moved.what, moved.worker) == ("moved", "b")
    move = moved.move
    assert move is not None
    assert (move.target, move.mode, move.outcome) == ("a", "kv", "committed")
    assert move.predicted_s == pytest.approx(160 * 131_072 / 125e6, rel=0.01)
    assert (move.took_s, move.stopped_s, move.copy_s, move.copied_bytes) == (0.5, 0.005, 0.2, 1_000_000)
    assert story(scene, "small").happenings[1].move == move


def test_the_cost_of_a_move_that_a_report_told_first_is_written_in() -> None:
    """The page of the move gets it, wherever it stands by then."""
    scene = Packed()
    order = scene.order()
    scene.report("a", ("big", 1, 640, 40), ("small", 2, 161, 11))
    moved = story(scene, "small").happenings[-1]
    assert moved.move is not None
    assert (moved.what, moved.move.copied_bytes, "reports" in moved.why) == ("moved", 0, True)
    scene.commit(order, copied_bytes=1_000_000, stopped_us=5_000)
    moved = story(scene, "small").happenings[-1]
    assert moved.move is not None
    assert (moved.why, moved.move.copied_bytes, moved.move.stopped_s) == ("", 1_000_000, 0.005)


def test_a_failed_move_is_told_with_its_reason() -> None:
    """The sequence stays where it is."""
    scene = Packed()
    scene.fail(scene.order(), "no_room")
    told = story(scene, "small")
    assert (told.happenings[-1].what, told.happenings[-1].why, told.worker) == ("stayed", "no_room", "b")


@pytest.mark.parametrize("dies", ["a", "b"])
def test_a_move_whose_worker_dies_is_over(dies: str) -> None:
    """With the source, if it left in order, it is where it went to; with the target it stays."""
    scene = Packed()
    scene.order()
    scene.leave(dies)
    what = [h.what for h in story(scene, "small").happenings]
    assert what == ["found", "moving", "moved" if dies == "b" else "stayed"]


def test_one_story_spans_generations() -> None:
    """Placed, lost with its worker, placed again, ended: one after the other."""
    script = Script()
    script.up("a", "b")
    script.ask("s")
    script.report("a", ("s", 1, 161, 11))
    script.leave("a")
    assert story(script, "s").state == "over"
    script.ask("s", generation=2, excluded=("a",))
    script.report("b", ("s", 2, 170, 11))
    assert story(script, "s").state == "running"
    script.finish("b", "s", 2)
    assert happened(script, "s") == [("placed", "a", 1), ("gone", "a", 1), ("placed", "b", 2), ("gone", "b", 2)]
    told = story(script, "s")
    assert (told.state, told.happenings[-1].why) == ("over", "ended: stop")


def test_who_waits_is_told_where_in_line() -> None:
    """Also if it was never placed."""
    script = Script()
    script.up("a")
    script.settle()
    script.report("a", ("big", 1, 1_440, 90))
    script.ask("first", 800)
    script.ask("second", 800, waited_s=0.0, request_id="r2")
    told = story(script, "r2")
    assert (told.state, told.position, told.request_id, told.happenings) == ("waiting", 1, "r2", ())


def test_all_choices_of_a_request_are_told() -> None:
    """One story for each, by the request's id; a request whose id only begins alike is another."""
    script = Script()
    script.up("a")
    for name in ("chatcmpl-1.0.0", "chatcmpl-1.0.1", "chatcmpl-11.0.0"):
        script.ask(name)
    told = explain(script.core, "chatcmpl-1", script.now_us)
    assert isinstance(told, Explanation)
    assert [s.sequence for s in told.stories] == ["chatcmpl-1.0.0", "chatcmpl-1.0.1"]


def test_an_unknown_request_is_refused() -> None:
    """The answer says by which names requests go."""
    told = explain(Script().core, "nobody", 0)
    assert isinstance(told, AdminRefused)
    assert told.reason == "unknown_request"
    assert "x-request-id" in told.message


def test_a_move_seen_in_a_report_rests_and_is_remembered() -> None:
    """One that was given up here and came to its end all the same."""
    scene = Packed(migration_timeout_us=SECOND)
    scene.order()
    scene.wait(1)
    assert story(scene, "small").happenings[-1].what == "stayed"
    scene.report("a", ("big", 1, 640, 40), ("small", 2, 161, 11))
    assert happened(scene, "small")[-2:] == [("gone", "b", 1), ("found", "a", 2)]


def test_memory_is_bounded() -> None:
    """Of those that are over the latest are kept; of one, the first page and the latest."""
    history = History(limit=2)
    for name in "abc":
        for at_us in range(40):
            history.write(name, Page(at_us, "placed", "w", 1))
        history.close(name, Page(40, "gone", "w", 1))
    assert history.get("a") is None
    kept = history.get("c")
    assert kept is not None
    assert len(kept.pages) == 32
    assert (kept.pages[0].at_us, kept.pages[1].at_us, kept.left_out) == (0, 10, 9)
    assert history.named("b") == ["b"]


def test_nothing_is_remembered_where_nothing_is_to_be() -> None:
    """As in simulations; what runs now can be named all the same."""
    scene = Packed(modes=KV, remembered_sequences=0)
    scene.second()
    told = story(scene, "small")
    assert (told.state, told.worker, told.happenings) == ("running", "b", ())
    assert CoreSettings().remembered_sequences > 0
