"""Moves by KV between engines that fetch it from one another: only ids go between the workers."""

import pytest

from mell_gpu_worker.core.commands import AskPeer, OfferKv, Reply, RunStep
from mell_gpu_worker.core.events import CommandReceived
from mell_shared.messages.worker import KvReserved, ReserveKv
from tests.gpu_worker.core.worlds import BLOCK_TOKENS, CoreWorld, only, submit

from .cluster import FETCHING, WAYS, Cluster
from .test_moves import migrate, reserve

PROMPT = bytes(range(65, 91)) * 3


def world() -> CoreWorld:
    """One worker before such an engine."""
    return CoreWorld(can=FETCHING, migration_modes=("kv", "tokens"), kv_source="tcp://here:5601", max_model_len=64)


@pytest.mark.parametrize(("mode", "told"), [("kv", "tcp://here:5601"), ("tokens", "")])
def test_the_source_says_where_its_engine_gives_kv(mode: str, told: str) -> None:
    """If the move is by KV; by tokens everything is to be computed."""
    source = world()
    source.ask(submit("a", max_tokens=30))
    source.finish_step()
    (question,) = only(AskPeer, source.tell(CommandReceived(migrate(mode=mode), "order")))
    assert isinstance(question.message, ReserveKv)
    assert (question.message.mode, question.message.kv_source) == (mode, told)


def test_the_target_lets_its_engine_have_all_tokens_at_once() -> None:
    """No room is offered to a link; the engine's row says where to look."""
    target = world()
    commands = target.tell(CommandReceived(reserve(kv_source="tcp://there:5601"), "reserve"))
    assert not only(OfferKv, commands)
    (reply,) = only(Reply, commands)
    assert isinstance(reply.message, KvReserved)
    assert reply.message.address == ""
    (step,) = only(RunStep, commands)
    (row,) = step.rows
    assert (row.start, row.count, row.sampling) == (0, len(b"hello, my dear") + 1, None), "all but the last token"
    assert row.kv_source == "tcp://there:5601"


def test_what_was_fetched_is_told_as_copied() -> None:
    """And not as prefilled: schedulers learn the rates of both."""
    mode, workers = WAYS["kv, fetched"]
    cluster = Cluster(**workers)
    cluster.open("a", PROMPT)
    cluster.tokens(5)
    cluster.migrate("a", "w2", mode)
    cluster.finish()
    (told,) = cluster.committed()
    assert told.mode == "kv"
    least = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS
    assert told.copied_bytes >= 10 * least
    assert told.copy_us > 0
    assert told.prefilled_tokens == 0, "what is not a full block is computed when it runs"
