"""The worker's decisions: events in, commands out; no clock, no IO, no engine.

Sequences are admitted only into room there is now, run in continuous batches, and are known until their frontend has
acknowledged the end. Commands are idempotent by (sequence, generation). Whatever a lost message may leave behind,
the status sent to each frontend every second brings to light.
"""

from dataclasses import dataclass
from enum import Enum

from mell_gpu_worker.core.admission import AdmissionRules
from mell_gpu_worker.core.batching import Batcher, Progress
from mell_gpu_worker.core.blocks import BlockPool, root_digest
from mell_gpu_worker.core.commands import AskStatus, Command, Exit, PublishEvent, PublishTokens, Reply, RunStep
from mell_gpu_worker.core.events import (
    CommandReceived,
    ConnectionLost,
    ConnectionRestored,
    EngineFailed,
    Event,
    EvictionAnswered,
    EvictionUnanswered,
    StatusAnswered,
    StatusUnanswered,
    StepFinished,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.evictions import Evictions
from mell_gpu_worker.core.report import Reporter
from mell_gpu_worker.core.sequence import Limits, Phase, Sequence, accept
from mell_gpu_worker.core.step import StepResult
from mell_gpu_worker.core.streams import Streams
from mell_gpu_worker.core.tokens import TokensTable, tables_from
from mell_shared.messages.sampling import FinishReason
from mell_shared.messages.scheduler import SequenceFinished, WorkerJoined, WorkerLeft, WorkerSpec
from mell_shared.messages.worker import (
    Cancel,
    CancelDone,
    Report,
    Resend,
    ResendDone,
    Submit,
    SubmitAccepted,
    SubmitRefused,
    WorkerReply,
)

JOIN_EVERY_REPORTS = 10
"""The join is published again with every so many reports, since any one may be lost."""
LINGER_US = 2_000_000
"""Once nothing runs, how long a stopping worker waits for frontends to acknowledge what has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a worker's core is built from."""

    spec: WorkerSpec
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_step_tokens: int
    prefix_cache: bool
    report_interval_us: int
    status_interval_us: int
    frontend_silence_us: int
    stop_deadline_us: int


class Stage(Enum):
    """A worker's life, in order."""

    SERVING = "serving"
    STOPPING = "stopping"
    """Takes nothing new, finishes what runs."""
    EVICTING = "evicting"
    """Has given back what did not finish, waits until its frontends know."""
    GONE = "gone"


class WorkerCore:
    """One worker's state. `handle` is the only way to change it; `check` re-derives it."""

    def __init__(self, config: WorkerConfig, now_us: int) -> None:
        spec = config.spec
        self.config = config
        self.stage = Stage.SERVING
        self.streams = Streams(spec.worker, config.frontend_silence_us)
        self.batcher = Batcher(
            BlockPool(spec.kv_blocks, spec.block_tokens, prefix_cache=config.prefix_cache),
            root_digest(spec.model, spec.kv_layout),
            max_step_tokens=config.max_step_tokens,
            max_sequences=spec.max_sequences,
        )
        self._rules = AdmissionRules(spec, config.vocab_size)
        self._limits = Limits(spec.max_total_tokens, frozenset(config.eos_token_ids))
        self._reporter = Reporter(spec.worker)
        self._evictions = Evictions(spec.worker)
        self._connected = True
        self._arrivals = 0
        self._failure = ""
        self._now_us = self._report_us = now_us
        self._status_us = now_us + config.status_interval_us
        self._stop_us = 0
        """When to stop waiting: for what runs, then (lingering) for acknowledgements."""
        self._lingering = False
        self._commands: list[Command] = []

    def handle(self, event: Event, now_us: int) -> list[Command]:
        """Take in what happened at `now_us` (never before the last event); return what is to be done, in order."""
        assert now_us >= self._now_us, "time runs backwards"
        self._now_us = now_us
        self._commands = []
        if self.stage is not Stage.GONE:
            self._take(event)
            self._on_time()
            self._on_stopping()
            self._keep_busy()
        return self._commands

    @property
    def wake_us(self) -> int:
        """When `TimePassed` is due at the latest."""
        times = [self._report_us, self._status_us]
        return min([*times, self._stop_us] if self.stage is Stage.STOPPING else times)

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self.stage is not Stage.SERVING

    def _take(self, event: Event) -> None:
        match event:
            case CommandReceived():
                self._obey(event)
            case StepFinished(result):
                self._take_step(result)
            case StatusAnswered():
                self._take_status(event)
            case StatusUnanswered(frontend):
                self.streams.answered(frontend, self._now_us, heard=False)
            case EvictionAnswered(sequence, generation):
                self._evictions.answered(sequence, generation)
            case EvictionUnanswered(sequence, generation):
                again = self._evictions.unanswered(sequence, generation)
                self._commands += [again] if again else []
            case ConnectionLost():
                self._connected = False
            case ConnectionRestored():
                self._reconnect()
            case StopRequested():
                self._stop()
            case EngineFailed(message):
                self._failure = message
                self._evict()
            case TimePassed():
                pass

    # --- commands

    def _obey(self, event: CommandReceived) -> None:
        command = event.command
        reply: WorkerReply
        match command:
            case Submit():
                reply = self._submit(command, event.grammar_fault)
            case Cancel():
                reply = self._cancel(command)
            case Resend():
                reply = self._resend(command)
            case Report():
                self._announce()
                return
        if event.reply_to:
            # Before anything else that the command leads to: a submission's reply precedes its tokens.
            self._commands.insert(0, Reply(event.reply_to, reply))

    def _submit(self, submit: Submit, grammar_fault: str | None) -> WorkerReply:
        key = (submit.sequence, submit.generation)
        first = self.streams.first_reply(*key)
        if first is not None:
            return first
        newest = self.streams.newest_generation(submit.sequence)
        if submit.generation < newest:
            text = f"generation {submit.generation} is over, {newest} is known here"
            return SubmitRefused(reason="superseded", message=text)
        older = self.streams.older(*key)
        if older is not None:
            self._give_up(older)
        reply = self._refusal(submit, grammar_fault) or self._admit(submit)
        if isinstance(reply, SubmitRefused):
            self.streams.remember(*key, reply, self._now_us)
        return reply

    def _refusal(self, submit: Submit, grammar_fault: str | None) -> SubmitRefused | None:
        if self.draining:
            return SubmitRefused(reason="stopping", message="this worker is about to stop")
        return self._rules.refusal(submit, grammar_fault)

    def _admit(self, submit: Submit) -> WorkerReply:
        sequence = accept(submit, self._arrivals, self._limits)
        end = sequence.end_reason() if sequence.outputs else None
        if end is None and not self.batcher.admit(sequence):
            free = self.batcher.pool.free_blocks
            text = f"{len(sequence.token_ids)} tokens do not fit now: {free} KV blocks are free"
            return SubmitRefused(reason="no_room", message=text)
        self._arrivals += 1
        reply = SubmitAccepted(cached_tokens=sequence.cached_tokens)
        self.streams.add(sequence, reply, self._now_us)
        if end is not None:
            self._end_at_once(sequence, end)
        return reply

    def _end_at_once(self, sequence: Sequence, end: FinishReason) -> None:
        """A re-submission may bring output that is complete already."""
        sequence.phase = Phase.ENDED
        self._finish(sequence, end)
        self._send_again(sequence, sequence.outputs)

    def _cancel(self, cancel: Cancel) -> WorkerReply:
        sequence = self.streams.find(cancel.sequence, cancel.generation)
        if sequence is not None:
            self._give_up(sequence)
        elif cancel.generation > self.streams.newest_generation(cancel.sequence):
            # Its submission may still be under way, and must not start anything when it comes.
            refused = SubmitRefused(reason="superseded", message="cancelled before it arrived")
            self.streams.remember(cancel.sequence, cancel.generation, refused, self._now_us)
        return CancelDone()

    def _resend(self, resend: Resend) -> WorkerReply:
        sequence = self.streams.find(resend.sequence, resend.generation)
        if sequence is not None:
            self._send_again(sequence, resend.first_index)
        return ResendDone(known=sequence is not None)

    def _send_again(self, sequence: Sequence, first_index: int) -> None:
        for table in tables_from(sequence, first_index):
            self._commands.append(PublishTokens(sequence.frontend, table.message(self.config.spec.worker)))

    # --- steps

    def _keep_busy(self) -> None:
        if self.stage in (Stage.SERVING, Stage.STOPPING) and not self.batcher.computing:
            rows = self.batcher.plan()
            if rows:
                self._commands.append(RunStep(tuple(rows)))

    def _take_step(self, result: StepResult) -> None:
        progress = self.batcher.commit(result)
        if self.batcher.decodes_only:
            self._reporter.decode_took(result.step_us)
        tables: dict[str, TokensTable] = {}
        for step in progress:
            self._show(step, tables)
        worker = self.config.spec.worker
        self._commands += [PublishTokens(frontend, table.message(worker)) for frontend, table in tables.items()]

    def _show(self, step: Progress, tables: dict[str, TokensTable]) -> None:
        sequence = step.sequence
        if step.end is not None:
            self._finish(sequence, step.end)
        if step.sampled or step.end is not None:
            table = tables.get(sequence.frontend)
            if table is None:
                table = tables[sequence.frontend] = TokensTable()
            outputs = sequence.outputs
            table.add(sequence, outputs - step.sampled, outputs)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        finished = SequenceFinished(
            worker=self.config.spec.worker,
            sequence=sequence.sequence,
            generation=sequence.generation,
            reason=reason,
        )
        self._commands.append(PublishEvent(finished))

    def _give_up(self, sequence: Sequence) -> None:
        """Stop a sequence that nobody wants from here any more, and keep nothing of it."""
        if sequence.live:
            self.batcher.end(sequence)
            self._finish(sequence, "cancelled")
        self.streams.forget(sequence, self._now_us)

    # --- frontends

    def _take_status(self, event: StatusAnswered) -> None:
        self.streams.answered(event.frontend, self._now_us, heard=True)
        rows = list(zip(event.status.sequences, event.status.generations, strict=True))
        known = {row: self.streams.find(*key) for row, key in enumerate(rows)}
        for row, first_index in event.reply.resend.items():
            sequence = known.get(row)
            if sequence is not None:
                self._send_again(sequence, first_index)
        for row in event.reply.cancel:
            sequence = known.pop(row, None)
            if sequence is not None:
                self._give_up(sequence)
        for row in event.reply.ack_end:
            sequence = known.pop(row, None)
            if sequence is not None and not sequence.live:
                self.streams.forget(sequence, self._now_us)

    def _ask_statuses(self) -> None:
        for frontend in self.streams.unasked():
            self.streams.asked(frontend)
            self._commands.append(AskStatus(frontend, self.streams.status(frontend)))

    def _reconnect(self) -> None:
        self._connected = True
        self.streams.hear_all(self._now_us)
        self._announce()
        self._ask_statuses()

    # --- time

    def _on_time(self) -> None:
        if self._now_us >= self._report_us:
            self._report_us = _next(self._report_us, self._now_us, self.config.report_interval_us)
            self._report(join=self._reporter.number % JOIN_EVERY_REPORTS == 0)
        if self._now_us >= self._status_us:
            self._status_us = _next(self._status_us, self._now_us, self.config.status_interval_us)
            self.streams.purge(self._now_us)
            if self._connected:
                for sequence in self.streams.silent(self._now_us):
                    self._give_up(sequence)
                self._ask_statuses()

    def _announce(self) -> None:
        self._report(join=True)

    def _report(self, *, join: bool) -> None:
        if join:
            self._commands.append(PublishEvent(WorkerJoined(spec=self.config.spec)))
        self._commands.append(PublishEvent(self._reporter.report(self.batcher, draining=self.draining)))

    # --- the end

    def _stop(self) -> None:
        if self.stage is Stage.SERVING:
            self.stage = Stage.STOPPING
            self._stop_us = self._now_us + self.config.stop_deadline_us
            self._report(join=False)

    def _on_stopping(self) -> None:
        if self.stage is Stage.STOPPING:
            self._finish_stopping()
        if self.stage is Stage.EVICTING and not self._evictions:
            self.stage = Stage.GONE
            left = WorkerLeft(worker=self.config.spec.worker, reason=self._failure or "stopped")
            self._commands += [PublishEvent(left), Exit(self._failure)]

    def _finish_stopping(self) -> None:
        if self.batcher.running or self.batcher.waiting:
            if self._now_us >= self._stop_us:
                self._evict()
            return
        if not self._lingering:
            self._lingering = True
            self._stop_us = self._now_us + LINGER_US
            self._ask_statuses()
        if not len(self.streams) or self._now_us >= self._stop_us:
            self._evict()

    def _evict(self) -> None:
        """Give back whatever has not finished."""
        self.stage = Stage.EVICTING
        for sequence in [*self.batcher.running, *self.batcher.waiting]:
            self._commands.append(self._evictions.send(sequence))
            self.batcher.end(sequence)
            self.streams.forget(sequence, self._now_us)

    def check(self) -> None:
        """Assert that all parts agree on who is live."""
        self.batcher.check()
        live = {id(sequence) for sequence in self.streams if sequence.live}
        assert live == {id(sequence) for sequence in [*self.batcher.running, *self.batcher.waiting]}, "lost sequences"
        assert all(sequence.finish_reason for sequence in self.streams if not sequence.live), "an end has no reason"


def _next(due_us: int, now_us: int, interval_us: int) -> int:
    """Return the first time after `now_us` on the rhythm that `due_us` is on."""
    return due_us + ((now_us - due_us) // interval_us + 1) * interval_us
