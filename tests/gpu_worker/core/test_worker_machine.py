from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mell_gpu_worker.core.commands import Exit, PublishEvent, PublishTokens
from mell_gpu_worker.core.events import (
    CommandReceived,
    ConnectionLost,
    ConnectionRestored,
    EvictionUnanswered,
    StatusAnswered,
    StatusUnanswered,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.farewell import Stage
from mell_gpu_worker.engine.fake import expected_output
from mell_shared.messages.frontend import StreamStatusReply
from mell_shared.messages.scheduler import WorkerLeft
from mell_shared.messages.worker import (
    Cancel,
    Drain,
    Report,
    Resend,
    Submit,
    SubmitAccepted,
    SubmitRefused,
    Undrain,
    WorkerReply,
)

from .worlds import SECOND_US, CoreWorld, asked, only, rows_of, submit

NAMES = st.sampled_from(["a", "b", "c", "d"])
GENERATIONS = st.integers(1, 3)
FRONTENDS = {"a": "f1", "b": "f1", "c": "f2", "d": "f2"}
PROMPTS = {"a": b"a common beginning", "b": b"a common beginning, and more", "c": b"x", "d": b"quite another one"}


class WorkerMachine(RuleBasedStateMachine):
    """Any order of commands, steps, answers, losses and time, on a pool too small for all; checked after each."""

    @initialize(kv_blocks=st.integers(12, 24), prefix_cache=st.booleans())
    def build(self, kv_blocks: int, prefix_cache: bool) -> None:
        """A small worker."""
        self.world = CoreWorld(kv_blocks=kv_blocks, max_step_tokens=12, max_sequences=4, prefix_cache=prefix_cache)
        self.replies: dict[tuple[str, int], WorkerReply] = {}
        self.statuses: list[StatusAnswered] = []
        self.asked_us: dict[tuple[str, int], int] = {}

    def note_statuses(self) -> None:
        """Keep every status asked, to be answered in any order, late or never."""
        for question in asked(self.world.commands).values():
            self.statuses.append(StatusAnswered(question.frontend, question.message, StreamStatusReply()))
        self.world.commands = [c for c in self.world.commands if isinstance(c, PublishTokens | PublishEvent | Exit)]

    @rule(name=NAMES, generation=GENERATIONS, tokens=st.integers(1, 24), done=st.integers(0, 3), eos=st.booleans())
    def submit(self, name: str, generation: int, tokens: int, done: int, eos: bool) -> None:
        """A submission, perhaps a repeat, perhaps late, perhaps with output made elsewhere."""
        message = submit(
            name,
            PROMPTS[name],
            generation=generation,
            frontend=FRONTENDS[name],
            max_tokens=tokens,
            ignore_eos=not eos,
            priority=ord(name) % 2,
        )
        before = expected_output(message.prompt_ids, message.sampling, min(done, tokens))
        message = message.model_copy(update={"output_ids": before})
        reply = self.world.ask(message)
        assert isinstance(reply, SubmitAccepted | SubmitRefused)
        self.check_repeat(message, reply)

    def check_repeat(self, message: Submit, reply: WorkerReply) -> None:
        """A key answered within the last minute gets the same answer, unless a newer generation was heard of."""
        key = (message.sequence, message.generation)
        first = self.replies.get(key)
        fresh = self.world.now_us - self.asked_us.get(key, 0) < 60 * SECOND_US
        if first is not None and fresh:
            superseded = isinstance(reply, SubmitRefused) and reply.reason == "superseded"
            assert reply == first or superseded
        else:
            self.replies[key], self.asked_us[key] = reply, self.world.now_us

    @rule(name=NAMES, generation=GENERATIONS)
    def cancel(self, name: str, generation: int) -> None:
        """A cancellation of anything."""
        self.world.ask(Cancel(sequence=name, generation=generation))
        assert self.world.core.streams.find(name, generation) is None

    @rule(name=NAMES, generation=GENERATIONS, first_index=st.integers(0, 30))
    def resend(self, name: str, generation: int, first_index: int) -> None:
        """A resend of anything."""
        self.world.ask(Resend(sequence=name, generation=generation, first_index=first_index))

    @rule(steps=st.integers(1, 8))
    def compute(self, steps: int) -> None:
        """The engine finishes steps, if any are under way."""
        for _ in range(steps):
            if self.world.step is not None:
                self.world.finish_step()

    @rule(elapsed_us=st.sampled_from([1000, SECOND_US, 7 * SECOND_US]))
    def wait(self, elapsed_us: int) -> None:
        """Time passes; statuses are asked."""
        self.world.tell(TimePassed(), after_us=elapsed_us)
        self.note_statuses()

    @precondition(lambda self: self.statuses)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """Some status, however old, is answered with any verdicts."""
        question = self.statuses.pop(data.draw(st.integers(0, len(self.statuses) - 1)))
        rows = st.lists(st.integers(0, len(question.status.sequences)), max_size=3)
        reply = StreamStatusReply(
            resend=dict.fromkeys(data.draw(rows), 0), cancel=data.draw(rows), ack_end=data.draw(rows)
        )
        self.world.tell(StatusAnswered(question.frontend, question.status, reply))

    @rule(frontend=st.sampled_from(["f1", "f2", "f3"]))
    def no_answer(self, frontend: str) -> None:
        """A status times out."""
        self.world.tell(StatusUnanswered(frontend))

    @rule()
    def reconnect(self) -> None:
        """The connection goes and comes."""
        self.world.tell(ConnectionLost(), TimePassed(), ConnectionRestored())
        self.note_statuses()

    @rule()
    def report(self) -> None:
        """A new leader asks."""
        self.world.tell(CommandReceived(Report()))

    @rule(deadline_s=st.none() | st.sampled_from([0.0, 1.5]))
    def drain(self, deadline_s: float | None) -> None:
        """The scheduler empties the worker, perhaps at once."""
        self.world.ask(Drain(term=1, deadline_s=deadline_s))
        assert self.world.core.draining
        assert deadline_s != 0 or not self.world.core._residents.live

    @rule()
    def undrain(self) -> None:
        """The worker is wanted again."""
        self.world.ask(Undrain(term=1))
        assert not self.world.core.draining

    def teardown(self) -> None:
        """Told to stop, the worker always ends, having published nothing but the right text."""
        if not hasattr(self, "world"):
            return
        world = self.world
        self.check_text()
        world.tell(StopRequested())
        for _ in range(40):
            if world.core.stage is Stage.GONE:
                break
            world.tell(TimePassed(), after_us=SECOND_US)
            for sequence in list(world.core._farewell.evictions._open):
                world.tell(EvictionUnanswered(*sequence))
        assert world.core.stage is Stage.GONE, "the worker never ends"
        assert [type(c.message) for c in only(PublishEvent, world.commands)][-1] is WorkerLeft
        assert only(Exit, world.commands) == [Exit()]

    def check_text(self) -> None:
        """Every row ever published is a part of its sequence's only possible text."""
        for command in only(PublishTokens, self.world.commands):
            for name in set(command.message.sequences):
                texts = [
                    expected_output(PROMPTS[name], submit(ignore_eos=ignore_eos).sampling, 60)
                    for ignore_eos in (True, False)
                ]
                for generation in (1, 2, 3):
                    for first, ids in rows_of(command, name, generation):
                        assert any(ids == text[first : first + len(ids)] for text in texts), "wrong text"


WorkerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWorkerMachine = WorkerMachine.TestCase
