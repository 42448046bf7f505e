"""Gathers what `mell doctor` judges. Heavy packages are imported in processes of their own, with a time limit."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mell_console.up.machine import Machine, nvidia_smi, parse_gpus, read_machine
from mell_console.up.ports import take_port
from mell_shared.models import default_model_dir
from mell_shared.nats_server import NatsServerError, find_binary
from mell_shared.process import StartError

_PROBE_S = 120
_TORCH = (
    "import json, torch; print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda or '', "
    "'usable': torch.cuda.device_count() if torch.cuda.is_available() else 0}))"
)
_UCX = "import json, ucxx; print(json.dumps({'version': '.'.join(map(str, ucxx.get_ucx_version()))}))"
_FRONTEND = ("fastapi", "httptools", "jinja2", "llguidance", "tokenizers", "transformers", "uvicorn")
_WORKER = ("gguf", "llguidance", "numpy", "safetensors", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. Texts are empty where something is not there; `*_problem` says why something does not work."""

    python: tuple[int, int, int]
    system: str
    machine: Machine
    compiler: str
    driver_gpus: tuple[str, ...]
    torch_version: str
    torch_cuda: str
    torch_gpus: int
    torch_problem: str
    triton: bool
    ucx_version: str
    ucx_problem: str
    nats_server: str
    nats_url: str
    port: int
    port_problem: str
    model_dir: Path
    disk_free_bytes: int
    disk_problem: str
    missing_packages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By extra."""


def gather(port: int) -> Facts:
    """Look around; takes seconds, since torch has to be imported to know whether it works."""
    torch, torch_problem = _probe("torch", _TORCH)
    ucx, ucx_problem = _probe("ucxx", _UCX)
    model_dir = Path(os.environ.get("MELL_MODEL_DIR") or default_model_dir()).expanduser()
    disk_free_bytes, disk_problem = _disk(model_dir)
    lacking = {"frontend": _missing(_FRONTEND), "gpu-worker": _missing(_WORKER)}
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        system=f"{platform.system()} {platform.machine()}",
        machine=read_machine(),
        compiler=shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or "",
        driver_gpus=tuple(gpu.name for gpu in parse_gpus(nvidia_smi())),
        torch_version=str(torch.get("version", "")),
        torch_cuda=str(torch.get("cuda", "")),
        torch_gpus=int(torch.get("usable", 0)),
        torch_problem=torch_problem,
        triton=find_spec("triton") is not None,
        ucx_version=str(ucx.get("version", "")),
        ucx_problem=ucx_problem,
        nats_server=_nats_server(),
        nats_url=os.environ.get("MELL_NATS_URL", ""),
        port=port,
        port_problem=_port_problem(port),
        model_dir=model_dir,
        disk_free_bytes=disk_free_bytes,
        disk_problem=disk_problem,
        missing_packages={extra: names for extra, names in lacking.items() if names},
    )


def _probe(package: str, source: str) -> tuple[dict[str, Any], str]:
    """Return what `source` prints as JSON, and why it does not work; neither if the package is not installed."""
    if find_spec(package) is None:
        return {}, ""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and source
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"importing {package} takes over {_PROBE_S} s"
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or [f"importing it ends with code {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, ""


def _missing(packages: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in packages if find_spec(name) is None)


def _nats_server() -> str:
    try:
        return str(find_binary())
    except NatsServerError:
        return ""


def _port_problem(port: int) -> str:
    try:
        take_port("127.0.0.1", port)
    except StartError as error:
        return str(error)
    return ""


def _disk(model_dir: Path) -> tuple[int, str]:
    """Return the free bytes where models would go, and why they could not be written there."""
    nearest = next(folder for folder in (model_dir, *model_dir.absolute().parents) if folder.is_dir())
    problem = "" if os.access(nearest, os.W_OK) else f"{nearest} cannot be written to"
    return shutil.disk_usage(nearest).free, problem
