"""A pulled folder's checksum file: written last, verified whenever the folder may have changed since."""

import hashlib
import json
from pathlib import Path

from mell_gpu_worker.model_store.errors import ModelStoreError

CHECKSUMS_FILE = "mell-checksums.json"
_CHUNK_BYTES = 1 << 22


def write_checksums(folder: Path, source: str) -> None:
    """Record every file of `folder`: size, modification time and SHA-256; `source` says where they came from."""
    files = {path.name: _entry(path, sha256_of(path)) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / CHECKSUMS_FILE).write_text(json.dumps({"source": source, "files": files}, indent=1))


def verify_checksums(folder: Path) -> None:
    """Raise `ModelStoreError` unless all recorded files are there, unchanged.

    Files whose size and modification time are those recorded are not read again. A folder without a checksum
    file is somebody's own and passes.
    """
    record = folder / CHECKSUMS_FILE
    if not record.is_file():
        return
    try:
        files: dict[str, dict[str, object]] = json.loads(record.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelStoreError(f"{record} is damaged; delete {folder} and pull the model again") from error
    for name, entry in files.items():
        _verify_file(folder / name, entry)


def _verify_file(path: Path, entry: dict[str, object]) -> None:
    if not path.is_file():
        raise ModelStoreError(f"{path} is missing; delete {path.parent} and pull the model again")
    state = path.stat()
    if state.st_size == entry["size_bytes"] and state.st_mtime_ns == entry["mtime_ns"]:
        return
    if sha256_of(path) != entry["sha256"]:
        raise ModelStoreError(f"{path} is damaged (checksum); delete {path.parent} and pull the model again")


def _entry(path: Path, sha256: str) -> dict[str, object]:
    state = path.stat()
    return {"size_bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": sha256}


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
