"""A core over an engine with a pace and a memory of its own: pending rows, its verdicts, its absence, its figures."""

from dataclasses import dataclass

import pytest

from mell_gpu_worker.core.capabilities import Capabilities
from mell_gpu_worker.core.commands import Exit, PublishEvent, PublishTokens, Rest, RunStep, SendEvicted
from mell_gpu_worker.core.events import EngineAway, EngineFailed, EvictionAnswered, PoolMeasured, StepFinished
from mell_gpu_worker.core.step import SampledToken, StepResult
from mell_shared.messages.sampling import FinishReason, Grammar
from mell_shared.messages.scheduler import SequenceFinished, WorkerReport
from mell_shared.messages.worker import Cancel, Drain, SubmitAccepted, SubmitRefused, Undrain

from .worlds import CoreWorld, only, rows_of, submit

PACED = Capabilities(
    blocks="estimated",
    chunked_prefill=False,
    logprobs=False,
    grammars="from_the_start",
    seeded_sameness=False,
    own_pace=True,
)


@dataclass
class Look:
    """What a step brings for one sequence: a token, an end, a failure, or nothing."""

    token: int | None = None
    end: FinishReason | None = None
    failure: str = ""


class PacedWorld(CoreWorld):
    """A core whose engine answers as the test says."""

    def __init__(self, **changes: object) -> None:
        super().__init__(**({"can": PACED} | changes))

    def look(self, **looks: Look) -> list[object]:
        """End the step under way; who is not named is pending."""
        assert self.step is not None, "no step is under way"
        step, self.step = self.step, None
        sampled: list[SampledToken | None] = []
        result = StepResult((), 1)
        pending = set()
        for place, row in enumerate(step.rows):
            look = looks.get(row.sequence)
            sampled.append(None if look is None or look.token is None else SampledToken(look.token))
            if look is None:
                pending.add(place)
            elif look.failure:
                result.failed[place] = look.failure
            elif look.end:
                result.ended[place] = look.end
        done = StepResult(tuple(sampled), 1, result.failed, frozenset(pending), result.ended)
        return list(self.tell(StepFinished(done)))

    @property
    def rows(self) -> dict[str, tuple[int, int]]:
        """(start, count) of each row of the step under way."""
        return {row.sequence: (row.start, row.count) for row in self.step.rows} if self.step else {}

    def report(self) -> WorkerReport:
        """What the schedulers were told last."""
        return [c.message for c in only(PublishEvent, self.commands) if isinstance(c.message, WorkerReport)][-1]


def measured(used: int = 0, waiting: int = 0, blocks: int = 16, step_us: int = 0) -> PoolMeasured:
    """What a server says of itself."""
    return PoolMeasured(blocks, used, waiting, step_us)


def test_a_whole_prompt_is_one_row_that_may_stay_pending() -> None:
    """Beyond the step's budget, in no chunks; a pending row is asked for again and changes nothing."""
    world = PacedWorld(max_step_tokens=8)
    world.ask(submit("a", bytes(30)))
    assert world.rows == {"a": (0, 30)}
    assert not only(PublishTokens, world.look())
    assert world.rows == {"a": (0, 30)}
    world.look(a=Look(65))
    assert world.rows == {"a": (30, 1)}
    world.look()
    assert world.rows == {"a": (30, 1)}
    assert world.output("a") == [65]


def test_the_engines_verdict_ends_a_sequence() -> None:
    """With its last token or without one; with the reason that it gives, unless the core knows one itself."""
    world = PacedWorld()
    for name in "abcd":
        world.ask(submit(name, name.encode(), max_tokens=2))
        world.look()
    world.look(a=Look(65, "stop"), b=Look(end="length"), c=Look(65), d=Look(66, failure="refused"))
    world.look(c=Look(67, "stop"))
    ended = {e.message.sequence: e.message.reason for e in only(PublishEvent, world.commands) if _is_end(e)}
    assert ended == {"a": "stop", "b": "length", "d": "error", "c": "length"}
    assert [world.output(name) for name in "abcd"] == [[65], [], [65, 67], []]
    finished = [c.message.finished for c in only(PublishTokens, world.commands) if rows_of(c, "b")]
    assert finished, "the frontend hears of an end without a token"


def _is_end(event: PublishEvent) -> bool:
    return isinstance(event.message, SequenceFinished)


def test_it_is_told_to_rest_once_when_nobody_runs() -> None:
    """Then it ends what it does for sequences that are gone; an engine of ours is never told."""
    world = PacedWorld()
    assert not only(Rest, world.commands)
    world.ask(submit("a"))
    world.ask(Cancel(sequence="a", generation=1))
    assert only(Rest, world.look()) == [Rest()]
    assert not only(Rest, world.tell(measured()))
    world.ask(submit("b"))
    assert only(RunStep, world.commands)[-1].rows[0].sequence == "b"
    ours = CoreWorld()
    ours.ask(submit("a"))
    ours.run()
    assert not only(Rest, ours.commands)


