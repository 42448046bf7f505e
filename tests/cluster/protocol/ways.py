"""All ways out of a state: what the processes do, what travels arrives, timers fire, faults happen."""

from collections.abc import Iterator
from enum import Enum
from itertools import combinations

from mell_gpu_worker.core.migration.tables import SourceEvent, SourcePhase, TargetEvent, TargetPhase
from tests.cluster.protocol import frontend, source, target
from tests.cluster.protocol.state import FRONTEND, Claimed, Draft, In, Message, Out, Run, State, Worker
from tests.cluster.protocol.tidy import tidy


class Kind(Enum):
    """Who is to blame for a step."""

    GOOD = "good"
    """Things go their way; a timer that fires because nothing else would happen counts here."""
    EARLY = "early timer"
    """A timer fires although an answer may still come. Free, and possible whenever it is armed."""
    FAULT = "fault"
    """Something is lost, repeated, cut, dead, or falsely suspected."""


Way = tuple[str, Kind, State]


def ways(state: State) -> Iterator[Way]:
    """Yield every step from a state."""
    for what, kind, draft in _steps(state):
        for migration in range(len(draft.outs)):
            target.notice(draft, migration)
            source.notice(draft, migration)
            target.proceed(draft, migration)
        draft.smooth &= kind is Kind.GOOD or what.endswith("is ordered")
        tidy(draft)
        yield what, kind, draft.freeze()


_Step = tuple[str, Kind, Draft]


def _steps(state: State) -> Iterator[_Step]:
    # While two parties are cut off, going well begins with the end of that.
    good = Kind.EARLY if state.cut else Kind.GOOD
    yield from _arrivals(state, good)
    yield from _computing(state, good)
    yield from _statuses(state, good)
    yield from _placing(state, good)
    yield from _orders(state)
    for migration in range(len(state.outs)):
        yield from _at_source(state, migration, good)
        yield from _at_target(state, migration, good)
    yield from _faults(state)


# --- messages


def _arrivals(state: State, good: Kind) -> Iterator[_Step]:
    for message in state.net:
        draft = Draft(state)
        draft.net.discard(message)
        deliver(draft, message)
        yield f"{message} arrives", good, draft
        if state.left.faults:
            yield from _mishaps(state, message)


_REQUESTS = ("reserve", "commit", "release", "claim", "abort", "submit")


def _mishaps(state: State, message: Message) -> Iterator[_Step]:
    """What a fault does to a request.

    Other losses are there without a fault: a reply's is the early timer of who waits for it, a token's or a drop's a
    delay until the next status. Repeats of replies find nobody who waits, those of tokens and drops change nothing.
    """
    if message[0] not in _REQUESTS:
        return
    draft = Draft(state)
    draft.net.discard(message)
    draft.spend(faults=1)
    draft.excused |= message[0] == "submit"
    yield f"{message} is lost", Kind.FAULT, draft
    draft = Draft(state)
    deliver(draft, message)
    draft.spend(faults=1)
    yield f"{message} arrives, and will again", Kind.FAULT, draft


def deliver(draft: Draft, message: Message) -> None:
    """Let a message reach whom it is for."""
    kind, sender, receiver, *rest = message
    if receiver == FRONTEND:
        _to_frontend(draft, kind, sender, rest)
    elif draft.workers[receiver].alive:
        _to_worker(draft, kind, sender, receiver, rest)


def _to_frontend(draft: Draft, kind: str, sender: int, rest: list[object]) -> None:
    match kind, rest:
        case "claim", [int(migration), int(generation), int(claimed_source), int(length)]:
            frontend.claim(draft, Claimed(migration, generation, claimed_source, sender, length))
        case "abort", [int(migration), int(generation)]:
            frontend.abort(draft, migration, generation, sender)
        case "tokens", [int(generation), int(base), tuple(ids)]:
            frontend.tokens(draft, sender, generation, base, ids)
        case _:
            raise AssertionError(f"{kind} {rest} is nothing for a frontend")


