"""A state of the protocol: one sequence, its frontend, three workers, the moves under way, and what travels.

A token is named by who computed it, so that the same index computed twice gives two different tokens: text that hangs
together by luck is told from text that does by rule. Everything is hashable; a `Draft` is a state being changed.
"""

from typing import Any, NamedTuple

from mell_gpu_worker.core.migration.tables import SourcePhase, Standing, TargetPhase

FRONTEND = 9
"""Stands among the workers' numbers for the frontend."""
NOBODY = -1

Ids = tuple[Any, ...]
Message = tuple[Any, ...]
"""(kind, from, to, ...)."""


class Run(NamedTuple):
    """A sequence known at a worker. `base`: the first index that it publishes."""

    generation: int
    ids: Ids
    base: int
    halted: bool = False
    in_step: bool = False

    def live(self, tokens: int) -> bool:
        """Whether it goes on, and so holds blocks; it is over after `tokens` tokens."""
        return len(self.ids) < tokens


class Worker(NamedTuple):
    """A worker; `newest` is the highest generation of the sequence that it remembers."""

    alive: bool = True
    run: Run | None = None
    newest: int = 0


class Out(NamedTuple):
    """A move at its source. `question`: what it waits for an answer to."""

    worker: int
    target: int
    generation: int
    standing: Standing[SourcePhase]
    question: str = ""


class In(NamedTuple):
    """A move at its target. `ids` grow only once it computes; `kv`: whether the source's last blocks are in place."""

    worker: int
    source: int
    generation: int
    standing: Standing[TargetPhase]
    ids: Ids
    kv: bool = False
    asking: bool = False
    length: int = 0
    waited_for: bool = False
    """The source waits for the commit's answer."""
    in_step: bool = False


class Claimed(NamedTuple):
    """A claim, as the arbiter's rules read it."""

    migration: int
    generation: int
    source: int
    target: int
    length: int


class Front(NamedTuple):
    """The frontend's record, with the fields that the arbiter's rules read."""

    owner: int | None
    generation: int
    output_ids: Ids
    ended: bool
    granted: tuple[Claimed, tuple[int, int]] | None = None
    aborted: frozenset[int] = frozenset()

    @property
    def accepted(self) -> int:
        """How many tokens were accepted."""
        return len(self.output_ids)


class Left(NamedTuple):
    """What may still happen; `tokens`: after how many the request is over."""

    tokens: int
    moves: int
    suspicions: int
    cancels: int
    faults: int


class State(NamedTuple):
    """Everything. `past`: by migration, what its target answers once it is over."""

    front: Front
    workers: tuple[Worker, ...]
    outs: tuple[Out | None, ...]
    ins: tuple[In | None, ...]
    past: tuple[str, ...]
    net: frozenset[Message]
    cut: frozenset[int]
    left: Left
    excused: bool = False
    """Something happened that may cost the owner its copy."""
    smooth: bool = True
    """Nothing has gone wrong so far, and no timer has fired early."""


class Draft:
    """A state being changed."""

    __slots__ = ("cut", "excused", "front", "ins", "left", "net", "outs", "past", "smooth", "workers")

    def __init__(self, state: State) -> None:
        self.front = state.front
        self.workers = list(state.workers)
        self.outs = list(state.outs)
        self.ins = list(state.ins)
        self.past = list(state.past)
        self.net = set(state.net)
        self.cut = state.cut
        self.left = state.left
        self.excused = state.excused
        self.smooth = state.smooth

    def freeze(self) -> State:
        """Return the state."""
        return State(
            self.front,
            tuple(self.workers),
            tuple(self.outs),
            tuple(self.ins),
            tuple(self.past),
            frozenset(self.net),
            self.cut,
            self.left,
            self.excused,
            self.smooth,
        )

    def send(self, *message: Any) -> None:
        """Let a message travel, unless its way is cut."""
        if self.cut and frozenset(message[1:3]) == self.cut:
            return
        if message[0] == "tokens":
            # Order holds within one subject, and a later message tells all that an earlier one did: one is enough.
            self.net -= {m for m in self.net if m[0] == "tokens" and m[1] == message[1] and m[3] == message[3]}
        self.net.add(message)

    def spend(self, **what: int) -> None:
        """Use up some of what may happen."""
        self.left = self.left._replace(**{name: getattr(self.left, name) - count for name, count in what.items()})


def start(workers: int, left: Left) -> State:
    """Return the state right after the first submission was accepted by worker 0."""
    first = Worker(run=Run(1, (), 0), newest=1)
    others = tuple(Worker() for _ in range(workers - 1))
    empty = (None,) * left.moves
    front = Front(0, 1, (), ended=False)
    return State(front, (first, *others), empty, empty, ("",) * left.moves, frozenset(), frozenset(), left)