def test_equal_beginnings_wait_for_the_first_to_be_computed() -> None:
    """Three choices of one prompt are sent one after the other, so that the server's cache serves the last two."""
    world = PacedWorld()
    for name in "abc":
        world.ask(submit(name, b"twelve bytes"))
    world.look()
    assert list(world.rows) == ["a"]
    world.look(a=Look(65))
    assert world.rows == {"a": (12, 1), "b": (8, 4), "c": (8, 4)}


def test_memory_that_others_hold_is_not_given_out() -> None:
    """Nothing new comes into it, the schedulers hear of it, and who runs goes on."""
    world = PacedWorld()
    world.ask(submit("a", bytes(7)))
    world.tell(measured(used=2))
    assert world.report().free_blocks == 14, "its own two, as estimated"
    world.tell(measured(used=15))
    refused = world.ask(submit("b", bytes(range(9))))
    assert isinstance(refused, SubmitRefused)
    assert refused.reason == "no_room"
    world.ask(Drain(term=1))
    assert (world.report().free_blocks, world.report().used_blocks) == (1, 15)
    world.ask(Undrain(term=1))
    world.look(a=Look(65))
    world.look(a=Look(66))
    assert world.core.batcher.preemptions == 0
    world.tell(measured(used=3))
    assert isinstance(world.ask(submit("c", bytes(range(9)))), SubmitAccepted)


def test_a_server_that_shrank_has_less_to_give() -> None:
    """As after its restart with less memory."""
    world = PacedWorld()
    world.tell(measured(blocks=4))
    assert isinstance(world.ask(submit("a", bytes(16))), SubmitRefused)
    assert isinstance(world.ask(submit("b", bytes(11))), SubmitAccepted)


def test_while_requests_wait_there_nothing_new_comes() -> None:
    """Seen twice in a row: a request on its way in waits for a moment, too."""
    world = PacedWorld()
    world.tell(measured(waiting=1))
    assert isinstance(world.ask(submit("a")), SubmitAccepted)
    world.tell(measured(waiting=1))
    assert isinstance(world.ask(submit("b")), SubmitRefused)
    world.tell(measured())
    assert isinstance(world.ask(submit("c")), SubmitAccepted)


def test_its_pace_is_the_step_time_in_reports() -> None:
    """A look's own time says nothing."""
    world = PacedWorld()
    world.ask(submit("a"))
    world.look(a=Look(65))
    world.look(a=Look(66))
    world.tell(measured(step_us=30_000))
    world.ask(Drain(term=1))
    assert world.report().step_us == 30_000


def test_who_runs_at_an_engine_that_is_away_is_given_back() -> None:
    """With all its output; nothing new comes, the schedulers hear of it at once, and again when it is back."""
    world = PacedWorld()
    world.ask(submit("a", max_tokens=9))
    world.look(a=Look(65))
    (evicted,) = only(SendEvicted, world.tell(EngineAway("no answer")))
    assert evicted.message.output_ids == [65]
    assert (world.report().draining, world.report().sequences) == (True, ())
    assert isinstance(world.ask(submit("b")), SubmitRefused)
    assert only(Rest, world.look()) == [Rest()], "the look under way ended, with nobody left in it"
    assert not world.tell(EngineAway("still no answer"))
    world.tell(EvictionAnswered("a", 1))
    assert world.core.batcher.pool.used_blocks == 0
    assert not only(Exit, world.commands), "it stays, and waits"
    world.tell(measured())
    assert not world.report().draining
    assert isinstance(world.ask(submit("c")), SubmitAccepted)


def test_a_drained_worker_whose_engine_is_back_is_still_drained() -> None:
    """Two reasons to take nothing; each ends by itself."""
    world = PacedWorld()
    world.ask(Drain(term=1))
    world.tell(EngineAway("no answer"))
    world.ask(Undrain(term=2))
    assert isinstance(world.ask(submit("a")), SubmitRefused)
    world.ask(Drain(term=3))
    world.tell(measured())
    assert world.report().draining
    assert isinstance(world.ask(submit("b")), SubmitRefused)
    world.ask(Undrain(term=4))
    assert isinstance(world.ask(submit("c")), SubmitAccepted)


def test_an_engine_that_failed_is_not_back() -> None:
    """A measure on its way then changes nothing."""
    world = PacedWorld()
    world.ask(submit("a"))
    world.tell(EngineFailed("gone for good"))
    world.tell(EngineAway("no answer"))
    world.tell(measured())
    assert isinstance(world.ask(submit("b")), SubmitRefused)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": 0}, "log-probabilities"),
        ({"grammar": Grammar(text="g"), "output_ids": [65]}, "anew"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(changes: dict[str, object], words: str) -> None:
    """Once, with words for the client; a grammar from the start is taken."""
    world = PacedWorld()
    refused = world.ask(submit("a", **changes))
    assert isinstance(refused, SubmitRefused)
    assert refused.reason == "bad_request"
    assert words in refused.message
    assert isinstance(world.ask(submit("b", grammar=Grammar(text="g"))), SubmitAccepted)
    none = PacedWorld(can=Capabilities(grammars="none"))
    assert isinstance(none.ask(submit("a", grammar=Grammar(text="g"))), SubmitRefused)
