"""The simulation finds bugs: each test plants one in a real core and asks that a few seeds catch it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mell_frontend.stream.life import Life
from mell_frontend.stream.liveness import Liveness
from mell_frontend.stream.sequence import Sequence as Stream
from mell_frontend.stream.status import StatusJudge
from mell_frontend.stream.tokens import TokenIntake
from mell_gpu_worker.core import blocks, desk, sequence
from mell_gpu_worker.core.batching import Batcher
from mell_gpu_worker.core.blocks import BlockPool
from mell_gpu_worker.core.migration import tables
from mell_gpu_worker.core.migration.incoming import Incoming
from mell_gpu_worker.core.migration.outgoing import Outgoing
from mell_gpu_worker.core.migration.source import Source
from mell_gpu_worker.core.migration.tables import Act
from mell_gpu_worker.core.migration.target import Target
from mell_gpu_worker.core.sequence import Order, Sequence
from mell_gpu_worker.core.streams import Streams
from mell_gpu_worker.core.watch import FrontendWatch
from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.liveness import Liveness as SchedulerLiveness
from mell_shared.messages.frontend import TokensGenerated
from mell_shared.messages.worker import Submit, SubmitAccepted
from tests.cluster.simulation.links import Links
from tests.cluster.simulation.play import Failure, play
from tests.cluster.simulation.scenario import draw

Patch = pytest.MonkeyPatch
MOST_SEEDS = 60
"""Fewer than the suite runs."""


def found(first: int) -> Failure | None:
    """Return the first failure of the suite's seeds, from `first` on, with the planted bug in place."""
    seeds = ((first + number) % MOST_SEEDS for number in range(MOST_SEEDS))
    failures: Iterator[Failure | None] = (play(draw(seed)) for seed in seeds)
    return next((failure for failure in failures if failure is not None), None)


def nothing(*_: object, **__: object) -> list[Any]:
    """Do nothing in a method's place."""
    return []


# --- in the frontend


def anybodys_tokens(patch: Patch) -> None:
    """Tokens are accepted from whoever sends them, of whatever generation."""
    take = TokenIntake.take

    def careless(self: TokenIntake, message: TokensGenerated, now_us: int) -> list[Any]:
        said: list[Any] = []
        for row, name in enumerate(message.sequences):
            stream = self._book.open.get(name)
            begin = sum(message.counts[:row])
            fields = message.__dict__ | {
                "worker": stream.owner if stream and stream.owner else message.worker,
                "sequences": (name,),
                "generations": [stream.generation if stream else message.generations[row]],
                "first_indices": [message.first_indices[row]],
                "counts": [message.counts[row]],
                "token_ids": message.token_ids[begin : begin + message.counts[row]],
                "logprobs": {0: message.logprobs[row]} if row in message.logprobs else {},
                "finished": {0: message.finished[row]} if row in message.finished else {},
                "cached_tokens": {},
            }
            said += take(self, TokensGenerated.model_construct(**fields), now_us)
        return said

    patch.setattr(TokenIntake, "take", careless)


def any_index(patch: Patch) -> None:
    """What comes is taken for the next tokens, whatever index it has."""
    take = TokenIntake.take

    def careless(self: TokenIntake, message: TokensGenerated, now_us: int) -> list[Any]:
        open_ = self._book.open
        first = [open_[n].accepted if n in open_ else 0 for n in message.sequences]
        fields = message.__dict__ | {"first_indices": first}
        return take(self, TokensGenerated.model_construct(**fields), now_us)

    patch.setattr(TokenIntake, "take", careless)


def one_generation(patch: Patch) -> None:
    """A sequence is given to another owner without a new generation."""
    patch.setattr(Stream, "raise_generation", nothing)


def forgetful_submission(patch: Patch) -> None:
    """A new submission lacks the last token delivered."""
    submit = Stream.submit

    def careless(self: Stream, frontend: str) -> Submit:
        whole = submit(self, frontend)
        return whole.model_copy(update={"output_ids": whole.output_ids[:-1]})

    patch.setattr(Stream, "submit", careless)


def patient_with_the_dead(patch: Patch) -> None:
    """Nobody notices that an owner is silent."""
    patch.setattr(Liveness, "_watch_owners", nothing)


def nothing_sent_again(patch: Patch) -> None:
    """A status that shows missing tokens asks for nothing."""
    patch.setattr(StatusJudge, "_want_rest", nothing)


def same_worker_again(patch: Patch) -> None:
    """The scheduler is not told which workers just lost the sequence."""
    place = Life.place

    def careless(self: Life, stream: Stream, now_us: int, cause: str = "") -> Any:
        stream.excluded = ()
        return place(self, stream, now_us, cause)

    patch.setattr(Life, "place", careless)


# --- in the worker


def freed_in_step(patch: Patch) -> None:
    """The blocks of a cancelled sequence are given away while the engine still writes to them."""
    end = Batcher.end

    def careless(self: Batcher, ended: Sequence) -> None:
        ended.in_step = False
        end(self, ended)

    patch.setattr(Batcher, "end", careless)


def blind_digests(patch: Patch) -> None:
    """Equal blocks are shared although what comes before them differs."""
    chain = blocks.chain_digest
    patch.setattr(sequence, "chain_digest", lambda parent, ids: chain(b"", ids))