def _to_worker(draft: Draft, kind: str, sender: int, worker: int, rest: list[object]) -> None:  # noqa: PLR0912
    match kind, rest:
        case "reserve", [int(migration), int(generation), tuple(ids)]:
            target.reserve(draft, migration, sender, worker, generation=generation, ids=ids)
        case "commit", [int(migration), tuple(ids)]:
            target.commit(draft, migration, sender, worker, ids)
        case "release", [int(migration)]:
            target.release(draft, migration)
        case "round", [int(migration)]:
            target.arrived(draft, migration)
        case "granted", [int(migration), (int(generation), int(accepted))]:
            target.ruled(draft, migration, (generation, accepted))
        case "refused", [int(migration)]:
            target.ruled(draft, migration, None)
        case "reserved", [int(migration)]:
            source.answered(draft, migration, "reserve", SourceEvent.RESERVED)
        case "kv refused", [int(migration)]:
            source.answered(draft, migration, "reserve", SourceEvent.REFUSED)
        case "commit granted", [int(migration)]:
            source.answered(draft, migration, "commit", SourceEvent.GRANTED)
        case "commit refused", [int(migration)]:
            source.answered(draft, migration, "commit", SourceEvent.REFUSED)
        case "aborted", [int(migration), bool(owned)]:
            source.answered(draft, migration, "ruling", SourceEvent.OWNED if owned else SourceEvent.DISOWNED)
        case "drop", [int(generation)]:
            drop(draft, worker, generation)
        case "submit", [int(generation), tuple(ids)]:
            submit(draft, worker, generation, ids)
        case _:
            raise AssertionError(f"{kind} {rest} is nothing for a worker")


def drop(draft: Draft, worker: int, generation: int) -> None:
    """A worker is told to stop a generation, which may not have come yet."""
    known = draft.workers[worker]
    if known.run is not None and known.run.generation == generation:
        target.give_up(draft, worker)
    elif generation > known.newest:
        draft.workers[worker] = known._replace(newest=generation)


def submit(draft: Draft, worker: int, generation: int, ids: tuple[object, ...]) -> None:
    """A worker is given a sequence; an older generation of it is given up."""
    known = draft.workers[worker]
    if generation > known.newest:
        draft.workers[worker] = known._replace(run=Run(generation, ids, len(ids)), newest=generation)


# --- workers at work


def _computing(state: State, good: Kind) -> Iterator[_Step]:
    for number, worker in enumerate(state.workers):
        run = worker.run
        if run is None or not run.live(state.left.tokens):
            continue
        draft = Draft(state)
        moves = any(o is not None and (o.worker, o.generation) == (number, run.generation) for o in state.outs)
        if run.in_step or not (moves or run.halted):
            ids = (*run.ids, (number, run.generation))
            draft.workers[number] = worker._replace(run=run._replace(ids=ids, in_step=False))
            draft.send("tokens", number, FRONTEND, run.generation, run.base, ids)
            yield f"worker {number} finishes a step", good, draft
        # That a step takes time matters only to a move.
        elif not run.halted:
            draft.workers[number] = worker._replace(run=run._replace(in_step=True))
            yield f"worker {number} begins a step", good, draft


def _statuses(state: State, good: Kind) -> Iterator[_Step]:
    """What the statuses of every second bring to light: tokens not accepted, sequences that nobody wants."""
    front = state.front
    for number, worker in enumerate(state.workers):
        run = worker.run
        if run is None:
            continue
        draft = Draft(state)
        if frozenset((number, FRONTEND)) == state.cut:
            continue
        if front.ended or front.owner != number or front.generation != run.generation:
            target.give_up(draft, number)
        elif len(run.ids) > front.accepted:
            draft.send("tokens", number, FRONTEND, run.generation, run.base, run.ids)
        if draft.net != state.net or draft.workers[number].run is None:
            yield f"worker {number} tells its status", good, draft


# --- the frontend


