"""More than can be served, and readers that do not read: the real shells of a whole stack, in virtual time.

The long form, with real processes and minutes of it, is `make soak-overload`.
"""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from mell_shared.testing import run_virtually
from tests.cluster.in_process import Answer, Client, InProcessStack, in_process_stack

STEP_S = 0.25
TOKENS = 8
SLOTS = 8
CAPACITY = SLOTS / (STEP_S * (TOKENS + 1))
"""Requests per second that one worker can end; a newcomer first waits for the step that runs."""
SUSTAINED = 0.6 * CAPACITY
WAIT_S = 5.0

ASK: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "seed": 7,
    "stream": True,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    yield
    structlog.reset_defaults()


class Load:
    """Clients that come whatever becomes of those before them, and what was most at any time."""

    def __init__(self, stack: InProcessStack) -> None:
        self._stack = stack
        self._random = random.Random(7)
        self._loop = asyncio.get_running_loop()
        self.answers: list[Answer] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.most_waiting = 0
        self.most_open = 0

    async def come(self, rate: float, duration_s: float) -> tuple[float, float]:
        """Let clients come for a while; returns when that was."""
        start_s = self._loop.time()
        while self._loop.time() < start_s + duration_s:
            task = asyncio.create_task(self._ask())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            self.most_waiting = max(self.most_waiting, self._stack.waiting)
            self.most_open = max(self.most_open, self._stack.core.open_sequences)
            await asyncio.sleep(self._random.expovariate(rate))
        return start_s, self._loop.time()

    async def _ask(self) -> None:
        self.answers.append(await self._stack.ask(ASK))

    def served(self, start_s: float, end_s: float) -> float:
        """Whole answers per second in that time."""
        ended = [a.ended_s for a in self.answers if a.status == 200 and b"[DONE]" in a.body and a.ended_s]
        return sum(start_s <= at_s < end_s for at_s in ended) / (end_s - start_s)

    def asked(self, start_s: float, end_s: float) -> list[Answer]:
        """The answers to what was asked in that time."""
        return [answer for answer in self.answers if start_s <= answer.asked_s < end_s]


def test_five_times_what_can_be_served(tmp_path: Path) -> None:
    """Goodput stays, all queues stay short, who is refused is told when to come back; then all is as before."""

    async def main() -> None:
        limits = {"scheduler": {"queue_wait_s": WAIT_S}, "worker": {"max_sequences": SLOTS}}
        async with in_process_stack(tmp_path, step_s=STEP_S, **limits) as stack:
            load = Load(stack)
            before = await load.come(SUSTAINED, 12)
            flood = await load.come(5 * SUSTAINED, 24)
            after = await load.come(SUSTAINED, 24)
            await asyncio.gather(*load.tasks)
            check_flood(load, before, flood)
            check_recovered(load, after)
            await check_all_freed(stack)

    run_virtually(main())


def check_flood(load: Load, before: tuple[float, float], flood: tuple[float, float]) -> None:
    """What holds while too many come."""
    assert all(answer.status == 200 for answer in load.asked(*before))
    assert load.served(*flood) >= load.served(*before)
    assert load.served(*flood) >= 0.85 * CAPACITY
    refused = [answer for answer in load.asked(*flood) if answer.status != 200]
    assert len(refused) > len(load.asked(*flood)) / 2
    for answer in refused:
        assert (answer.status, answer.error["type"], answer.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 2 * WAIT_S
    # For its first two seconds a line's pace is not known.
    assert load.most_waiting <= (2 + WAIT_S) * 5 * SUSTAINED
    assert load.most_open <= load.most_waiting + 2 * SLOTS
    served = [a.ended_s - a.asked_s for a in load.asked(*flood) if a.status == 200 and a.ended_s]
    late = load.asked(flood[0] + 10, flood[1])
    assert max(a.ended_s - a.asked_s for a in late if a.status == 200 and a.ended_s) <= WAIT_S + 2 * STEP_S * TOKENS + 2
    assert served


def check_recovered(load: Load, after: tuple[float, float]) -> None:
    """What holds once they no longer come: most get in at once, soon all do, and then nobody waits."""
    start_s, end_s = after
    first = load.asked(start_s, start_s + 2 * WAIT_S)
    assert sum(answer.status == 200 for answer in first) > len(first) / 2
    assert all(answer.status == 200 for answer in load.asked(start_s + 2 * WAIT_S, end_s))
    assert load.served(*after) >= 0.95 * SUSTAINED
    last = [a.ended_s - a.asked_s for a in load.asked(end_s - 5, end_s) if a.ended_s]
    assert sorted(last)[len(last) // 2] <= 1.5 * STEP_S * TOKENS


async def check_all_freed(stack: InProcessStack) -> None:
    """Nothing is kept of those who came."""
    await asyncio.sleep(5)
    assert (stack.core.open_sequences, stack.gateway.open_streams, stack.waiting) == (0, 0, 0)
    for worker in stack.workers:
        worker.core.check()
        assert worker.core.batcher.pool.used_blocks == 0


def test_who_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    """Beside clients that read nothing others are served as if alone; the former are given up, and all is freed."""
    tokens, patience_s = 100, 60.0

    async def main() -> None:
        loop = asyncio.get_running_loop()
        settings = {"write_timeout_s": patience_s}
        async with in_process_stack(tmp_path, step_s=STEP_S, frontend=settings) as stack:
            alone = await Client(stack.app).ask({**ASK, "max_tokens": tokens})
            deaf = [Client(stack.app) for _ in range(6)]
            for client in deaf:
                client.reads.clear()
            stuck = [asyncio.create_task(client.ask({**ASK, "max_tokens": tokens})) for client in deaf]
            began_s = loop.time()
            beside = await asyncio.gather(*(Client(stack.app).ask({**ASK, "max_tokens": tokens}) for _ in range(6)))
            for answer in beside:
                assert texts(answer) == texts(alone)
                assert answer.ended_s is not None and alone.ended_s is not None  # noqa: PT018
                assert answer.ended_s - answer.asked_s <= alone.ended_s - alone.asked_s + 2 * STEP_S
            assert not any(task.done() for task in stuck)
            unread = [len(stream._token_ids) for stream in stack.gateway._streams.values()]
            assert all(0 <= count <= tokens for count in unread)
            await asyncio.gather(*stuck)
            assert loop.time() - began_s <= 2 * patience_s
            assert all(client.answer.writes == 0 for client in deaf)
            await check_all_freed(stack)

    run_virtually(main())


def texts(answer: Answer) -> str:
    """Return the text of a stream."""
    chunks = [line.removeprefix("data: ") for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in json.loads(chunk)["choices"])


def test_too_many_at_one_frontend_are_refused_at_once(tmp_path: Path) -> None:
    """The frontend's own bound: what it cannot hold is a 429, and those it holds go on."""

    async def main() -> None:
        async with in_process_stack(tmp_path, step_s=STEP_S, frontend={"max_open_sequences": 4}) as stack:
            answers = await asyncio.gather(*(stack.ask(ASK) for _ in range(10)))
            assert sorted(answer.status for answer in answers) == [200] * 4 + [429] * 6
            assert all("retry-after" in answer.headers for answer in answers if answer.status == 429)
            await check_all_freed(stack)

    run_virtually(main())
