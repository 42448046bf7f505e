"""Whether a reservation can ever be held here: everything that does not depend on what else is here now."""

from mell_gpu_worker.core.admission import PROTOCOLS
from mell_gpu_worker.core.config import WorkerConfig
from mell_shared.messages.worker import ReserveKv


def fault(asked: ReserveKv, config: WorkerConfig, grammar_fault: str | None) -> tuple[str, str]:
    """Return reason and words of why no reservation like `asked` may be held here; both empty if it may."""
    spec = config.spec
    faults = {
        f"protocol {asked.protocol} is not spoken here ({PROTOCOLS[0]} to {PROTOCOLS[-1]})": (
            asked.protocol not in PROTOCOLS
        ),
        f"this worker takes sequences by {', '.join(spec.migration_modes) or 'no mode'}, not by {asked.mode}": (
            asked.mode not in spec.migration_modes
        ),
        f"this worker serves {spec.model!r}, not {asked.model!r}": asked.model != spec.model,
        f"KV is laid out as {spec.kv_layout!r} here, not as {asked.kv_layout!r}": (
            (asked.kv_layout, asked.block_tokens) != (spec.kv_layout, spec.block_tokens)
        ),
        "source and target are the same worker": asked.source == spec.worker,
        grammar_fault or "": bool(grammar_fault),
    }
    found = next((message for message, wrong in faults.items() if wrong), None)
    if found is not None:
        return "unsupported", found
    # About this sequence only: the next between the same two workers may well move.
    bound = config.can.fault(asked.sampling, len(asked.output_ids))
    return _fault_of_ids(asked, config) if bound is None else ("bound", bound)


def _fault_of_ids(asked: ReserveKv, config: WorkerConfig) -> tuple[str, str]:
    ids = (*asked.prompt_ids, *asked.output_ids)
    if not asked.prompt_ids:
        return "unsupported", "the prompt has no tokens"
    if max(ids) >= config.vocab_size:
        return "unsupported", f"token {max(ids)} is not in the vocabulary of {config.vocab_size} tokens"
    if len(asked.output_ids) >= asked.max_outputs:
        return "ended", "its output is complete"
    most = len(asked.prompt_ids) + asked.max_outputs
    if most > config.spec.max_total_tokens:
        limit = config.spec.max_total_tokens
        return "no_room", f"it may grow to {most} tokens, and {limit} is the most that a sequence can have here"
    if asked.split_tokens % asked.block_tokens or asked.split_tokens >= len(ids):
        return "unsupported", f"it cannot be split at token {asked.split_tokens} of {len(ids)}"
    return "", ""
