"""How long the stream core waits and how much it keeps; all times in microseconds of the local clock."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds and patience of a frontend's core."""

    place_deadline_us: int = 15_000_000
    """A sequence fails when the scheduler has not answered it for this long."""
    backoff_first_us: int = 100_000
    backoff_most_us: int = 1_000_000
    queue_pause_us: int = 50_000
    """A scheduler that answers `Queued` faster than this is not asked again before."""
    worker_suspect_us: int = 2_000_000
    """An owner silent for this long is asked for a sign of life; nobody listening means it is gone."""
    worker_silence_us: int = 5_000_000
    """An owner silent for this long has lost its sequences."""
    broker_lost_us: int = 60_000_000
    """Streams fail when our own connection has been down for this long."""
    resend_pause_us: int = 250_000
    """A gap in one sequence is not asked for again before."""
    max_resends: int = 20
    """Resends asked for in a row without any token coming; then the owner is taken for lost."""
    stall_us: int = 250_000
    """Tokens that a status names are asked for when none came for this long; before, they are on their way."""
    status_apart_us: int = 500_000
    """Two statuses that lack a sequence count as two only this far apart: a burst of late ones is one."""
    cancel_retry_us: int = 1_000_000
    ended_memory_us: int = 60_000_000
    max_sequences: int = 4_096
    max_ended: int = 100_000
    max_setbacks: int = 8
    """Submissions in a row that may come to nothing before a sequence fails."""
    max_aborted: int = 256
    """Aborted migrations kept for one generation; when full, no claim is granted in that generation."""
    max_output_tokens: int = 1 << 20
    """Bounds a sequence without `max_tokens`."""
