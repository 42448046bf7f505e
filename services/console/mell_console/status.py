"""`mell status`: what the scheduler knows, asked through a frontend."""

import json
import sys

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from mell_console.get import GetError, get_json
from mell_shared.messages.admin import STATUS, Status, WorkerStatus

_WIDE = 200
_STATE_STYLES = {"active": "green", "standby": "dim", "draining": "yellow", "silent": "red"}


def run(url: str, api_key: str, *, as_json: bool) -> int:
    """Print the status of the stack at `url`; return the exit code."""
    try:
        answer = get_json(f"{url.rstrip('/').removesuffix('/v1')}/admin/status", api_key)
        status = STATUS.validate_python(answer)
    except GetError as error:
        sys.stderr.write(f"mell: {error}; is the stack up? (mell up, or --url)\n")
        return 1
    except ValidationError:
        sys.stderr.write(f"mell: {url} answers, but not as a Mell frontend does; use --url\n")
        return 1
    if as_json:
        sys.stdout.write(json.dumps(answer, indent=1) + "\n")
    else:
        # Where nobody looks at a screen's edge, nothing is cut off.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
        console.print(headline(status), soft_wrap=True)
        console.print(workers_table(status))
    return 0


def headline(status: Status) -> str:
    """Return the cluster in one line."""
    counts = f"{status.placed} placed, {status.queued} queued, {status.rejected} rejected"
    return f"{status.scheduler} ({status.policy}) up {status.uptime_s:,.0f} s: {counts}"


def workers_table(status: Status) -> Table:
    """Return a row for each worker, by name."""
    table = Table("worker", "model", "on", "state", "KV blocks", "run", "wait", "step", "heard", box=None)
    for worker in sorted(status.workers, key=lambda worker: (worker.name, worker.worker)):
        style = _STATE_STYLES[worker.state]
        table.add_row(
            worker.worker,
            worker.model,
            f"{worker.host} {worker.device}",
            f"[{style}]{worker.state}[/{style}]",
            kv_use(worker),
            str(worker.running),
            str(worker.waiting),
            f"{worker.step_us / 1000:.1f} ms" if worker.step_us else "",
            f"{worker.report_age_s:.1f} s",
        )
    return table


def kv_use(worker: WorkerStatus) -> str:
    """Return the KV blocks used, all there are, and the share."""
    return f"{worker.used_blocks}/{worker.kv_blocks} {worker.used_blocks / worker.kv_blocks:.0%}"