def _placing(state: State, good: Kind) -> Iterator[_Step]:
    if state.front.ended:
        return
    if state.left.cancels:
        draft = Draft(state)
        draft.spend(cancels=1)
        frontend.leave(draft)
        yield "the client leaves", Kind.EARLY, draft
    lost = not holds(state)
    if lost or state.left.suspicions:
        for number in candidates(state):
            # Whoever is cut off does not answer: it gets nothing before the cut is mended.
            if state.workers[number].alive and state.cut != {number, FRONTEND}:
                draft = Draft(state)
                if not lost:
                    draft.spend(suspicions=1)
                    draft.excused = True
                frontend.submit_again(draft, number)
                yield f"submitted again, to {number}", good if lost else Kind.FAULT, draft


def candidates(state: State) -> list[int]:
    """Return the workers, of those that nothing has happened to only one: they are all alike."""
    fresh = [number for number, worker in enumerate(state.workers) if worker == _FRESH]
    named = {end for record in (*state.outs, *state.ins) for end in _ends(record)}
    named |= {end for message in state.net for end in message[1:3]}
    alike = [number for number in fresh if number not in named and number != state.front.owner]
    return [number for number in range(len(state.workers)) if number not in alike[1:]]


_FRESH = Worker()


def holds(state: State) -> bool:
    """Whether the owner has the sequence, or is about to."""
    front = state.front
    if front.owner is None or not state.workers[front.owner].alive:
        return False
    run = state.workers[front.owner].run
    if run is not None and run.generation == front.generation:
        return True
    if any(m[0] == "submit" and m[2:4] == (front.owner, front.generation) for m in state.net):
        return state.workers[front.owner].newest < front.generation
    granted = front.granted
    if granted is None:
        return False
    move = state.ins[granted[0].migration]
    return move is not None and move.standing.phase is TargetPhase.CLAIMING


def _orders(state: State) -> Iterator[_Step]:
    if not state.left.moves:
        return
    migration = len(state.outs) - state.left.moves
    moving = {(out.worker, out.generation) for out in state.outs if out is not None}
    for number, worker in enumerate(state.workers):
        run = worker.run
        if run is None or not run.live(state.left.tokens) or (number, run.generation) in moving:
            continue
        for other in candidates(state):
            if other != number and state.workers[other].alive:
                draft = Draft(state)
                draft.spend(moves=1)
                source.order(draft, migration, number, other)
                yield f"a move from {number} to {other} is ordered", Kind.EARLY, draft


# --- both ends of a move


def _at_source(state: State, migration: int, good: Kind) -> Iterator[_Step]:
    out = state.outs[migration]
    if out is None:
        return
    event = source.next_step(Draft(state), migration)
    if event is not None:
        draft = Draft(state)
        source.apply(draft, migration, event)
        yield f"source of {migration}: {event}", good, draft
    timely = Kind.EARLY if event is not None or _awaited(state, migration) else good
    if out.question:
        draft = Draft(state)
        draft.outs[migration] = out._replace(question="")
        # An answer under way finds nobody who waits for it.
        draft.net -= {m for m in draft.net if m[2] == out.worker and m[3] == migration and m[0] != "release"}
        source.apply(draft, migration, SourceEvent.UNANSWERED)
        yield f"source of {migration}: no answer", timely, draft
    if out.standing.until_us is not None:
        draft = Draft(state)
        source.apply(draft, migration, SourceEvent.LATE)
        yield f"source of {migration}: too late", timely if not out.question else Kind.EARLY, draft
    if out.standing.again_us is not None and not out.question:
        draft = Draft(state)
        source.apply(draft, migration, SourceEvent.PAUSE_OVER)
        yield f"source of {migration}: pause over", good, draft


