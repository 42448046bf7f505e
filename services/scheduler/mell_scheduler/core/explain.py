"""What became of a request, and why, as far as the core remembers; prompts it never knew."""

from mell_scheduler.core.history import Chronicle, Page
from mell_scheduler.core.lookup import find_sequences
from mell_scheduler.core.moves import as_status, outcome_status
from mell_scheduler.core.scheduler import SchedulerCore
from mell_shared.messages.admin import AdminRefused, Explanation, Happening, MoveStatus, Story

MOST_STORIES = 128


def explain(core: SchedulerCore, name: str, now_us: int) -> Explanation | AdminRefused:
    """Return the stories of all sequences that go by a name: their own, their request's, or its `x-request-id`."""
    names = find_sequences(core.ledger, core.waiting, name)
    if names:
        return Explanation(stories=tuple(_story(core, sequence, now_us) for sequence in names[:MOST_STORIES]))
    text = (
        f"no request {name!r} is known: give the id of its answer, its x-request-id, or a sequence's; "
        "what ended long ago, or before this scheduler led, is forgotten"
    )
    return AdminRefused(reason="unknown_request", message=text)


def _story(core: SchedulerCore, sequence: str, now_us: int) -> Story:
    record, entry = core.ledger.sequences.get(sequence), core.waiting.get(sequence)
    chronicle = core.ledger.history.get(sequence)
    known = Story(sequence=sequence, state="over")
    if chronicle is not None:
        happenings = tuple(_happening(core, chronicle, page, now_us) for page in chronicle.pages)
        told = {"request_id": chronicle.request_id, "model": chronicle.model, "left_out": chronicle.left_out}
        known = known.model_copy(update={**told, "happenings": happenings})
    if entry is not None:
        request = entry.request
        now = {"position": core.waiting.position(entry), "waited_s": entry.waited_us(now_us) / 1e6}
        return known.model_copy(
            update={"state": "waiting", "request_id": request.request_id, "model": request.model, **now}
        )
    if record is not None:
        size = {"tokens": record.tokens, "blocks": record.blocks}
        return known.model_copy(update={"state": record.state, "worker": record.worker.worker_id, **size})
    return known


def _happening(core: SchedulerCore, chronicle: Chronicle, page: Page, now_us: int) -> Happening:
    return Happening(
        what=page.what,
        ago_s=(now_us - page.at_us) / 1e6,
        worker=page.worker,
        generation=page.generation,
        why=page.why,
        blocks=page.blocks,
        free_blocks=max(0, page.free_blocks),
        waited_s=page.waited_us / 1e6,
        move=_move(core, chronicle, page, now_us),
    )


def _move(core: SchedulerCore, chronicle: Chronicle, page: Page, now_us: int) -> MoveStatus | None:
    """The move that a page is about: one that has begun is told as it stands now."""
    if page.what in ("moved", "stayed") and page.settled is not None:
        return outcome_status(page.settled, now_us - page.at_us)
    if page.what != "moving":
        return None
    record = core.ledger.sequences.get(chronicle.sequence)
    if record is not None and record.migration is not None and record.migration.migration == page.migration:
        return as_status(record.migration, now_us)
    over = [later for later in chronicle.pages if later.migration == page.migration and later.settled is not None]
    return outcome_status(over[0].settled, now_us - over[0].at_us) if over and over[0].settled else None
