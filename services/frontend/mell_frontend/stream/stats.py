"""What the stream core counts, for metrics and for tests that ask whether a rare path was taken."""

from dataclasses import dataclass


@dataclass(slots=True)
class StreamStats:
    """Counts since start."""

    sequences_opened: int = 0
    sequences_finished: int = 0
    sequences_failed: int = 0
    sequences_closed: int = 0
    tokens_accepted: int = 0
    tokens_repeated: int = 0
    """Tokens dropped because they were accepted before."""
    rows_stale: int = 0
    """Token rows from a worker or generation that does not own the sequence."""
    gaps: int = 0
    resends: int = 0
    submissions: int = 0
    resubmissions: int = 0
    """Sequences placed again after their owner was lost or gave them up."""
    claims_granted: int = 0
    claims_refused: int = 0
    evictions: int = 0
