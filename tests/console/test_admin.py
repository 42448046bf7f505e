"""The operators' commands against a scripted frontend: what is sent, what is shown, the exit codes."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from mell_console.admin import drain as drain_command
from mell_console.admin.words import seconds, size, span
from mell_console.cli import app
from mell_shared.messages.admin import (
    DrainReply,
    DrainRow,
    Explanation,
    Happening,
    MigrateReply,
    ModelStatus,
    MoveResult,
    MoveStatus,
    MovingReply,
    SequenceStatus,
    Status,
    Story,
    WorkerStatus,
)
from mell_shared.messages.base import Message
from tests.console.answering import answering

MOVE = MoveStatus(
    migration="1-1", sequence="s.0.0", source="w1-x", target="w2-x", mode="hybrid", reason="manual",
    outcome="committed", predicted_s=0.1, took_s=0.25, stopped_s=0.008, copied_bytes=3 << 20, copy_s=0.2,
)  # fmt: skip


def mell(*arguments: str) -> tuple[int, str, str]:
    """Return exit code, output and errors of a command."""
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.stdout, result.stderr


def said(*messages: Message) -> list[bytes]:
    """The bodies of a frontend's answers."""
    return [json.dumps(message.model_dump(mode="json")).encode() for message in messages]


def words(text: str) -> list[str]:
    """The lines, without their columns' width."""
    return [" ".join(line.split()) for line in text.splitlines()]


def worker(state: str, sequences: int) -> Status:
    """A status with one worker in this state."""
    row = WorkerStatus.model_validate(
        {
            "worker": "w1-x", "name": "w1", "host": "h", "model": "m", "engine": "fake", "device": "cpu",
            "state": state, "kv_blocks": 10, "used_blocks": 1, "block_tokens": 16, "running": sequences,
            "waiting": 0, "step_us": 0, "report_age_s": 0.1, "sequences": sequences,
        }
    )  # fmt: skip
    return Status(scheduler="s", policy="p", uptime_s=1, workers=(row,), queued=0, placed=0, rejected=0)


def drained(**changes: Any) -> DrainReply:
    """The answer to a drain of a worker with two sequences, one of which finds no room."""
    rows = (DrainRow(sequence="a", blocks=3, target="w2-x"), DrainRow(sequence="b", blocks=9, why="no room"))
    return DrainReply.model_validate({"worker": "w1-x", "name": "w1", "draining": True, "sequences": rows, **changes})


def test_a_drain_sends_its_deadline_and_shows_the_plan() -> None:
    """Each sequence with where it goes, or why nowhere; the key goes along."""
    with answering(200, *said(drained(deadline_s=90.0))) as (url, seen):
        code, out, _ = mell("drain", "w1", "--deadline", "1.5m", "--url", url, "--admin-key", "k")
    assert code == 0
    assert (seen[0]["method"], seen[0]["path"]) == ("POST", "/admin/workers/w1/drain")
    assert (json.loads(seen[0]["body"]), seen[0]["authorization"]) == (
        {"deadline_s": 90.0, "dry_run": False},
        "Bearer k",
    )
    lines = words(out)
    assert lines[0].startswith(
        "w1-x takes nothing new and is being emptied: 2 sequences to move; what is left after 90 s"
    )
    assert lines[2:] == ["a 3 w2-x", "b 9 no room"]


def test_a_rehearsal_without_room_for_all_is_code_1() -> None:
    """So that a script can ask before it drains."""
    with answering(200, *said(drained(dry_run=True))) as (url, seen):
        code, out, _ = mell("drain", "w1", "--dry-run", "--url", url)
    assert (code, json.loads(seen[0]["body"])) == (1, {"dry_run": True})
    assert "would be drained" in out
    whole = drained(dry_run=True, sequences=(DrainRow(sequence="a", blocks=3, target="w2-x"),))
    with answering(200, *said(whole)) as (url, _):
        assert mell("drain", "w1", "--dry-run", "--url", url)[0] == 0


