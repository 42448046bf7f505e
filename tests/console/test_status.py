import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mell_console import narrow
from mell_console.admin.words import saved
from mell_console.cli import app
from mell_console.get import GetError, get_json
from mell_shared.messages.admin import GpuUse, Status
from tests.console.answering import answering

STATUS: dict[str, Any] = {
    "kind": "status_reply",
    "scheduler": "scheduler-1",
    "policy": "best-fit",
    "uptime_s": 12.5,
    "queued": 1,
    "placed": 7,
    "rejected": 2,
    "workers": [
        {
            "worker": f"worker-{number}-x",
            "name": f"worker-{number}",
            "host": "here",
            "model": "m",
            "engine": "torch",
            "device": "cpu",
            "state": state,
            "kv_blocks": 200,
            "used_blocks": 50,
            "block_tokens": 16,
            "running": 3,
            "waiting": 1,
            "step_us": step_us,
            "report_age_s": 0.25,
        }
        for number, state, step_us in ((2, "silent", 0), (1, "active", 12_340))
    ],
}


def status(*arguments: str) -> tuple[int, str]:
    """Return the exit code and output of `mell status`."""
    result = CliRunner().invoke(app, ["status", *arguments])
    return result.exit_code, result.output


def test_workers_are_shown_by_name_with_what_they_hold() -> None:
    """The table has each worker's state, KV use and step time; the headline the scheduler's counts."""
    with answering(200, json.dumps(STATUS).encode()) as (url, seen):
        code, text = status("--url", f"{url}/v1/", "--admin-key", "k")
    assert code == 0
    assert (seen[0]["path"], seen[0]["authorization"]) == ("/admin/status?sequences=false", "Bearer k")
    headline, moves, _, first, second = text.splitlines()
    assert moves == "moves: 0 under way, 0 made, 0 failed"
    assert headline == "scheduler-1 (best-fit) up 12 s: 7 placed, 1 queued, 2 rejected"
    assert " ".join(first.split()) == "worker-1-x m here cpu active 50/200 25% 3 1 12.3 ms 0.2 s"
    assert " ".join(second.split()) == "worker-2-x m here cpu silent 50/200 25% 3 1 0.2 s"


def test_nothing_is_cut_off_where_nobody_looks() -> None:
    """In a pipe, a worker's long id is whole, so that it can be used in the next command."""
    worker = STATUS["workers"][0] | {"worker": "worker-1-" + "f" * 60, "state": "active"}
    with answering(200, json.dumps(STATUS | {"workers": [worker]}).encode()) as (url, _):
        assert worker["worker"] in status("--url", url)[1]


def test_json_is_the_scheduler_s_own_answer() -> None:
    """`--json` prints the message, complete, for programs."""
    with answering(200, json.dumps(STATUS).encode()) as (url, _):
        code, text = status("--url", url, "--json")
    assert code == 0
    told = json.loads(text)
    assert told.items() >= {key: value for key, value in STATUS.items() if key != "workers"}.items()
    for worker, given in zip(told["workers"], STATUS["workers"], strict=True):
        assert worker.items() >= given.items()


