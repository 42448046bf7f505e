"""`mell scaler` against a real stack with two schedulers; the test itself is the cluster that its program talks to."""

import sys
from pathlib import Path

import pytest

from mell_shared.messages.admin import STATUS
from tests.cluster.stack import QUICK, Service, Stack, StreamedChat, eventually

pytestmark = pytest.mark.connected

PROGRAM = """
import sys
with open(sys.argv[1], "a") as file:
    print(*sys.argv[2:], file=file)
"""


def leads(scheduler: Service) -> bool:
    """Whether it has become the leader."""
    return any(event["role"] == "leader" for event in scheduler.events("ready"))


def test_a_leader_change_neither_starts_nor_stops_and_an_empty_worker_goes(tmp_path: Path) -> None:
    """One order for the worker that is missing, though the leader dies meanwhile; one to stop it when it is empty."""
    program, told = tmp_path / "program.py", tmp_path / "told"
    program.write_text(PROGRAM)
    told.touch()
    with Stack(tmp_path, {**QUICK, "MELL_QUEUE_WAIT_S": "0"}) as stack:
        first = stack.start_scheduler()
        eventually(lambda: leads(first), "a leader")
        second = stack.start_scheduler()
        second.ready()
        stack.start_worker("worker-1", step_us=60_000, kv_blocks=28).ready()
        frontend = stack.start_frontend()
        with stack.client(frontend) as client:
            times = ["--scale-up-s", "0", "--scale-down-s", "3", "--scale-cooldown-s", "1"]
            flags = ["--max-workers", "2", *times, "--stop-order", "last"]
            command = f"{sys.executable},{program},{told}"
            scaler = stack.start(
                "mell_console", "scaler", "--url", str(client.base_url), "--scale-command", command, *flags
            )
            scaler.ready()
            # Each ends with 26 blocks or so: no two of them fit on one worker, for long enough to be seen.
            streams = [StreamedChat(client, 400) for _ in range(3)]

            def told_so_far() -> str:
                return f"{told.read_text()!r} is told, by {scaler.lines()}"

            eventually(lambda: told.read_text() == "start 2 worker-2\n", told_so_far)
            first.kill()
            eventually(lambda: leads(second), "another leader")
            added = stack.start_worker("worker-2", step_us=60_000, kv_blocks=28)
            added.ready()
            for stream in streams:
                stream.read()
                assert stream.finish_reason == "length"
            orders = "start 2 worker-2\nstop 1 worker-2\n"
            eventually(lambda: told.read_text() == orders, told_so_far)
            status = STATUS.validate_python(client.get("/admin/status").json())
            [worker] = [row for row in status.workers if row.name == "worker-2"]
            assert (worker.state, worker.sequences) == ("drained", 0)
            added.ask_to_stop()
            assert added.exit_code() == 0
            scaler.ask_to_stop()
            assert scaler.exit_code() == 0
            assert told.read_text() == orders
