"""Events as JSON lines and back, so that what the core decided can be decided again, elsewhere and later."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from mell_scheduler.core.scheduler import SchedulerCore
from mell_scheduler.core.values import (
    Command,
    ConnectionRestored,
    CoreSettings,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    OperatorAsked,
    OperatorRequest,
    PlaceRequested,
    Tick,
)
from mell_scheduler.policy import PolicySettings, is_own, make_policy
from mell_scheduler.policy.base import BalanceSettings, PriorityWeights, RepackSettings
from mell_shared.messages.base import Message, unpack_uint32
from mell_shared.messages.scheduler import PLACE_REQUEST, SCHEDULER_EVENT

_VERSION = 3
_PLAIN: dict[str, type[LeadershipTaken | LeadershipEnded | ConnectionRestored | Tick]] = {
    "leadership_taken": LeadershipTaken,
    "leadership_ended": LeadershipEnded,
    "connection_restored": ConnectionRestored,
    "tick": Tick,
}
_OPERATOR_REQUEST: TypeAdapter[OperatorRequest] = TypeAdapter(Annotated[OperatorRequest, Field(discriminator="kind")])
_NAMES = {kind: name for name, kind in _PLAIN.items()}


class JournalError(ValueError):
    """A journal cannot be read; the message names the line."""


def header_line(policy: str, policy_settings: PolicySettings, settings: CoreSettings) -> str:
    """Return the first line of a journal: all that decisions depend on besides the events."""
    told = {"policy_settings": asdict(policy_settings), "settings": asdict(settings)}
    return json.dumps({"journal": _VERSION, "policy": policy, **told})


def event_line(event: Event, now_us: int) -> str:
    """Return the line of one event that the core was given at `now_us`."""
    return json.dumps({"at_us": now_us, **_fields(event)}, default=unpack_uint32, separators=(",", ":"))


def _fields(event: Event) -> dict[str, Any]:
    if isinstance(event, Message):
        return {"event": "message", "message": event.model_dump()}
    if isinstance(event, PlaceRequested):
        return {"event": "place_requested", "handle": event.handle, "message": event.request.model_dump()}
    if isinstance(event, OperatorAsked):
        return {"event": "operator_asked", "handle": event.handle, "message": event.request.model_dump()}
    return {"event": _NAMES[type(event)], **asdict(event)}


def read_event(line: str) -> tuple[int, Event]:
    """Return (now_us, event) of a line; raises ValueError, KeyError or TypeError if it holds none."""
    fields = json.loads(line)
    now_us, name = int(fields.pop("at_us")), fields.pop("event")
    if name == "message":
        return now_us, SCHEDULER_EVENT.validate_python(fields["message"])
    if name == "place_requested":
        return now_us, PlaceRequested(fields["handle"], PLACE_REQUEST.validate_python(fields["message"]))
    if name == "operator_asked":
        return now_us, OperatorAsked(fields["handle"], _OPERATOR_REQUEST.validate_python(fields["message"]))
    return now_us, _PLAIN[name](**fields)


def replay(lines: Iterable[str]) -> Iterator[tuple[int, Event, list[Command]]]:
    """Decide again: yields each event with its time and the commands it causes.

    Every term of leadership begins with an empty core, as it did live. Raises `JournalError`.
    """
    numbered = enumerate(lines, start=1)
    build = _read_header(next(numbered, (1, ""))[1])
    core: SchedulerCore | None = None
    for number, line in numbered:
        try:
            now_us, event = read_event(line)
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"line {number} is no event: {type(error).__name__}") from error
        if isinstance(event, LeadershipTaken):
            core = build(now_us)
        if core is None:
            raise JournalError(f"line {number}: an event before leadership was taken")
        yield now_us, event, core.handle(event, now_us)


def _read_header(line: str) -> Callable[[int], SchedulerCore]:
    """Return what makes the core of each term, from its first moment."""
    try:
        head = json.loads(line)
        if head["journal"] != _VERSION:
            raise JournalError(f"journal version {head['journal']} is not {_VERSION}")
        name, policy = str(head["policy"]), _policy_settings(head["policy_settings"])
        settings = CoreSettings(**head["settings"])
        if is_own(name):
            raise JournalError(f"it is of the policy {name!r}: reading a journal loads no code")
        make_policy(name, policy)
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(f"line 1 is no journal header: {error}") from error
    return lambda now_us: SchedulerCore(make_policy(name, policy), settings, now_us)


def _policy_settings(fields: dict[str, Any]) -> PolicySettings:
    parts = {
        "repack": RepackSettings(**fields["repack"]),
        "balance": BalanceSettings(**fields["balance"]),
        "priority": PriorityWeights(**fields["priority"]),
    }
    return PolicySettings(**{**fields, **parts})
