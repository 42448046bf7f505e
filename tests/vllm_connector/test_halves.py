"""The two halves of two servers together, told what vLLM tells them: what is fetched, and what becomes of faults."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mell_vllm_connector.exchange import ExchangeError, count_held
from mell_vllm_connector.kv_memory import open_memory
from mell_vllm_connector.scheduler_half import Facts, SchedulerHalf
from mell_vllm_connector.worker_half import WorkerHalf, rank_address
from tests.ports import free_port

SIZE, BLOCKS = 4, 16


def request(name: str, ids: Sequence[int], source: str | None = None, **changes: Any) -> Any:
    """What vLLM has of a request; `source` is where it may have KV from."""
    fields: dict[str, Any] = {
        "request_id": name,
        "all_token_ids": list(ids),
        "kv_transfer_params": None if source is None else {"mell": {"from": source}},
        "lora_request": None,
        "mm_features": [],
        "prompt_embeds": None,
        "cache_salt": None,
        "pooling_params": None,
        "num_computed_tokens": len(ids),
    }
    return SimpleNamespace(**(fields | changes))


class Server:
    """Both halves of one server, and steps as its scheduler would plan them: KV of a token is the token."""

    def __init__(self, layout: str = "layout") -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.cache = torch.zeros(BLOCKS, 1, SIZE, 1, dtype=torch.int64)
        self.plan = SchedulerHalf(Facts(self.address, layout, SIZE, SIZE * 8), self._ask)
        self.work = WorkerHalf(self.address, 0, open_memory({"layer": self.cache}, BLOCKS))
        self.questions: list[tuple[str, int]] = []

    def _ask(self, address: str, digests: Sequence[bytes]) -> "Future[int]":
        self.questions.append((address, len(digests)))
        answer: Future[int] = Future()
        try:
            answer.set_result(count_held(address, digests))
        except ExchangeError as error:
            answer.set_exception(error)
        return answer

    def step(
        self, new: Sequence[tuple[Any, list[int], int]] = (), old: Sequence[tuple[str, list[int], int]] = ()
    ) -> None:
        """Run one step: requests that begin, with their blocks and how much is there; those that go on."""
        begun = [
            SimpleNamespace(req_id=each.request_id, block_ids=(blocks,), num_computed_tokens=computed)
            for each, blocks, computed in new
        ]
        cached = SimpleNamespace(
            req_ids=[name for name, _, _ in old],
            new_block_ids=[(blocks,) if blocks else None for _, blocks, _ in old],
            num_computed_tokens=[computed for _, _, computed in old],
            resumed_req_ids=set(),
        )
        orders = self.plan.step(SimpleNamespace(scheduled_new_reqs=begun, scheduled_cached_reqs=cached))
        self.work.begin(orders)
        for each, blocks, computed in new:
            for place in range(computed, len(each.all_token_ids)):
                self.cache[blocks[place // SIZE], 0, place % SIZE, 0] = each.all_token_ids[place]
        self.work.start(orders.loads)

    def compute(self, each: Any, blocks: list[int]) -> None:
        """Compute a whole prompt, and let it be known."""
        self.plan.allocated(each, blocks, 0)
        self.step(new=[(each, blocks, 0)])
        self.step(old=[(each.request_id, [], len(each.all_token_ids))])

    def fetch(self, each: Any, blocks: list[int]) -> tuple[int, set[int]]:
        """Let a request have what it can from elsewhere; returns for how many tokens it waited, and what failed."""
        tokens, waits = self.plan.matched(each, 0)
        assert tokens is not None
        assert waits == (tokens > 0)
        if not waits:
            return 0, set()
        self.plan.allocated(each, blocks, tokens)
        self.step()
        deadline_s = time.monotonic() + 30
        while each.request_id not in (finished := self.work.finished()):
            assert time.monotonic() < deadline_s, "never fetched"
            time.sleep(0.001)
        failed = self.work.failed()
        self.plan.received(finished, failed)
        return tokens, failed

    def content(self, blocks: Sequence[int]) -> list[int]:
        """The tokens whose KV lies in these blocks."""
        return [int(value) for block in blocks for value in self.cache[block, 0, :, 0]]


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """Two of one layout."""
    pair = Server(), Server()
    yield pair
    for server in pair:
        server.work.close()


IDS = list(range(100, 110))


def test_a_request_fetches_what_another_server_has(servers: tuple[Server, Server]) -> None:
    """All full blocks, into its own; its answer says how much that was; a third fetches them from there."""
    one, two = servers
    one.compute(request("a", IDS), [3, 5, 7])
    each = request("b", IDS, one.address)
    assert two.fetch(each, [1, 2, 4]) == (8, set())
    assert two.content([1, 2]) == IDS[:8]
    two.step(new=[(each, [1, 2, 4], 8)])
    told = two.plan.finished(each)["mell"]
    assert (told["fetched_tokens"], told["fetched_bytes"]) == (8, 2 * SIZE * 8)
    assert told["fetch_us"] > 0
    again = request("c", IDS, two.address)
    assert one.fetch(again, [10, 11, 12]) == (8, set())
    assert one.content([10, 11]) == IDS[:8]


def test_what_is_there_already_is_not_fetched(servers: tuple[Server, Server]) -> None:
    """Only what lies behind the server's own prefix cache."""
    one, two = servers
    one.compute(request("a", IDS), [3, 5, 7])
    each = request("b", IDS, one.address)
    assert two.plan.matched(each, 4) == (4, True)
    assert two.questions == [(one.address, 1)]
    two.plan.allocated(each, [1, 2, 4], 4)
    (load,) = two.plan.step(SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=_nobody())).loads
    assert load.blocks == [2]
    full = request("c", IDS[:8], one.address)
    assert two.plan.matched(full, 8) == (0, False)


