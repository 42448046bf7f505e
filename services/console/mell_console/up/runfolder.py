"""The folder of one run: its logs and its broker's files. The newest few are kept."""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

_KEPT = 10


def make_run_folder(log_dir: str) -> Path:
    """Return a folder for this run: `log_dir` if it is named, else a new one under the state folder.

    Raises `OSError` if it cannot be made.
    """
    if log_dir:
        folder = Path(log_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    runs = state_folder() / "runs"
    folder = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    folder.mkdir(parents=True)
    _forget_old(runs)
    return folder


def state_folder() -> Path:
    """Return where Mell keeps what outlives a run (`XDG_STATE_HOME`, else ~/.local/state)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mell"


def _forget_old(runs: Path) -> None:
    # Names begin with the time, so that they sort by age; a run that still runs keeps its folder.
    for folder in sorted(runs.iterdir())[:-_KEPT]:
        if not Path("/proc", folder.name.rpartition("-")[2]).exists():
            shutil.rmtree(folder, ignore_errors=True)
