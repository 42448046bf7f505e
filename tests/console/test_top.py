"""`mell top`: what a state looks like, what ends it, and which code it ends with."""

import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mell_console.cli import app
from mell_console.top.screen import bar, frame
from mell_shared.messages.admin import GpuUse, MoveStatus, Status, WorkerStatus
from mell_shared.messages.live import FrontendFigures, GpusLately, LiveRows, LiveState, LiveTrouble
from tests.console.answering import answering


def worker(name: str, state: str = "active", used: int = 0, **more: Any) -> WorkerStatus:
    """A worker of 100 blocks."""
    fields: dict[str, Any] = {
        "worker": f"{name}-1234", "name": name, "host": "h", "model": "m", "engine": "fake", "device": "cpu",
        "state": state, "kv_blocks": 100, "used_blocks": used, "block_tokens": 16, "running": 1, "waiting": 0,
        "step_us": 20_000, "report_age_s": 0.5, "kv_bytes_per_token": 65_536,
    }  # fmt: skip
    return WorkerStatus.model_validate({**fields, **more})


def live(*workers: WorkerStatus, rows: LiveRows | None = None, **status: Any) -> LiveState:
    """A state of some workers."""
    use = GpuUse(
        since_s=100,
        up=3,
        used=2,
        up_gpu_s=300,
        used_gpu_s=3_600,
        shadow_policy="worst-fit",
        shadow=3,
        shadow_gpu_s=4_800,
    )
    fields = {"scheduler": "s", "policy": "repack", "uptime_s": 1.0, "queued": 0, "placed": 0, "rejected": 0}
    return LiveState(
        number=1,
        interval_s=1.0,
        status=Status.model_validate({**fields, "workers": workers, "gpu_use": use, **status}),
        rows=rows or LiveRows(),
        lately=GpusLately(),
        frontend=FrontendFigures(tokens_per_s=1_234, first_tokens=2, ttft_p50_s=0.05, ttft_p99_s=0.2),
    )