def test_an_answer_that_has_not_come_is_waited_for() -> None:
    """The scheduler asks again later; once fetched, a request that starts anew computes what it lost."""
    answer: Future[int] = Future()
    plan = SchedulerHalf(Facts("tcp://127.0.0.1:1", "layout", SIZE, 8), lambda address, digests: answer)
    each = request("a", IDS, "tcp://127.0.0.1:2")
    assert plan.matched(each, 0) == (None, False)
    answer.set_result(2)
    assert plan.matched(each, 0) == (8, True)
    plan.allocated(each, [1, 2, 3], 8)
    assert plan.matched(each, 0) == (0, False)


@pytest.mark.parametrize(
    "each",
    [
        request("a", IDS),
        request("a", IDS, ""),
        request("a", IDS, kv_transfer_params={"mell": "nonsense"}),
        request("a", IDS, kv_transfer_params={"other": {"from": "x"}}),
        request("a", IDS[:3], "tcp://127.0.0.1:9"),
        request("a", IDS, "tcp://127.0.0.1:9", cache_salt="salt"),
        request("a", IDS, "tcp://127.0.0.1:9", lora_request=object()),
        request("a", IDS, "tcp://127.0.0.1:9", mm_features=[object()]),
    ],
    ids=["no word", "empty", "nonsense", "another connector's", "no full block", "salt", "adapter", "picture"],
)
def test_nobody_is_asked_without_need(servers: tuple[Server, Server], each: Any) -> None:
    """Nor for what does not depend on the ids alone, which is not given either."""
    one, two = servers
    assert two.plan.matched(each, 0) == (0, False)
    assert not two.questions
    if not each.kv_transfer_params or "mell" not in each.kv_transfer_params:
        assert two.plan.finished(each) is None
    salted = request("b", IDS, cache_salt="salt")
    one.compute(salted, [3, 5, 7])
    assert two.fetch(request("c", IDS, one.address), [1, 2, 4]) == (0, set())


def test_a_server_tells_of_itself_whoever_asks(servers: tuple[Server, Server]) -> None:
    """With a request of its own, without a word about where KV may be."""
    one, _ = servers
    told = one.plan.finished(request("a", IDS, kv_transfer_params={"mell": {}}))
    facts = {"address": one.address, "layout": "layout", "block_tokens": SIZE, "block_bytes": SIZE * 8}
    assert told == {"mell": facts}


