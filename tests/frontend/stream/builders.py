"""Short names for what the stream core's tests say again and again."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mell_frontend.generation import SequenceRequest
from mell_frontend.stream.commands import AskPlacement, AskResend, Command, DeliverTokens, ReplyControl, SubmitSequence
from mell_frontend.stream.core import FrontendCore
from mell_frontend.stream.events import (
    ControlArrived,
    Event,
    PlaceAnswered,
    SequenceOpened,
    SubmitAnswered,
    TokensArrived,
)
from mell_frontend.stream.limits import StreamLimits
from mell_shared.messages.frontend import FrontendControl, FrontendReply, StreamStatus, TokenLogprobs, TokensGenerated
from mell_shared.messages.sampling import FinishReason, SamplingParams
from mell_shared.messages.scheduler import Placed
from mell_shared.messages.worker import SubmitAccepted

SECOND_US = 1_000_000
MS_US = 1_000


def request(
    sequence: str = "s",
    *,
    max_tokens: int | None = 20,
    logprobs: int | None = None,
    prompt: tuple[int, ...] = (1, 2, 3),
) -> SequenceRequest:
    """Return a request for one sequence."""
    return SequenceRequest(
        sequence=sequence,
        model="fake",
        prompt_ids=prompt,
        sampling=SamplingParams(seed=7, max_tokens=max_tokens, logprobs=logprobs),
    )


def tokens(
    worker: str,
    first_index: int,
    token_ids: list[int],
    *,
    sequence: str = "s",
    generation: int = 1,
    finish: FinishReason | None = None,
    logprobs: tuple[TokenLogprobs, ...] = (),
    cached_tokens: int | None = None,
) -> TokensArrived:
    """Return the arrival of one sequence's tokens."""
    return TokensArrived(
        TokensGenerated(
            worker=worker,
            sequences=(sequence,),
            generations=[generation],
            first_indices=[first_index],
            counts=[len(token_ids)],
            token_ids=token_ids,
            logprobs={0: logprobs} if logprobs else {},
            finished={0: finish} if finish else {},
            cached_tokens={} if cached_tokens is None else {0: cached_tokens},
        )
    )


def status(worker: str, *rows: tuple[str, int, int, bool]) -> StreamStatus:
    """Return a worker's status from rows of (sequence, generation, next index, ended)."""
    return StreamStatus(
        worker=worker,
        sequences=tuple(row[0] for row in rows),
        generations=[row[1] for row in rows],
        next_indices=[row[2] for row in rows],
        ended=[int(row[3]) for row in rows],
    )


@dataclass
class Bench:
    """A core with a clock; every event is followed by `check`."""

    limits: StreamLimits = field(default_factory=StreamLimits)
    now_us: int = 0

    def __post_init__(self) -> None:
        self.core = FrontendCore("f", self.limits)

    def handle(self, event: Event, *, after_us: int = 0) -> list[Command]:
        """Return the core's commands for `event`, `after_us` later than the last."""
        self.now_us += after_us
        commands = self.core.handle(event, self.now_us)
        self.core.check()
        return commands

    def ask(self, message: FrontendControl, *, after_us: int = 0) -> tuple[FrontendReply, list[Command]]:
        """Return the reply to a worker's question, and the other commands."""
        reply, *others = self.handle(ControlArrived("inbox", message), after_us=after_us)
        assert isinstance(reply, ReplyControl)
        assert reply.reply_to == "inbox"
        return reply.reply, others

    def place(self, worker: str, commands: list[Command]) -> SubmitSequence:
        """Answer the placement asked for in `commands`; returns the submission that follows."""
        asked = placement(commands)
        reply = PlaceAnswered(asked.message.sequence, asked.ask, Placed(worker=worker))
        (submission,) = self.handle(reply)
        assert isinstance(submission, SubmitSequence)
        return submission

    def accept(self, submission: SubmitSequence, cached_tokens: int = 0) -> list[Command]:
        """Let the worker take a submission."""
        reply = SubmitAccepted(cached_tokens=cached_tokens)
        return self.handle(SubmitAnswered(submission.message.sequence, submission.ask, reply))

    def stream(self, worker: str = "w1", sequence: str = "s", **wanted: int | None) -> SubmitSequence:
        """Open a sequence and bring it to STREAMING on `worker`."""
        opened = self.handle(SequenceOpened(request(sequence, **wanted)))
        submission = self.place(worker, opened)
        self.accept(submission)
        return submission

    def move_to(self, worker: str, commands: list[Command]) -> SubmitSequence:
        """Bring a sequence that `commands` place again to STREAMING on `worker`."""
        submission = self.place(worker, commands)
        self.accept(submission)
        return submission


def placement(commands: list[Command]) -> AskPlacement:
    """Return the one placement asked for."""
    (found,) = [command for command in commands if isinstance(command, AskPlacement)]
    return found


def resends(commands: list[Command]) -> list[tuple[str, int]]:
    """Return worker and first index of the resends asked for."""
    return [(c.worker, c.message.first_index) for c in commands if isinstance(c, AskResend)]


def delivered(commands: list[Command]) -> list[int]:
    """Return the token ids handed to readers."""
    return list(_ids(commands))


def _ids(commands: list[Command]) -> Iterator[int]:
    for command in commands:
        if isinstance(command, DeliverTokens):
            yield from command.token_ids
