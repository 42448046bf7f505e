"""Figures as operators read them, and durations as they write them. Pure."""

import re

from mell_shared.messages.admin import GpuUse, MoveStatus, WorkerStatus

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|)")


def seconds(text: str) -> float:
    """Return a duration such as 30s, 500ms, 2m, 1h or 30 in seconds; raises ValueError."""
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is no duration: write 30s, 500ms, 2m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def span(duration_s: float) -> str:
    """Return a duration in a unit that suits it."""
    if 0 < duration_s < 0.001:
        return "<1 ms"
    if duration_s < 0.9995:
        return f"{duration_s * 1000:.0f} ms"
    if duration_s < 120:
        return f"{duration_s:.1f} s"
    return f"{duration_s / 60:.0f} min" if duration_s < 7200 else f"{duration_s / 3600:.1f} h"


def size(count_bytes: int) -> str:
    """Return a size in a unit that suits it."""
    amount = float(count_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def hours(gpu_s: float) -> str:
    """Return GPU-time in GPU-hours, or in GPU-seconds where that would be nothing."""
    return f"{gpu_s / 3600:.2f} GPU-hours" if gpu_s >= 360 else f"{gpu_s:.0f} GPU-seconds"


def saving(use: GpuUse) -> float:
    """Return the share of GPU-time saved against the policy compared with; negative where it would need less."""
    return 1 - use.used_gpu_s / use.shadow_gpu_s if use.shadow_gpu_s else 0.0


def saved(use: GpuUse) -> str:
    """Return the share saved in words, also where it is none."""
    percent = round(100 * saving(use))
    return f"{percent}% saved" if percent >= 0 else f"{-percent}% more than that"


def moving(worker: WorkerStatus) -> str:
    """Return how many sequences are leaving and coming."""
    parts = [f"-{worker.leaving}"] if worker.leaving else []
    return " ".join([*parts, f"+{worker.coming}"] if worker.coming else parts)


def kv_use(worker: WorkerStatus) -> str:
    """Return the KV blocks used, all there are, and the share."""
    return f"{worker.used_blocks}/{worker.kv_blocks} {worker.used_blocks / worker.kv_blocks:.0%}"


def cost(move: MoveStatus) -> str:
    """Return what a move took, beside what was predicted, as far as is known."""
    told = [f"{span(move.took_s)}{' so far' if move.outcome == 'moving' else ''}"]
    if move.predicted_s:
        told.append(f"predicted {span(move.predicted_s)}")
    if move.stopped_s:
        told.append(f"stopped {span(move.stopped_s)}")
    if move.copied_bytes:
        told.append(f"{size(move.copied_bytes)} copied in {span(move.copy_s)}")
    if move.prefilled_tokens:
        told.append(f"{move.prefilled_tokens} tokens prefilled in {span(move.prefill_s)}")
    return ", ".join(told)