def test_a_server_that_is_gone_costs_nothing_but_time(servers: tuple[Server, Server]) -> None:
    """Asked for the first time: nothing is fetched. Gone in between: its blocks failed, and are computed."""
    one, two = servers
    one.compute(request("a", IDS), [3, 5, 7])
    each = request("b", IDS, one.address)
    assert two.plan.matched(each, 0) == (8, True)
    one.work.close()
    assert two.fetch(each, [1, 2, 4]) == (8, {1, 2})
    assert two.plan.finished(each)["mell"]["fetched_tokens"] == 0
    assert two.fetch(request("c", IDS, one.address), [1, 2, 4]) == (0, set())


def test_blocks_that_were_overwritten_in_between_fail(servers: tuple[Server, Server]) -> None:
    """From the first on: what came before is used."""
    one, two = servers
    one.compute(request("a", IDS), [3, 5, 7])
    each = request("b", IDS, one.address)
    assert two.plan.matched(each, 0) == (8, True)
    one.step(new=[(request("z", range(4)), [5], 0)])
    assert two.fetch(each, [1, 2, 4]) == (8, {2})
    assert two.content([1]) == IDS[:4]
    assert two.plan.finished(each)["mell"]["fetched_tokens"] == 4


def test_ranks_that_fail_before_the_last_is_done_count() -> None:
    """A rank tells of its failures with its own end; what all have is what was fetched."""
    answer: Future[int] = Future()
    answer.set_result(2)
    plan = SchedulerHalf(Facts("tcp://127.0.0.1:1", "layout", SIZE, 8), lambda address, digests: answer)
    each = request("a", IDS, "tcp://127.0.0.1:2")
    assert plan.matched(each, 0) == (8, True)
    plan.allocated(each, [1, 2, 3], 8)
    plan.received(set(), {2, 9})
    plan.received({"a"}, set())
    assert plan.finished(each)["mell"]["fetched_tokens"] == 4


def test_an_empty_cache_gives_nothing_that_was_fetched_before(servers: tuple[Server, Server]) -> None:
    """The weights may have changed since: neither what was there, nor what was on its way."""
    one, two = servers
    one.compute(request("a", IDS), [3, 5, 7])
    each = request("b", IDS, one.address)
    assert two.fetch(each, [1, 2, 4]) == (8, set())
    two.plan.reset()
    two.plan.allocated(each, [1, 2, 4], 0)
    two.step(new=[(each, [1, 2, 4], 8)])
    assert two.plan.finished(each)
    two.step()
    assert one.fetch(request("c", IDS, two.address), [10, 11, 12]) == (0, set())
    one.plan.reset()
    assert one.plan.urgent, "also a server with nothing to do gives nothing any more"
    one.step()
    assert not one.plan.urgent
    assert two.fetch(request("d", IDS, one.address), [10, 11, 12]) == (0, set())


def test_a_request_that_ends_waits_for_nobody() -> None:
    """The question about it is taken back, if nobody has begun to ask it."""
    answer: Future[int] = Future()
    plan = SchedulerHalf(Facts("tcp://127.0.0.1:1", "layout", SIZE, 8), lambda address, digests: answer)
    each = request("a", IDS, "tcp://127.0.0.1:2")
    assert plan.matched(each, 0) == (None, False)
    plan.finished(each)
    assert answer.cancelled()


def test_another_layout_has_nothing_in_common() -> None:
    """Same ids, same block size, another model: not a block."""
    one, other = Server(), Server("another")
    one.compute(request("a", IDS), [3, 5, 7])
    assert other.fetch(request("b", IDS, one.address), [1, 2, 4]) == (0, set())
    for server in (one, other):
        server.work.close()


def test_each_rank_has_a_port() -> None:
    """From the server's on."""
    assert [rank_address("tcp://10.0.0.5:5601", rank) for rank in (0, 3)] == [
        "tcp://10.0.0.5:5601",
        "tcp://10.0.0.5:5604",
    ]


def _nobody() -> Any:
    return SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
