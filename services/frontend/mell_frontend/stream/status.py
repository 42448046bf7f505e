"""What a worker's `StreamStatus` shows: tokens to send again, sequences to stop or to forget, sequences lost."""

from dataclasses import dataclass, field

from mell_frontend.stream.book import Book, Owner
from mell_frontend.stream.commands import Command, ReplyControl
from mell_frontend.stream.life import Life
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream.sequence import Sequence
from mell_frontend.stream.states import Cause, State
from mell_shared.messages.frontend import StreamStatus, StreamStatusReply


@dataclass(slots=True)
class _Verdicts:
    resend: dict[int, int] = field(default_factory=dict)
    cancel: list[int] = field(default_factory=list)
    ack_end: list[int] = field(default_factory=list)
    lost: list[tuple[Sequence, str]] = field(default_factory=list)


class StatusJudge:
    """Compares a worker's view of its sequences with ours."""

    def __init__(self, limits: StreamLimits, book: Book, life: Life) -> None:
        self._limits = limits
        self._book = book
        self._life = life

    def judge(self, reply_to: str, status: StreamStatus, now_us: int) -> list[Command]:
        """Answer the status, and place again what the worker has lost."""
        owner = self._book.hear(status.worker, now_us)
        verdicts = _Verdicts()
        for row, name in enumerate(status.sequences):
            sequence = owner.sequences.get(name) if owner is not None else None
            if sequence is None or sequence.generation != status.generations[row]:
                # Unknown, ended, superseded or another's: in no case does anybody wait for its tokens.
                (verdicts.ack_end if status.ended[row] else verdicts.cancel).append(row)
            else:
                self._judge_own(sequence, status, row, verdicts, now_us)
        if owner is not None:
            self._note_missing(owner, status, verdicts, now_us)
        self._settle_cancels(status)
        reply = StreamStatusReply(resend=verdicts.resend, cancel=verdicts.cancel, ack_end=verdicts.ack_end)
        commands: list[Command] = [ReplyControl(reply_to, reply)]
        for sequence, why in verdicts.lost:
            commands += self._life.place_elsewhere(sequence, Cause.OWNER_LOST, why, now_us)
        return commands

    def _judge_own(self, sequence: Sequence, status: StreamStatus, row: int, verdicts: _Verdicts, now_us: int) -> None:
        self._life.owner_has_it(sequence)
        sequence.missing_since_us = None
        next_index, ended = status.next_indices[row], bool(status.ended[row])
        if ended and next_index < sequence.accepted:
            verdicts.lost.append((sequence, f"worker {status.worker} ended it before what it had sent"))
            verdicts.ack_end.append(row)
        elif ended or next_index > sequence.accepted:
            self._want_rest(sequence, row, verdicts, now_us)

    def _want_rest(self, sequence: Sequence, row: int, verdicts: _Verdicts, now_us: int) -> None:
        # A status can overtake the tokens it counts. Only what does not come is asked for.
        if now_us - sequence.progressed_us < self._limits.stall_us:
            return
        sequence.resend_asked_us = now_us
        sequence.resends += 1
        if sequence.resends <= self._limits.max_resends:
            verdicts.resend[row] = sequence.accepted
        else:
            verdicts.cancel.append(row)
            verdicts.lost.append((sequence, "what its worker sends does not arrive"))

    def _note_missing(self, owner: Owner, status: StreamStatus, verdicts: _Verdicts, now_us: int) -> None:
        listed = dict(zip(status.sequences, status.generations, strict=True))
        for name, sequence in owner.sequences.items():
            if sequence.state is not State.STREAMING or listed.get(name) == sequence.generation:
                continue
            if sequence.missing_since_us is None:
                sequence.missing_since_us = now_us
            elif now_us - sequence.missing_since_us >= self._limits.status_apart_us:
                verdicts.lost.append((sequence, f"worker {status.worker} does not know it"))

    def _settle_cancels(self, status: StreamStatus) -> None:
        if not self._book.cancels:
            return
        listed = set(status.sequences)
        settled = [n for n, c in self._book.cancels.items() if c.worker == status.worker and n not in listed]
        for name in settled:
            del self._book.cancels[name]