def test_moves_reasons_and_requests_are_shown() -> None:
    """Under way and over, why some failed, what is paused and wanted; with `--requests` each sequence."""
    move = {"migration": "1-1", "sequence": "s.0.0", "source": "w1-x", "target": "w2-x", "mode": "kv", "blocks": 3}
    moving = move | {"reason": "drain", "predicted_s": 0.5, "took_s": 0.25}
    failed = move | {"reason": "manual", "outcome": "failed", "why": "no_room", "took_s": 1.5, "ago_s": 30.0}
    sequence = {"sequence": "s.0.0", "request_id": "mine", "state": "moving", "worker": "w1-x", "target": "w2-x"}
    more = {
        "migrating": 1,
        "migrated": 4,
        "migrations_failed": 2,
        "moves_paused": True,
        "models": [{"model": "m", "gpus_wanted": 3}],
        "failures": [{"reason": "no_room", "count": 2}],
        "moves": [moving],
        "recent_moves": [failed],
        "sequences": [sequence | {"tokens": 77, "blocks": 5, "moves": 1}],
        "sequences_left_out": 9,
    }
    with answering(200, json.dumps(STATUS | more).encode()) as (url, seen):
        code, text = status("--url", url, "--requests")
    assert (code, seen[0]["path"]) == (0, "/admin/status?sequences=true")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1] == "moves: 1 under way, 4 made, 2 failed (no_room 2), paused; m wants 3 GPUs"
    assert "moving s.0.0 w1-x w2-x kv drain 250 ms so far, predicted 500 ms" in lines
    assert "failed: no_room s.0.0 w1-x w2-x kv manual 1.5 s 30.0 s" in lines
    assert "s.0.0 mine moving w1-x -> w2-x 77 5 1" in lines
    assert lines[-1] == "and 9 more"


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (503, b'{"error": {"message": "no scheduler answers"}}', "mell: no scheduler answers"),
        (404, b"<html>", "answers 404: no message"),
        (403, b'{"error": {"message": "This frontend has no admin key"}}', "MELL_ADMIN_KEY"),
        (200, b"<html>", "no JSON"),
        (200, b'{"kind": "other"}', "not as a Mell frontend does"),
    ],
)
def test_what_is_no_status_is_one_line(code: int, body: bytes, words: str) -> None:
    """A wrong server, or a stack that is not whole, is told with code 1."""
    with answering(code, body) as (url, _):
        exit_code, text = status("--url", url)
    assert exit_code == 1
    assert words in text
    assert len(text.splitlines()) == 1


def test_nobody_there_says_how_to_start() -> None:
    """A refused connection names `mell up`."""
    code, text = status("--url", "http://127.0.0.1:1")
    assert code == 1
    assert "Connection refused" in text
    assert "mell up" in text


def test_only_http_is_asked() -> None:
    """A file URL is refused rather than read."""
    with pytest.raises(GetError, match="no http address"):
        get_json("file:///etc/passwd")


def test_on_a_terminal_of_80_columns_every_row_is_a_line() -> None:
    """With names that commands take, and whole ids of sequences; two workers of one name have their ids."""
    sequence = f"chatcmpl-{'a' * 24}.0.0"
    move = {"migration": "1-1", "sequence": sequence, "mode": "hybrid", "blocks": 3, "reason": "consolidate"}
    ends = {"source": "worker-1-x", "target": "worker-2-x", "outcome": "committed", "took_s": 1.5, "ago_s": 30.0}
    row = {"sequence": sequence, "request_id": "r" * 40, "state": "running", "worker": "worker-1-x", "tokens": 99_999}
    full = Status.model_validate(STATUS | {"recent_moves": [move | ends], "sequences": [row]})
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(narrow.workers_table(full))
        console.print(narrow.moves_table(full.recent_moves, narrow.names(full.workers)))
        console.print(narrow.sequences_table(full))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert lines == [
        "worker state KV blocks run wait moving step",
        "worker-1 active 50/200 25% 3 1 12.3 ms",
        "worker-2 silent 50/200 25% 3 1",
        "move sequence from, to mode reason ago",
        "committed aaaaaaaa…aaaa.0.0 worker-1 > worker-2 hybrid consolidate 30.0 s",
        "sequence state worker tokens",
        f"{sequence} running worker-1 99999",
    ]
    twins = [worker.model_copy(update={"name": "same"}) for worker in full.workers]
    assert set(narrow.names(twins).values()) == {"worker-1-x", "worker-2-x"}


@pytest.mark.parametrize(("used", "words"), [(75, "25% saved"), (100, "0% saved"), (127, "27% more than that")])
def test_what_is_not_saved_is_not_called_so(used: int, words: str) -> None:
    """Where more GPU-time was used than the other policy would have."""
    use = GpuUse(since_s=9, up=1, used=1, up_gpu_s=9, used_gpu_s=used, shadow_policy="p", shadow=1, shadow_gpu_s=100)
    assert saved(use) == words
