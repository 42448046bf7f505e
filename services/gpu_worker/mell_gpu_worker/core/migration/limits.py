"""How long the two ends of a migration wait, and how much they take on at once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveLimits:
    """Bounds and patience of a worker's migrations; times in microseconds of the local clock."""

    max_outgoing: int = 8
    max_incoming: int = 8
    peer_timeout_us: int = 2_000_000
    """For a peer's answer to anything but a commit; longer than `hold_us`."""
    commit_timeout_us: int = 1_000_000
    """For the answer to a commit, a claim at the frontend included; afterwards the frontend is asked."""
    claim_timeout_us: int = 300_000
    """For a frontend's answer to one claim or abort; then it is repeated."""
    link_us: int = 2_000_000
    """For a connection to the target."""
    send_us: int = 10_000_000
    """For one round of blocks while the sequence decodes."""
    tail_us: int = 5_000_000
    """For the last blocks, while it stands still, where nothing is known of the link yet."""
    tail_least_us: int = 1_000_000
    """For the last blocks where those before them went fast."""
    ask_pause_us: int = 50_000
    """Between repeats of a claim or abort."""
    ask_us: int = 5_000_000
    """A stopped sequence goes on when the frontend has not said for so long who owns it."""
    claim_deadline_us: int = 10_000_000
    """A target gives a claim up when the frontend has not answered it for so long."""
    move_us: int = 25_000_000
    """A move still copying after so long has failed; below the schedulers' patience."""
    reservation_us: int = 30_000_000
    """Longest life of a reservation, and of its offer."""
    idle_us: int = 10_000_000
    """A reservation whose source is not heard of for so long is dropped."""
    hold_us: int = 500_000
    """How long a question how far the target is waits for it to be done."""
    growth_tokens: int = 256
    """Room asked for at the target beyond what the sequence has; a move that outgrows it stops early."""
    send_blocks: int = 1024
    """Most blocks sent as one round, so that the target hears of its source now and then."""
    kv_rounds: int = 16
    """Sweeps over newly filled blocks before the sequence is stopped anyway."""
    token_rounds: int = 4
    """Rounds in which the target catches up by prefill, before KV is sent instead."""
