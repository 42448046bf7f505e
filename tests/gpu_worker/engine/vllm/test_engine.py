"""Sequences at a server that is slow, leaves, comes back, breaks off, and talks nonsense."""

import threading
import time
from typing import Any

import pytest

from mell_gpu_worker.core.step import Fetched, StepResult, StepRow
from mell_gpu_worker.engine.base import EngineAwayError, EngineError
from mell_gpu_worker.engine.vllm.engine import VllmEngine
from mell_shared.messages.sampling import Grammar, SamplingParams
from tests.gpu_worker.engine.looks import Looks, job
from tests.vllm_server import FakeVllm, expected

from .conftest import StartEngine

PROMPT = list(b"Once upon a time")
GREEDY = SamplingParams(temperature=0, seed=0, ignore_eos=True)
OBJECT = '{"grammars": [{"json_schema": {"type": "object", "properties": {}, "additionalProperties": false}}]}'


def test_several_tokens_at_once_are_taken_one_by_one(server: FakeVllm, start_engine: StartEngine) -> None:
    """A server may send more than one in a chunk; each is a step of its own, in order."""
    server.knobs.chunk_tokens = 5
    each = job(PROMPT, GREEDY.model_copy(update={"max_tokens": 23}))
    Looks(start_engine()).run({"s": each}, 23)
    assert (each.output, each.end) == (expected(PROMPT, 23), "length")


def test_a_look_ends_also_without_a_token(server: FakeVllm, start_engine: StartEngine) -> None:
    """Who has none is pending."""
    server.knobs.mute = True
    each, looks = job(PROMPT, GREEDY), Looks(start_engine())
    for _ in range(2):
        looks.step({"s": each})
    assert (looks.pending, each.output) == (2, [])


def test_a_look_ends_when_it_is_woken(
    server: FakeVllm, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under way, or before it has begun: what has happened meanwhile is not kept waiting."""
    monkeypatch.setattr("mell_gpu_worker.engine.vllm.engine._LOOK_S", 60.0)
    server.knobs.mute = True
    engine = start_engine()
    each, looks = job(PROMPT, GREEDY), Looks(engine)
    engine.wake()
    looks.step({"s": each})
    threading.Timer(0.05, engine.wake).start()
    looks.step({"s": each})
    assert (looks.pending, each.output) == (2, [])


def test_who_is_in_no_row_is_ended_at_the_server(server: FakeVllm, start_engine: StartEngine) -> None:
    """Its connection is closed at the next step; the others' are not; `rest` closes all."""
    server.knobs.token_s = 0.01
    engine = start_engine()
    jobs = {name: job(PROMPT, GREEDY) for name in ("one", "two")}
    looks = Looks(engine)
    while not all(each.output for each in jobs.values()):
        looks.step(jobs)  # not `run`, which leaves out who has its token
    assert server.seen.running == 2
    looks.run({"two": jobs["two"]}, 2)
    server.until(lambda: (server.seen.running, server.seen.left) == (1, 1))
    engine.rest()
    server.until(lambda: (server.seen.running, server.seen.left) == (0, 2))
    looks.run(jobs, 6)
    assert jobs["one"].output == jobs["two"].output == expected(PROMPT, 6)


def test_another_sequence_of_the_same_name_begins_anew(server: FakeVllm, start_engine: StartEngine) -> None:
    """As after a newer submission: nothing made for the old one is taken for the new one, however alike they are."""
    looks = Looks(start_engine())
    old, new = job(PROMPT, GREEDY), job(PROMPT, GREEDY, [70, 71, 72])
    looks.run({"s": old}, 3)
    looks.run({"s": new}, 4)
    assert new.output == [70, 71, 72, *expected([*PROMPT, 70, 71, 72], 4)]


@pytest.mark.parametrize("fault", ["cut_after", "end_after"])
def test_an_answer_that_breaks_off_is_asked_for_again(server: FakeVllm, start_engine: StartEngine, fault: str) -> None:
    """From where it was: no token is lost, none comes twice, however often it happens."""
    setattr(server.knobs, fault, 3)
    each = job(PROMPT, GREEDY.model_copy(update={"max_tokens": 20}))
    Looks(start_engine()).run({"s": each}, 20)
    assert (each.output, each.end) == (expected(PROMPT, 20), "length")
    assert [len(body["prompt"]) - len(PROMPT) for body in server.seen.bodies] == [0, 3, 6, 9, 12, 15, 18]


def test_structured_output_that_breaks_off_is_not_begun_anew(server: FakeVllm, start_engine: StartEngine) -> None:
    """The server would write the whole again behind the half that is delivered: the sequence fails instead."""
    server.knobs.cut_after = 1
    each = job(PROMPT, GREEDY.model_copy(update={"grammar": Grammar(text=OBJECT), "ignore_eos": False}))
    looks = Looks(start_engine())
    looks.run({"s": each}, 20)
    assert (bytes(each.output), each.end) == (b"{", None)
    assert "structured output" in each.failure
    resumed = job(PROMPT, each.sampling, each.output)
    looks.run({"resumed": resumed}, 20)
    assert "structured output" in resumed.failure, "as after a preemption"


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"cut_after": 0}, "broke off 5 times"),
        ({"status": 500}, "broke off 5 times"),
        ({"status": 429}, "broke off 5 times"),
        ({"status": 400}, "refused: it is not well"),
        ({"says": "nonsense"}, "no JSON"),
        ({"says": '{"choices": [{"token_ids": [1, -2]}]}'}, "token ids that are none"),
        ({"says": '{"choices": [{"token_ids": [1, 2, 3, 4, 5, 6]}]}'}, "more tokens than were asked for"),
        ({"says": '{"error": {"message": "no", "code": 422}}'}, "refused: no"),
        ({"says": "x" * (1 << 25)}, "a line that does not end"),
    ],
)
def test_what_no_patience_mends_fails_its_sequence(
    server: FakeVllm, start_engine: StartEngine, knobs: dict[str, Any], words: str
) -> None:
    """With words for it, after a bounded number of attempts; the engine serves on."""
    looks = Looks(start_engine())
    each = job(PROMPT, GREEDY.model_copy(update={"max_tokens": 5}))
    before = {name: getattr(server.knobs, name) for name in knobs}
    for name, value in knobs.items():
        setattr(server.knobs, name, value)
    looks.run({"s": each}, 5)
    assert words in each.failure
    assert each.output == []
    for name, value in before.items():
        setattr(server.knobs, name, value)
    good = job(PROMPT, GREEDY)
    looks.run({"s": good}, 3)
    assert good.output == expected(PROMPT, 3)