def test_waiting_for_a_drain_ends_when_the_worker_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is told when it changes; a worker that has left is empty too."""
    monkeypatch.setattr(drain_command, "_POLL_S", 0.0)
    states = [worker("active", 2), worker("draining", 2), worker("draining", 1), worker("drained", 0)]
    with answering(200, *said(drained(), *states)) as (url, _):
        code, _, errors = mell("drain", "w1", "--wait", "--url", url)
    assert (code, errors.splitlines()) == (0, ["2 left", "1 left", "w1-x is empty"])
    gone = worker("active", 0).model_copy(update={"workers": ()})
    with answering(200, *said(drained(), gone)) as (url, _):
        assert mell("drain", "w1", "--wait", "--url", url)[::2] == (0, "w1-x has left\n")


def test_waiting_outlasts_a_change_of_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody answers, or a new leader has not heard from everybody yet, the worker has not left."""
    monkeypatch.setattr(drain_command, "_POLL_S", 0.0)
    new = worker("active", 0).model_copy(update={"workers": (), "settled": False})
    bodies = said(drained(), worker("draining", 2), new, worker("draining", 2), worker("drained", 0))
    with answering(200, *bodies[:2], b"nobody answers", *bodies[2:]) as (url, _):
        code, _, errors = mell("drain", "w1", "--wait", "--url", url)
    assert (code, errors.splitlines()) == (0, ["2 left", "w1-x is empty"])
    monkeypatch.setattr(drain_command, "_PATIENCE_S", 0.0)
    with answering(200, *bodies[:2], b"nobody answers") as (url, _):
        code, _, errors = mell("drain", "w1", "--wait", "--url", url)
    assert code == 1
    assert "no JSON" in errors


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code 3 after the timeout; code 1 if somebody has undrained it."""
    monkeypatch.setattr(drain_command, "_POLL_S", 0.0)
    with answering(200, *said(drained(), worker("draining", 2))) as (url, _):
        code, _, errors = mell("drain", "w1", "--wait", "--timeout", "0s", "--url", url)
    assert code == 3
    assert "still holds 2" in errors
    monkeypatch.setattr(drain_command, "_GRACE_S", 0.0)
    with answering(200, *said(drained(), worker("active", 2))) as (url, _):
        code, _, errors = mell("drain", "w1", "--wait", "--url", url)
    assert code == 1
    assert "undrained" in errors


@pytest.mark.parametrize(
    ("state", "code"), [("committed", 0), ("there", 0), ("failed", 1), ("refused", 1), ("moving", 3)]
)
def test_a_move_is_shown_with_its_cost_and_its_code(state: str, code: int) -> None:
    """0: it is there; 1: it is not; 3: nobody knows yet."""
    result = MoveResult.model_validate(
        {"sequence": "s.0.0", "state": state, "message": "s.0.0: because", "move": MOVE if state != "there" else None}
    )
    with answering(200, *said(MigrateReply(target="w2-x", moves=(result,)))) as (url, seen):
        got, out, _ = mell("migrate", "a/b", "--to", "w2", "--mode", "hybrid", "--wait", "500ms", "--url", url)
    assert got == code
    assert seen[0]["path"] == "/admin/requests/a%2Fb/migrate"
    assert json.loads(seen[0]["body"]) == {"to": "w2", "mode": "hybrid", "wait_s": 0.5}
    shown = words(out)[1]
    assert shown.startswith(f"s.0.0 {state} w2-x")
    if state in ("committed", "moving"):
        assert shown.endswith("hybrid 250 ms, predicted 100 ms, stopped 8 ms, 3 MiB copied in 200 ms")
    else:
        assert shown.endswith("because")


def test_a_story_is_told_line_by_line() -> None:
    """Placements with the room there was, moves with what they cost, what is no longer remembered."""
    happenings = (
        Happening(
            what="placed", ago_s=90, worker="w1-x", generation=1, why="repack", blocks=3, free_blocks=9, waited_s=2
        ),
        Happening(what="moving", ago_s=5, worker="w1-x", generation=1, why="manual", move=MOVE),
        Happening(what="moved", ago_s=4, worker="w1-x", generation=1, move=MOVE),
    )
    story = Story(
        sequence="s.0.0", request_id="mine", state="running", worker="w2-x", tokens=48, blocks=3,
        happenings=happenings, left_out=7,
    )  # fmt: skip
    waiting = Story(sequence="s.0.1", state="waiting", model="m", position=4, waited_s=3)
    with answering(200, *said(Explanation(stories=(story, waiting)))) as (url, seen):
        code, out, _ = mell("explain", "mine", "--url", url)
    assert (code, seen[0]["path"]) == (0, "/admin/requests/mine")
    lines = words(out)
    assert lines[0] == "s.0.0 (mine): running on w2-x, 48 tokens, 3 KV blocks"
    assert lines[2] == "90.0 s placed w1-x 1 repack 3 blocks of 9 free after 2.0 s"
    assert lines[3] == "... 7 more are no longer remembered"
    assert lines[5] == (
        "4.0 s moved w1-x -> w2-x 1 hybrid, 250 ms, predicted 100 ms, stopped 8 ms, 3 MiB copied in 200 ms"
    )
    assert "s.0.1: waiting for 3.0 s, 4 of m before it" in lines


def test_reasons_are_shown_as_they_are() -> None:
    """What looks like Rich's markup in somebody's message is neither swallowed nor the end of the command."""
    why = "an answer that makes no sense: [type=missing] [/x]"
    failed = MOVE.model_copy(update={"outcome": "failed", "why": why})
    result = MoveResult(sequence="s.0.0", state="failed", reason="unsupported", message=f"s.0.0: {why}", move=failed)
    happening = Happening(what="stayed", ago_s=1, worker="w1-x", generation=1, why=why, move=failed)
    story = Story(sequence="s.0.0", state="over", happenings=(happening,))
    plan = DrainReply(
        worker="w1-x", name="w1", draining=True, sequences=(DrainRow(sequence="s.0.0", blocks=2, why=why),)
    )
    status = worker("active", 1).model_copy(update={"recent_moves": (failed,)})
    for command, answer in (
        (("migrate", "s", "--to", "w2"), MigrateReply(target="w2-x", moves=(result,))),
        (("explain", "s"), Explanation(stories=(story,))),
        (("drain", "w1"), plan),
        (("status",), status),
    ):
        with answering(200, *said(answer)) as (url, _):
            _, text, _ = mell(*command, "--url", url)
        assert why in text, command


def test_names_are_shown_as_they_are() -> None:
    """A client may call its request what it likes, an operator a model: no name ends a command, or is swallowed."""
    odd = "[/x][red]y"
    move = MOVE.model_copy(update={"sequence": odd, "source": odd, "target": odd, "reason": odd})
    row = SequenceStatus(sequence=odd, request_id=odd, state="moving", worker=odd, target=odd)
    seen = worker("active", 1).workers[0].model_copy(update={"worker": odd, "model": odd})
    status = worker("active", 1).model_copy(
        update={
            "workers": (seen,), "sequences": (row,), "recent_moves": (move,), "scheduler": odd, "policy": odd,
            "models": (ModelStatus(model=odd, gpus_wanted=1),),
        }
    )  # fmt: skip
    placed = Happening(what="placed", ago_s=1, worker=odd, generation=1)
    moved = Happening(what="moved", ago_s=1, worker=odd, generation=1, move=move)
    running = Story(sequence=odd, request_id=odd, state="running", worker=odd, happenings=(placed, moved))
    waiting = Story(sequence=odd, state="waiting", model=odd)
    plan = (DrainRow(sequence=odd, blocks=1, target=odd),)
    result = MoveResult(sequence=odd, state="committed", message="", move=move)
    for command, answer, times in (
        (("status", "--requests"), status, 3 + 2 + 4 + 4),
        (("explain", "s"), Explanation(stories=(running, waiting)), 3 + 1 + 2 + 2),
        (("drain", "w"), drained(worker=odd, sequences=plan), 3),
        (("migrate", "s", "--to", "w2"), MigrateReply(target=odd, moves=(result,)), 2),
    ):
        with answering(200, *said(answer)) as (url, _):
            code, text, errors = mell(*command, "--url", url)
        assert (code, text.count(odd), errors) == (0, times, ""), (command, text)


def test_moves_are_paused_and_resumed() -> None:
    """Each says what that means."""
    with answering(200, *said(MovingReply(paused=True), MovingReply(paused=False))) as (url, seen):
        assert "mell moves resume" in mell("moves", "pause", "--url", url)[1]
        assert "again" in mell("moves", "resume", "--url", url)[1]
    assert [ask["path"] for ask in seen] == ["/admin/moves/pause", "/admin/moves/resume"]


def test_undrain_says_what_holds_now() -> None:
    """The worker's whole id."""
    with answering(200, *said(drained(draining=False, sequences=()))) as (url, seen):
        assert mell("undrain", "w1", "--url", url)[:2] == (0, "w1-x takes work again\n")
    assert seen[0]["path"] == "/admin/workers/w1/undrain"