def stale_blocks(patch: Patch) -> None:
    """A block is given away anew, and still counts as holding its old content."""
    patch.setattr(BlockPool, "_unseal", nothing)


def preempted_but_computed(patch: Patch) -> None:
    """A preempted sequence is taken for computed when it comes back."""
    skip = Batcher._skip_cached

    def careless(self: Batcher, resumed: Sequence, shared_blocks: int) -> None:
        skip(self, resumed, shared_blocks)
        if resumed.started:
            resumed.computed = len(resumed.token_ids) - 1

    patch.setattr(Batcher, "_skip_cached", careless)


def every_submission_is_new(patch: Patch) -> None:
    """A repeated submission is not recognised."""
    patch.setattr(Streams, "first_reply", lambda *_: None)


def faithful_to_the_dead(patch: Patch) -> None:
    """Sequences of a silent frontend are kept for ever."""
    patch.setattr(Streams, "silent", nothing)


def deaf_to_acknowledgement(patch: Patch) -> None:
    """An end that was acknowledged is kept."""
    take = FrontendWatch.take

    def careless(self: FrontendWatch, event: Any, now_us: int) -> Any:
        event.reply.ack_end.clear()
        return take(self, event, now_us)

    patch.setattr(FrontendWatch, "take", careless)


def output_taken_for_prompt(patch: Patch) -> None:
    """What a new owner got as delivered output counts as prompt."""
    accept = sequence.accept

    def careless(submit: Submit, order: Order, limits: Any) -> Sequence:
        accepted = accept(submit, order, limits)
        accepted.prompt_tokens += len(submit.output_ids)
        return accepted

    patch.setattr(desk, "accept", careless)


# --- where sequences move


def moving_without_stopping(patch: Patch) -> None:
    """The source decodes on while it hands over."""
    do = Source._do

    def careless(self: Source, move: Any, act: Act, now_us: int) -> Any:
        said = do(self, move, act, now_us)
        move.sequence.halted = False
        return said

    patch.setattr(Source, "_do", careless)


def published_before_granted(patch: Patch) -> None:
    """The target publishes as soon as it computes."""
    do = Target._do

    def careless(self: Target, move: Any, act: Act, now_us: int) -> Any:
        said = do(self, move, act, now_us)
        if act is Act.START:
            move.sequence.unclaimed = False
            self._residents.streams.add(move.sequence, SubmitAccepted(), now_us)
        return said

    patch.setattr(Target, "_do", careless)


def holes_taken_for_computed(patch: Patch) -> None:
    """The target takes all KV for there, whatever was sent and computed."""
    patch.setattr(Incoming, "computed_in_all", property(lambda self: len(self.sequence.token_ids) - 1))


def slots_shifted(patch: Patch) -> None:
    """Blocks land one slot beside where they belong."""
    patch.setattr(Outgoing, "first_slot_block", property(lambda self: self.held.held_tokens // 4 - 1))


def reservations_for_ever(patch: Patch) -> None:
    """Room whose source is never heard of again is held for ever."""
    for phase in tuple(tables.TARGET_ROLE.patience):
        patch.delitem(tables.TARGET_ROLE.patience, phase)  # type: ignore[arg-type]


def damage_unnoticed(patch: Patch) -> None:
    """Checksums are not looked at."""
    patch.setattr(Links, "checks", False)


# --- in the scheduler


def placements_for_ever(patch: Patch) -> None:
    """A placement that nothing confirms counts for ever."""
    patch.setattr(Ledger, "expire_pending", nothing)


def workers_for_ever(patch: Patch) -> None:
    """A worker that is gone is never forgotten."""
    patch.setattr(SchedulerLiveness, "review", lambda *_: ([], []))


def ends_unheard(patch: Patch) -> None:
    """A finished sequence, and one that reports lack, counts for ever."""
    patch.setattr(Ledger, "forget", nothing)


PLANTED: dict[Callable[[Patch], None], int] = {
    anybodys_tokens: 6,
    any_index: 0,
    one_generation: 0,
    forgetful_submission: 4,
    patient_with_the_dead: 13,
    nothing_sent_again: 13,
    same_worker_again: 12,
    freed_in_step: 3,
    blind_digests: 4,
    stale_blocks: 0,
    preempted_but_computed: 4,
    every_submission_is_new: 17,
    faithful_to_the_dead: 0,
    deaf_to_acknowledgement: 0,
    output_taken_for_prompt: 4,
    moving_without_stopping: 0,
    published_before_granted: 0,
    holes_taken_for_computed: 4,
    slots_shifted: 9,
    reservations_for_ever: 41,
    damage_unnoticed: 5,
    placements_for_ever: 1,
    workers_for_ever: 0,
    ends_unheard: 0,
}
"""Each with the seed that was the first to catch it: begun with, since most others pass it by."""


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    """Within few seeds something that must hold does not."""
    plant(monkeypatch)
    failure = found(PLANTED[plant])
    assert failure is not None, f"not caught: {plant.__doc__}"
    stumbled = ("AttributeError", "TypeError", "NameError", "ImportError")
    assert not failure.what.startswith(stumbled), f"the planted bug itself is broken: {failure.what}"