def test_a_server_that_restarts_finds_its_sequences_again(server: FakeVllm, start_engine: StartEngine) -> None:
    """While it is gone nothing fails; when it is back, everybody goes on from where they were."""
    server.knobs.token_s = 0.005
    engine = start_engine(vllm_away_s=60.0)
    looks = Looks(engine)
    jobs = {name: job([*PROMPT, number], GREEDY) for number, name in enumerate("abc")}
    looks.run(jobs, 5)
    server.stop()
    for _ in range(20):
        looks.step(jobs)
    assert not any(each.failure or each.end for each in jobs.values())
    assert engine.measure().blocks == 256, "as it was: it may be back soon"
    server.restart()
    looks.run(jobs, 40)
    assert [each.output for each in jobs.values()] == [expected([*PROMPT, number], 40) for number in range(3)]


def test_a_server_that_stays_away_is_said_to_be(server: FakeVllm, start_engine: StartEngine) -> None:
    """Unreachable, ill, or without a sign of life in its streams; and it is back when it answers again."""
    engine = start_engine(step_timeout_s=0.2)
    assert engine.measure().used_blocks == 0
    server.knobs.health = 503
    with pytest.raises(EngineAwayError, match="503"):
        engine.measure()
    server.knobs.health = 200
    engine.measure()
    server.stop()
    with pytest.raises(EngineAwayError, match="no answer"):
        engine.measure()
    server.restart()
    engine.measure()
    server.knobs.mute = True
    each, looks = job(PROMPT, GREEDY), Looks(engine)
    looks.step({"s": each})
    server.until(lambda: server.seen.running == 1)
    deadline_s = time.monotonic() + 0.2
    while time.monotonic() <= deadline_s:
        looks.step({"s": each})
    with pytest.raises(EngineAwayError, match="no token"):
        engine.measure()
    engine.rest()
    engine.measure()


def test_a_server_whose_tokens_come_is_there(server: FakeVllm, start_engine: StartEngine) -> None:
    """However slow it is to say so: nobody is sent away from a server that serves."""
    engine = start_engine(vllm_away_s=50.0)
    Looks(engine).run({"s": job(PROMPT, GREEDY)}, 2)
    server.knobs.health = 503
    engine._seen_s -= 100.0
    assert engine.measure().blocks == 256
    engine.rest()
    server.until(lambda: server.seen.running == 0)
    engine._streaming.heard_s -= 100.0
    with pytest.raises(EngineAwayError):
        engine.measure()


def test_a_password_is_not_shown(server: FakeVllm, start_engine: StartEngine) -> None:
    """Neither in status nor in what is wrong."""
    url = server.url.replace("://", "://me:secret@")
    assert start_engine(vllm_url=url).spec.device == server.url.removeprefix("http://")
    with pytest.raises(EngineError) as error:
        start_engine(vllm_url=url, vllm_model="other")
    assert "secret" not in str(error.value)


