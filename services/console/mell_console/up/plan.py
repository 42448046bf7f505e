"""Shares a machine out among workers: pure, so that tables can test it. Knows no process and no service."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from mell_console.up.machine import Gpu, Machine
from mell_shared.models import FAKE_MODEL

CPU_MEMORY_SHARE = 0.5
"""Of the free memory, for KV: weights, activations and everybody else need the rest."""
CUDA_MEMORY_SHARE = 0.85
"""Of a card's free memory: nothing else runs there but activations and the CUDA context."""


class PlanError(Exception):
    """The machine cannot be shared out as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for. `devices` is `auto`, `cpu` or GPU indices; a share of 0 means decide.

    `served_names` is empty or has one name for each model.
    """

    models: tuple[str, ...]
    workers: int
    engine: Literal["torch", "fake", "vllm"]
    served_names: tuple[str, ...] = ()
    vllm_urls: tuple[str, ...] = ()
    devices: str = "auto"
    memory_share: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker's part; `memory_share` is of the free memory of its GPU, or of the machine if it has none."""

    name: str
    model: str
    served_name: str
    threads: int
    memory_share: float
    gpu: Gpu | None = None
    vllm_url: str = ""
    """Of the server behind it, if its engine is one."""


def plan_workers(machine: Machine, wish: Wish) -> tuple[WorkerPlan, ...]:
    """Return a part for each worker: models in turn, GPUs in turn, equal threads and memory.

    Raises `PlanError`.
    """
    _check_servers(wish)
    _check_names(wish)
    _check_engine(wish)
    gpus = _choose_gpus(machine, wish)
    on_same = Counter(gpus[worker % len(gpus)].index if gpus else -1 for worker in range(wish.workers))
    share = wish.memory_share or (CUDA_MEMORY_SHARE if gpus else CPU_MEMORY_SHARE)
    parts = []
    for worker in range(wish.workers):
        gpu = gpus[worker % len(gpus)] if gpus else None
        model = worker % len(wish.models)
        parts.append(
            WorkerPlan(
                name=f"worker-{worker + 1}",
                model=wish.models[model],
                served_name=(wish.served_names or wish.models)[model],
                threads=max(1, machine.cores // wish.workers),
                memory_share=share / on_same[gpu.index if gpu else -1],
                gpu=gpu,
                vllm_url=wish.vllm_urls[worker] if wish.vllm_urls else "",
            )
        )
    return tuple(parts)


def _check_servers(wish: Wish) -> None:
    """Raise `PlanError` unless just the engine that needs servers has some: they decide how many workers there are."""
    if wish.engine == "vllm" and not wish.vllm_urls:
        raise PlanError("--engine vllm stands before servers that run already: name each with --vllm-url")
    if wish.engine != "vllm" and wish.vllm_urls:
        raise PlanError(f"--vllm-url is for --engine vllm, not for {wish.engine}")


def _check_engine(wish: Wish) -> None:
    """Raise `PlanError` if the engine does not run a model: it has not been started yet, so nothing is lost."""
    if wish.engine == "torch" and FAKE_MODEL in wish.models:
        raise PlanError(f"the model {FAKE_MODEL!r} has no weights: use --engine fake")
    others = [model for model in wish.models if model != FAKE_MODEL]
    if wish.engine == "fake" and others:
        raise PlanError(
            f"--engine fake has no model {others[0]!r}: leave --model out (--served-model-name gives it a name)"
        )


def _check_names(wish: Wish) -> None:
    if wish.workers < len(wish.models):
        raise PlanError(
            f"{len(wish.models)} models need a worker each: use --workers {len(wish.models)} or fewer --model"
        )
    if wish.served_names and len(wish.served_names) != len(wish.models):
        raise PlanError(
            f"{len(wish.served_names)} --served-model-name for {len(wish.models)} --model: give one for each, in order"
        )
    names = wish.served_names or wish.models
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise PlanError(f"{doubled[0]!r} is named twice: use --workers for more workers of one model")


def _choose_gpus(machine: Machine, wish: Wish) -> tuple[Gpu, ...]:
    if wish.engine != "torch" or wish.devices == "cpu":
        return ()
    if wish.devices == "auto":
        return machine.gpus
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    wanted = [name.strip() for name in wish.devices.split(",") if name.strip()]
    missing = [name for name in wanted if not name.isdigit() or int(name) not in by_index]
    if missing or not wanted:
        known = ", ".join(str(index) for index in by_index) or "none"
        raise PlanError(f"--devices {wish.devices}: no such GPU (usable here: {known}); or use --devices cpu")
    return tuple(by_index[int(name)] for name in dict.fromkeys(wanted))