@pytest.mark.parametrize(
    "command",
    [("drain", "w1"), ("undrain", "w1"), ("migrate", "s", "--to", "w1"), ("explain", "s"), ("moves", "pause")],
)
def test_every_command_prints_json_and_refusals_in_one_line(command: tuple[str, ...]) -> None:
    """JSON is the answer itself; a refusal is the scheduler's words on stderr, code 1."""
    replies: dict[str, Message] = {
        "drain": drained(), "undrain": drained(), "explain": Explanation(stories=()), "moves": MovingReply(paused=True),
        "migrate": MigrateReply(target="w", moves=()),
    }  # fmt: skip
    reply = replies[command[0]]
    with answering(200, *said(reply)) as (url, _):
        code, out, _ = mell(*command, "--json", "--url", url)
    assert (code, json.loads(out)) == (0, reply.model_dump(mode="json"))
    error = b'{"error": {"message": "there is no such thing", "code": "unknown_worker"}}'
    with answering(404, error) as (url, _):
        assert mell(*command, "--url", url) == (1, "", "mell: there is no such thing\n")


def test_a_wrong_command_line_is_code_2() -> None:
    """A mode or a duration that does not exist."""
    assert mell("migrate", "s", "--to", "w", "--mode", "magic")[0] == 2
    code, _, errors = mell("drain", "w1", "--deadline", "soon")
    assert code == 2
    assert "30s" in errors


def test_figures_are_read_and_written_as_people_do() -> None:
    """Units suit the size; durations take the usual suffixes."""
    assert [seconds(text) for text in ("30", "30s", "500ms", "2m", "1.5H")] == [30, 30, 0.5, 120, 5400]
    with pytest.raises(ValueError, match="30s"):
        seconds("-1s")
    assert [span(s) for s in (0, 0.0004, 0.25, 0.9999, 59.94, 600, 10_000)] == [
        "0 ms", "<1 ms", "250 ms", "1.0 s", "59.9 s", "10 min", "2.8 h",
    ]  # fmt: skip
    assert [size(n) for n in (0, 2048, 5 << 20, 3 << 30)] == ["0 B", "2 KiB", "5 MiB", "3.0 GiB"]