def test_a_server_that_comes_back_as_another_ends_the_worker(server: FakeVllm, start_engine: StartEngine) -> None:
    """What schedulers and frontends were told of it does not hold any more."""
    engine = start_engine()
    server.knobs.health = 503
    with pytest.raises(EngineAwayError):
        engine.measure()
    server.knobs.health, server.knobs.max_model_len = 200, 99
    with pytest.raises(EngineError, match="start the worker anew"):
        engine.measure()


def test_memory_is_measured(server: FakeVllm, start_engine: StartEngine) -> None:
    """All that is used there, by others too, what waits, and the pace of its tokens."""
    engine = start_engine()
    server.knobs.other_blocks, server.knobs.waiting, server.knobs.token_s = 40, 3, 0.002
    each = job(PROMPT, GREEDY)
    Looks(engine).run({"s": each}, 20)
    least = server.used_blocks
    measured = engine.measure()
    assert measured.waiting == 3
    assert 42 <= least <= measured.used_blocks <= server.used_blocks
    assert measured.step_us >= 2000


LONGER = PROMPT * 4
"""Four of the server's blocks."""


def warm(engine: VllmEngine, count: int, kv_source: str = "") -> StepResult:
    """Let the first `count` tokens of a sequence that may come be prefilled."""
    row = StepRow("s", LONGER, len(LONGER), 0, count, range(4), None, kv_source)
    while (result := engine.execute([row])).pending:
        pass
    return result


def test_prefill_for_who_may_come_warms_the_servers_cache(server: FakeVllm, start_engine: StartEngine) -> None:
    """One token that nobody gets, the row pending until then; whole blocks only, each once."""
    engine = start_engine()
    for count in (10, 20, 25, 40, 63):
        warm(engine, count)
    assert [(len(body["prompt"]), body["max_tokens"]) for body in server.seen.bodies] == [(16, 1), (32, 1), (48, 1)]
    each = job(LONGER, GREEDY)
    Looks(engine).run({"s": each}, 3)
    assert each.output == expected(LONGER, 3)


def test_nothing_is_warmed_without_a_cache(server: FakeVllm, start_engine: StartEngine) -> None:
    """Then the whole sequence is computed when it runs, and a move is not held up."""
    server.knobs.prefix_cache = False
    warm(start_engine(), 40)
    assert server.seen.bodies == []


def test_a_prefill_that_fails_costs_only_time(server: FakeVllm, start_engine: StartEngine) -> None:
    """It counts as done: what is missing is computed when the sequence runs."""
    engine = start_engine()
    server.stop()
    warm(engine, 40)
    server.restart()
    each = job(LONGER, GREEDY)
    Looks(engine).run({"s": each}, 3)
    assert each.output == expected(LONGER, 3)


def test_kv_is_fetched_where_the_source_says(server: FakeVllm, start_engine: StartEngine) -> None:
    """Each block once; what was fetched is said with the look in which it is there, once."""
    server.knobs.kv_address = "tcp://here:5601"
    engine = start_engine()
    assert warm(engine, 40, "tcp://there:5601").fetched == {0: Fetched(32, 32 * 64, 1000)}
    assert warm(engine, 45, "tcp://there:5601").fetched == {}
    assert warm(engine, 63, "tcp://there:5601").fetched == {0: Fetched(48, 48 * 64, 1000)}
    params = {"mell": {"from": "tcp://there:5601"}}
    assert [body.get("kv_transfer_params") for body in server.seen.bodies] == [params, params]


def test_what_was_fetched_is_said_though_more_is_wanted_meanwhile(server: FakeVllm, start_engine: StartEngine) -> None:
    """Of a prefill whose end no look saw, since the sequence has grown: its target goes on from there."""
    server.knobs.kv_address, server.knobs.token_s = "tcp://here:5601", 0.05
    engine = start_engine()

    def look(count: int) -> StepResult:
        engine.wake()
        return engine.execute([StepRow("s", LONGER, len(LONGER), 0, count, range(4), None, "tcp://there:5601")])

    assert look(40).pending
    work = engine._open["s"]
    server.until(lambda: len(server.seen.bodies) == 1 and server.seen.running == 0)
    while not work.ready:
        time.sleep(0.001)
    assert look(45).fetched == {0: Fetched(32, 32 * 64, 1000)}
    assert look(45).fetched == {}


def test_kv_that_cannot_be_fetched_is_computed(server: FakeVllm, start_engine: StartEngine) -> None:
    """Nothing is said of it."""
    server.knobs.kv_address, server.knobs.kv_refused = "tcp://here:5601", True
    assert warm(start_engine(), 40, "tcp://there:5601").fetched == {}
    assert len(server.seen.bodies) == 1
