"""What this machine has to share out: cores, memory, GPUs, as this process may use them."""

import contextlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from mell_shared.host import available_bytes, usable_cores


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device; `index` is the driver's, not that of a process with CUDA_VISIBLE_DEVICES."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What can be used here; `memory_bytes` is what is available now, within this container's limit."""

    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


def read_machine() -> Machine:
    """Return what this process may use; GPUs only if a driver answers and the installed torch can use them."""
    return Machine(
        cores=usable_cores(),
        memory_bytes=available_bytes(),
        gpus=visible_gpus(nvidia_smi(), os.environ) if torch_uses_cuda() else (),
    )


def torch_uses_cuda() -> bool:
    """Return whether the installed torch is a CUDA build, without importing it."""
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def nvidia_smi() -> str:
    """Return the driver's table of devices as comma-separated lines; empty if there is no driver."""
    query = "--query-gpu=index,uuid,name,memory.total,memory.free"
    try:
        found = subprocess.run(  # noqa: S603 - fixed arguments
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],  # noqa: S607 - the driver decides where it lies
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout


def parse_gpus(table: str) -> tuple[Gpu, ...]:
    """Return the devices in `nvidia-smi`'s table; its memory columns are in MiB. Unreadable rows are left out."""
    gpus = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        with contextlib.suppress(ValueError, IndexError):
            gpus.append(Gpu(int(cells[0]), cells[1], cells[2], int(cells[3]) << 20, int(cells[4]) << 20))
    return tuple(gpus)


def visible_gpus(table: str, environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Return the devices that `CUDA_VISIBLE_DEVICES` (indices or uuids, in its order) leaves, all if it is unset."""
    gpus = parse_gpus(table)
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    by_name = {name: gpu for gpu in gpus for name in (str(gpu.index), gpu.uuid)}
    return tuple(by_name[name.strip()] for name in wanted.split(",") if name.strip() in by_name)