def _at_target(state: State, migration: int, good: Kind) -> Iterator[_Step]:
    move = state.ins[migration]
    if move is None:
        return
    phase = move.standing.phase
    if target.computes(move, state.left.tokens):
        draft = Draft(state)
        draft.ins[migration] = move._replace(ids=(*move.ids, (move.worker, -move.generation)))
        yield f"target of {migration} computes a token", good, draft
    busy = _awaited(state, migration) or _source_goes_on(state, migration)
    if move.asking:
        draft = Draft(state)
        draft.ins[migration] = move._replace(asking=False)
        draft.net -= {m for m in draft.net if m[2] == move.worker and m[3] == migration and m[0] in _RULINGS}
        target.apply(draft, migration, TargetEvent.UNANSWERED)
        yield f"target of {migration}: no ruling", Kind.EARLY if busy else good, draft
    elif move.standing.again_us is not None:
        draft = Draft(state)
        target.apply(draft, migration, TargetEvent.PAUSE_OVER)
        yield f"target of {migration}: pause over", good, draft
    if move.standing.until_us is not None:
        draft = Draft(state)
        draft.excused |= phase is TargetPhase.CLAIMING
        target.apply(draft, migration, TargetEvent.LATE)
        late = Kind.EARLY if busy or phase is TargetPhase.CLAIMING else good
        yield f"target of {migration}: too late", late, draft


_RULINGS = ("granted", "refused")


def _awaited(state: State, migration: int) -> bool:
    """Whether anything about a move is under way."""
    return any(len(m) > 3 and m[3] == migration and m[0] not in _OTHERS for m in state.net)


_OTHERS = ("drop", "submit", "tokens")


def _source_goes_on(state: State, migration: int) -> bool:
    out = state.outs[migration]
    return out is not None and (out.standing.phase is not SourcePhase.OVER)


# --- what goes wrong


def _faults(state: State) -> Iterator[_Step]:
    if state.cut:
        draft = Draft(state)
        draft.cut = frozenset()
        yield "the cut is mended", Kind.GOOD, draft
    if not state.left.faults:
        return
    yield from _crashes(state)
    for migration, (out, move) in enumerate(zip(state.outs, state.ins, strict=True)):
        if out is not None or move is not None:
            draft = Draft(state)
            draft.spend(faults=1)
            fail_link(draft, migration)
            yield f"the link of {migration} fails", Kind.FAULT, draft
    if not state.cut:
        alive = [number for number in candidates(state) if state.workers[number].alive]
        for pair in combinations([*alive, FRONTEND], 2):
            yield f"{pair} are cut off", Kind.FAULT, _cut_off(state, frozenset(pair))


def _crashes(state: State) -> Iterator[_Step]:
    for number in candidates(state):
        worker = state.workers[number]
        if worker.alive and sum(other.alive for other in state.workers) > 1:
            draft = Draft(state)
            draft.spend(faults=1)
            draft.excused = True
            draft.workers[number] = worker._replace(alive=False, run=None)
            draft.net = {m for m in draft.net if m[2] != number}
            for migration, (out, move) in enumerate(zip(state.outs, state.ins, strict=True)):
                if number in _ends(out, move):
                    fail_link(draft, migration)
                if out is not None and out.worker == number:
                    draft.outs[migration] = None
                if move is not None and move.worker == number:
                    draft.ins[migration] = None
                    draft.past[migration] = "refused"
            yield f"worker {number} dies", Kind.FAULT, draft


def _ends(*records: Out | In | None) -> set[int]:
    ends: set[int] = set()
    for record in records:
        if record is not None:
            ends |= {record.worker, record.target if isinstance(record, Out) else record.source}
    return ends


def fail_link(draft: Draft, migration: int) -> None:
    """Break a transfer off, at both ends."""
    draft.net -= {m for m in draft.net if m[0] == "round" and m[3] == migration}
    target.link_failed(draft, migration)
    source.link_failed(draft, migration)


def _cut_off(state: State, pair: frozenset[int]) -> Draft:
    draft = Draft(state)
    draft.spend(faults=1)
    draft.cut = pair
    draft.excused |= any(m[0] == "submit" and frozenset(m[1:3]) == pair for m in draft.net)
    draft.net = {m for m in draft.net if frozenset(m[1:3]) != pair}
    for migration, (out, move) in enumerate(zip(state.outs, state.ins, strict=True)):
        if pair == _ends(out, move):
            fail_link(draft, migration)
    return draft