def shown(state: LiveState, width: int = 120, height: int | None = None, trouble: str = "") -> str:
    """The frame as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(frame(state, width, height, trouble))
    return capture.get()


def event(kind: str, message: LiveState | LiveTrouble) -> bytes:
    """One event of the feed."""
    return f"event: {kind}\ndata: {message.model_dump_json()}\n\n".encode()


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and complaint of a command."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


ROWS = LiveRows(
    sequence=["s0", "s1", "s2", "s3"],
    worker=[0, 0, 0, -1],
    target=[-1, -1, 1, -1],
    tokens=[320, 160, 160, 80],
    blocks=[20, 10, 10, 0],
    state=[0, 1, 2, 3],
)


def test_a_bar_shows_each_sequence_by_its_state() -> None:
    """Running, placed and moving ones, what else is used, what is free; as long as it is told to be."""
    state = live(worker("a", used=50), worker("b", "standby"), rows=ROWS)
    drawn = bar(state, state.status.workers[0], [0, 1, 2], "blue", 50)
    assert drawn.plain == "█" * 10 + "▒" * 5 + "▶" * 5 + "░" * 5 + "·" * 25
    empty = bar(state, state.status.workers[1], [], "blue", 10)
    assert empty.plain == "·" * 10


@pytest.mark.parametrize("blocks", [0, 1, 100, 1_000])
def test_a_bar_never_leaves_its_column(blocks: int) -> None:
    """Also where more is counted than there is, as with prefixes that many share."""
    rows = LiveRows(sequence=["s"], worker=[0], target=[-1], tokens=[1], blocks=[blocks], state=[0])
    state = live(worker("a", used=100), rows=rows)
    assert len(bar(state, state.status.workers[0], [0], "blue", 33)) == 33


def test_a_frame_has_the_figures_of_the_page() -> None:
    """GPUs and what is saved, tokens, first tokens, who waits, memory, moves."""
    move = MoveStatus(
        migration="m", sequence="s2", source="a-1234", target="b-1234", mode="kv", reason="consolidate", blocks=10,
        outcome="committed", copied_bytes=3 * 2**20, copy_s=0.1, took_s=0.2, stopped_s=0.03, ago_s=4,
    )  # fmt: skip
    state = live(worker("a", used=50), worker("b", "standby"), rows=ROWS, recent_moves=(move,), moves_paused=True)
    text = shown(state, width=170)
    for words in (
        "GPUs 2 of 3 in use", "1.00 GPU-hours", "worst-fit 3, 1.33 GPU-hours: 25% saved", "paused",
        "1 active, 1 standby", "tokens/s 1,234", "first token 50 ms, 99% 200 ms", "waiting 1", "KV 25% 50 MiB",
        "20.0 ms", "committed", "kv", "consolidate", "3 MiB copied",
    ):  # fmt: skip
        assert words in text


def test_a_frame_fits_a_terminal_and_says_what_it_leaves_out() -> None:
    """Workers that hold something come first."""
    state = live(*(worker(f"w{number:02}", "standby" if number < 30 else "active") for number in range(40)))
    text = shown(state, width=100, height=24, trouble="no scheduler answers")
    lines = text.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].strip() == "no scheduler answers"
    assert all(f"w{number}" in text for number in range(30, 40))
    assert "w29" not in text
    assert "more workers" in text


def test_a_frame_with_moves_fits_a_terminal_of_80_columns() -> None:
    """Each worker and each move is a line, also where head lines are broken."""
    move = MoveStatus(
        migration="m", sequence=f"chatcmpl-{'a' * 24}.0.0", source="w01-1234", target="w02-1234", mode="hybrid",
        reason="consolidate", blocks=10, outcome="committed", copied_bytes=3 * 2**20, copy_s=0.1, took_s=0.2, ago_s=4,
    )  # fmt: skip
    workers = [worker(f"w{number:02}") for number in range(40)]
    text = shown(live(*workers, recent_moves=(move,) * 10), width=80, height=24)
    assert len(text.splitlines()) <= 24
    assert text.count("w01 > w02  hybrid  consolidate  4.0 s") >= 3


def test_workers_are_in_the_order_of_their_numbers() -> None:
    """Like on the page."""
    text = shown(live(*(worker(f"gpu-{number}") for number in (10, 9, 1))))
    assert text.index("gpu-1 ") < text.index("gpu-9") < text.index("gpu-10")


def test_once_prints_one_state_and_ends() -> None:
    """Code 0; the key goes with the request."""
    state = event("state", live(worker("a")))
    with answering(200, state + state) as (url, seen):
        code, text, _ = run("top", "--once", "--url", url, "--admin-key", "secret")
    assert code == 0
    assert text.count("tokens/s") == 1
    assert (seen[0]["path"], seen[0]["authorization"]) == ("/admin/live", "Bearer secret")


def test_json_is_a_line_for_each_state() -> None:
    """As it came; the end of the feed is told, and is code 1."""
    state = live(worker("a"))
    with answering(200, event("state", state) * 2) as (url, _):
        code, text, complaint = run("top", "--json", "--url", url)
        assert [LiveState.model_validate(json.loads(line)) for line in text.splitlines()] == [state, state]
        assert (code, "has ended the feed" in complaint) == (1, True)
        code, text, _ = run("top", "--json", "--once", "--url", url)
    assert (code, len(text.splitlines())) == (0, 1)


def test_frames_for_a_pipe_are_printed_one_after_the_other() -> None:
    """Where there is no terminal nothing is drawn over."""
    with answering(200, event("state", live(worker("a"))) * 3) as (url, _):
        code, text, _ = run("top", "--url", url)
    assert (code, text.count("tokens/s")) == (1, 3)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, event("trouble", LiveTrouble(number=1, message="no scheduler answers")), "no scheduler answers"),
        (401, b'{"error": {"message": "Incorrect or missing admin key"}}', "MELL_ADMIN_KEY"),
        (404, b"<html>", "is the stack up"),
        (200, b"event: state\ndata: {}\n\n", "not as a Mell frontend does"),
        (200, b"nothing of ours", "has ended the feed"),
    ],
)
def test_what_it_cannot_show_is_one_line_and_code_1(status: int, body: bytes, told: str) -> None:
    """Like every command of an operator."""
    with answering(status, body) as (url, _):
        code, text, complaint = run("top", "--once", "--url", url)
    assert (code, text) == (1, "")
    assert told in complaint
    assert len(complaint.splitlines()) == 1


def test_nobody_there_is_code_1() -> None:
    """A port that nobody listens on."""
    code, _, complaint = run("top", "--once", "--url", "http://127.0.0.1:1")
    assert code == 1
    assert "is the stack up" in complaint
