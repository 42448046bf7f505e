"""`mell model`: fetches models through the worker's store, and finds those that lie on this machine."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mell_gpu_worker.model_store import ModelStoreError
from mell_gpu_worker.model_store import pull as pull_model
from mell_shared.models import FAKE_MODEL, ModelNotFoundError, default_model_dir, locate_model

Tell = Callable[[str, float | None], None]
"""Told what is being done and, where it is known, which fraction of it is done."""


def model_dir() -> Path:
    """Return the folder that models are kept in: MELL_MODEL_DIR, else the default."""
    return Path(os.environ.get("MELL_MODEL_DIR") or default_model_dir()).expanduser()


def pull(name: str, log_format: str) -> int:
    """Fetch `name`, showing progress; return the exit code."""
    if name == FAKE_MODEL:
        sys.stderr.write("the fake model has no files\n")
        return 0
    show = {"json": _pull_json, "console": _pull_drawn}.get(
        log_format, _pull_drawn if sys.stderr.isatty() else _pull_lines
    )
    try:
        folder = show(name)
    except ModelStoreError as error:
        sys.stderr.write(f"mell: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def list_models(*, as_json: bool) -> int:
    """Print the models in the model folder with their sizes; return the exit code."""
    folder = model_dir()
    found = sorted(config.parent for config in folder.glob("[!.]*/config.json"))
    rows = [{"model": path.name.replace("--", "/"), "bytes": _size(path), "folder": str(path)} for path in found]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    elif not rows:
        sys.stdout.write(f"no model in {folder}; fetch one: mell model pull smollm2-135m\n")
    else:
        Console().print(_table(rows))
    return 0


def path(name: str) -> int:
    """Print the folder that holds `name`; return the exit code."""
    try:
        sys.stdout.write(f"{locate_model(name, model_dir())}\n")
    except ModelNotFoundError as error:
        sys.stderr.write(f"mell: {error}\n")
        return 1
    return 0


def _table(rows: list[dict[str, object]]) -> Table:
    table = Table("model", "size", "folder", box=None)
    for row in rows:
        size = row["bytes"]
        assert isinstance(size, int)
        table.add_row(str(row["model"]), f"{size / 1e6:,.0f} MB", str(row["folder"]))
    return table


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _pull_json(name: str) -> Path:
    def tell(text: str, fraction: float | None) -> None:
        line = {"event": "progress", "level": "info", "text": text, "fraction": fraction}
        sys.stderr.write(json.dumps(line) + "\n")

    return pull_model(name, model_dir(), tell)


def _pull_lines(name: str) -> Path:
    said = ""

    def tell(text: str, fraction: float | None) -> None:
        nonlocal said
        if text != said:
            said = text
            sys.stderr.write(f"{text}\n")

    return pull_model(name, model_dir(), tell)


def _pull_drawn(name: str) -> Path:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None)

        def tell(text: str, fraction: float | None) -> None:
            progress.update(task, description=text, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        return pull_model(name, model_dir(), tell)
