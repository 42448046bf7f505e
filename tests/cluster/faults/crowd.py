"""Clients that stream all the while: each text must be that of an undisturbed run, and the longest pause is noted."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from tests.cluster.stack import StreamedChat, eventually

TOKENS = 120
"""Of each answer."""
STORIES = 4
"""Different ones."""
_JOIN_S = 90.0


def ask_for(story: int) -> dict[str, Any]:
    """Return what makes the request for a story another than that for the next: its beginning, and its seed."""
    words = f"Story {story}, please: " + "long ago and far away, " * 12
    return {"messages": [{"role": "user", "content": words}], "seed": 11 + story}


@dataclass(slots=True)
class Pauses:
    """The longest waits of clients, in seconds."""

    running: float = 0.0
    """Between two pieces of one text."""
    first: float = 0.0
    """From a request to the first piece."""


class _Read(StreamedChat):
    """A streamed answer whose pauses are noted as it is read."""

    def __init__(self, client: httpx.Client, story: int, pauses: Pauses) -> None:
        self._pauses = pauses
        self._last_s = time.monotonic()
        super().__init__(client, TOKENS, **ask_for(story))

    def _take(self, line: str) -> None:
        before = len(self.text)
        super()._take(line)
        if len(self.text) == before:
            return
        now_s = time.monotonic()
        waited_s, self._last_s = now_s - self._last_s, now_s
        if before:
            self._pauses.running = max(self._pauses.running, waited_s)
        else:
            self._pauses.first = max(self._pauses.first, waited_s)


class Crowd:
    """So many clients of one frontend, each asking again as soon as it has been answered, until the context is left.

    Leaving waits until the answers under way are whole, and raises what went wrong with any.
    """

    def __init__(self, url: str, stories: Sequence[str], clients: int = STORIES) -> None:
        self.pauses = Pauses()
        self.answers = 0
        self._stories = stories
        self._http = httpx.Client(base_url=url, timeout=_JOIN_S, trust_env=False)
        self._leaving = threading.Event()
        self._failures: list[str] = []
        self._characters = [0] * clients
        self._present = [0] * clients
        """Characters of the answers under way."""
        self._threads = [threading.Thread(target=self._stream, args=(n,), daemon=True) for n in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join(_JOIN_S if kind is None else 0)
        stuck = [thread for thread in self._threads if thread.is_alive()]
        if not stuck:
            self._http.close()
        if kind is None:
            assert not stuck, f"{len(stuck)} clients still wait for their answer; {self._failures}"
            assert not self._failures, self._failures

    def well(self) -> bool:
        """Whether nothing has gone wrong so far; for conditions that are waited for."""
        assert not self._failures, self._failures
        return True

    @property
    def failures(self) -> list[str]:
        """What has gone wrong so far."""
        return self._failures

    def progress(self) -> list[int]:
        """Return the characters that each client has been sent so far."""
        return list(self._characters)

    def on_since(self, before: Sequence[int], characters: int = 20) -> bool:
        """Whether every client has had so many more since `before`."""
        return self.well() and all(now >= then + characters for now, then in zip(self._characters, before, strict=True))

    def answered_anew(self) -> None:
        """Wait until requests have been placed and answered that were not begun yet."""
        enough = self.answers + 2 * len(self._threads)
        eventually(lambda: self.well() and self.answers >= enough, "new ones are answered")

    def amid_answers(self) -> None:
        """Wait until each client is in the middle of an answer."""
        eventually(lambda: self.well() and all(10 <= n <= TOKENS - 40 for n in self._present), "all are amid answers")

    def _stream(self, number: int) -> None:
        story = number
        try:
            while not self._leaving.is_set():
                self._read(number, story % len(self._stories))
                story += 1
        except Exception as error:  # noqa: BLE001 - told to whoever leaves the crowd
            self._failures.append(f"client {number}: {error!r}")

    def _read(self, number: int, story: int) -> None:
        chat = _Read(self._http, story, self.pauses)
        before = self._characters[number]
        while not chat.done:
            chat.read(len(chat.text) + 1)
            self._present[number] = len(chat.text)
            self._characters[number] = before + len(chat.text)
            assert self._stories[story].startswith(chat.text), f"a wrong text: {chat.text!r}"
        assert chat.text == self._stories[story], f"not the whole text: {chat.text!r}"
        assert chat.finish_reason == "length"
        self.answers += 1
