"""How a sequence that was moved here begins: computed before its frontend has granted it, published from then on."""

from mell_gpu_worker.core.batching import Batcher
from mell_gpu_worker.core.commands import Command
from mell_gpu_worker.core.migration.incoming import Incoming
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.sequence import Sequence


def start(move: Incoming, batcher: Batcher) -> None:
    """Run a sequence all of which is in place; nothing of it is published yet."""
    sequence, commit = move.sequence, move.commit
    assert commit is not None
    sequence.logprobs = list(commit.logprobs)
    sequence.submitted_outputs = sequence.outputs - len(commit.logprobs)
    batcher.start(sequence, move.computed_in_all)


def adopt(move: Incoming, residents: Residents, now_us: int) -> list[Command]:
    """The sequence is this worker's now: know it, and publish what its frontend lacks."""
    granted = move.granted
    assert granted is not None
    said: list[Command] = []
    streams = residents.streams
    if streams.newest_generation(move.asked.sequence) >= granted.generation:
        # The frontend's next word about it has overtaken this one: it wants nothing of it any more.
        if move.sequence.live:
            residents.batcher.end(move.sequence)
        return []
    older = streams.older(move.asked.sequence, granted.generation)
    if older is not None:
        said += residents.give_up(older, now_us)
    sequence = _from(move, granted.accepted, residents.batcher)
    sequence.generation, sequence.unclaimed = granted.generation, False
    move.adopted = True
    return said + residents.join(sequence, now_us)


def _from(move: Incoming, accepted: int, batcher: Batcher) -> Sequence:
    """Return the sequence ready to publish from output index `accepted` on."""
    sequence = move.sequence
    if sequence.sampling.logprobs is not None and accepted < sequence.submitted_outputs:
        # The log-probabilities of these are not known here. Nobody has seen them, so they are made again.
        if sequence.live:
            batcher.end(sequence)
        move.sequence = sequence = move.rewound(accepted)
        batcher.wait(sequence)
    sequence.logprobs = sequence.logprobs[accepted - sequence.submitted_outputs :] if sequence.logprobs else []
    sequence.submitted_outputs = accepted
    return sequence
