"""Who may take a sequence over: the rules of arbitration, as decisions without effects (the core applies them)."""

from mell_frontend.stream.sequence import Sequence
from mell_shared.messages.frontend import AbortMigration, Claim, ClaimRefusal, Evicted, Granted


def repeated_grant(sequence: Sequence, claim: Claim) -> Granted | None:
    """Return the reply that this very claim got, if it is the one that made the present owner."""
    if sequence.granted is None or sequence.granted[0] != claim:
        return None
    return sequence.granted[1]


def claim_refusal(sequence: Sequence, claim: Claim, max_aborted: int) -> ClaimRefusal | None:
    """Return why an open sequence may not pass to the claim's target, or None if it may.

    The target must hold at least all accepted tokens, or indices between its length and theirs would be missing
    from the KV that it continues on; and it must have been copied from the worker that owns the sequence now.
    """
    if claim.generation != sequence.generation:
        return "generation"
    if sequence.owner is None or claim.source != sequence.owner:
        return "owner"
    # A full memory of aborted migrations might have to forget one: then none can be granted.
    if claim.migration in sequence.aborted or len(sequence.aborted) >= max_aborted:
        return "aborted"
    if claim.length < sequence.accepted:
        return "length"
    return None


def still_owns(sequence: Sequence, abort: AbortMigration) -> bool:
    """Return whether the migration's source owns the sequence in the generation that it moved in."""
    return abort.generation == sequence.generation and abort.source == sequence.owner


def eviction_refusal(sequence: Sequence, eviction: Evicted) -> ClaimRefusal | None:
    """Return why a worker cannot give an open sequence up: it does not have it; or None."""
    if eviction.generation != sequence.generation:
        return "generation"
    if eviction.worker != sequence.owner:
        return "owner"
    return None
