"""Fetches a model from the Hugging Face hub: weights as safetensors, configuration, tokenizer; never code."""

import json
import shutil
from pathlib import Path

from mell_gpu_worker.model_store.errors import ModelStoreError

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "LICENSE*"]
_TOP_LEVEL_ONLY = ["*/*"]


def fetch_from_hub(name: str, folder: Path) -> str:
    """Download `name` into `folder` (what is there already is kept); return the revision.

    The hub client's own settings hold: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME. Raises `ModelStoreError`.
    """
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 (half a second, only needed here)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        if constants.HF_HUB_OFFLINE:
            snapshot = Path(snapshot_download(name, local_files_only=True, allow_patterns=PATTERNS))
            revision = snapshot.name
            shutil.copytree(snapshot, folder, dirs_exist_ok=True)
        else:
            snapshot_download(name, local_dir=folder, allow_patterns=PATTERNS, ignore_patterns=_TOP_LEVEL_ONLY)
            revision = _downloaded_revision(folder)
    except LocalEntryNotFoundError as error:
        raise ModelStoreError(_unreachable(name, offline=constants.HF_HUB_OFFLINE)) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelStoreError(f"the hub refused {name!r}: {_first_line(error)}; check the name and HF_TOKEN") from error
    _require_complete(name, folder)
    return revision


def _downloaded_revision(folder: Path) -> str:
    """Return the commit that the hub client noted for the files, and drop its notes."""
    notes = folder / ".cache"
    metadata = notes / "huggingface" / "download" / "config.json.metadata"
    revision = metadata.read_text().split("\n", 1)[0] if metadata.is_file() else "unknown"
    shutil.rmtree(notes, ignore_errors=True)
    return revision


def _require_complete(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelStoreError(f"{name} on the hub has no config.json: it is not a transformers model")
    index = folder / "model.safetensors.index.json"
    needed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(file for file in needed if not (folder / file).is_file())
    if missing:
        raise ModelStoreError(f"{name} has no {missing[0]}: only safetensors weights are loaded")


def _unreachable(name: str, *, offline: bool) -> str:
    if offline:
        return f"{name} is not in the hub cache and HF_HUB_OFFLINE is set; unset it or pull where there is a network"
    return f"could not reach the hub for {name}; check the network, or give a local folder"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
