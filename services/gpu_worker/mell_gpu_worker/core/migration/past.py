"""Replies to commands about migrations, kept so that a repeat gets the first one."""

from collections import OrderedDict

from mell_shared.messages.worker import WorkerReply

REMEMBER_US = 60_000_000
"""Longer than any repeat can be under way."""
_MOST = 10_000
"""No more are kept, however many migrations are named: the oldest go first."""


class Past:
    """The last reply to one kind of command, by migration."""

    def __init__(self) -> None:
        self._replies: OrderedDict[str, tuple[WorkerReply, int]] = OrderedDict()

    def remember(self, migration: str, reply: WorkerReply, now_us: int) -> None:
        """Answer repeats with `reply` for a while."""
        self._replies.pop(migration, None)
        self._replies[migration] = (reply, now_us + REMEMBER_US)
        if len(self._replies) > _MOST:
            self._replies.popitem(last=False)

    def reply(self, migration: str, now_us: int) -> WorkerReply | None:
        """Return what is remembered, if anything is."""
        while self._replies and next(iter(self._replies.values()))[1] <= now_us:
            self._replies.popitem(last=False)
        return self._replies.get(migration, (None, 0))[0]
