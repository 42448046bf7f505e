"""Two real vLLM servers that have Mell's KV connector: what they give each other, and moves by KV before them."""

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import mell_vllm_connector
from mell_shared.models import DEFAULT_MODEL
from mell_vllm_connector.content import extend_digests, root_digest
from mell_vllm_connector.exchange import count_held, take
from tests.cluster.stack import QUICK, Stack, eventually
from tests.cluster.test_operators import holder, mell
from tests.vllm_process import PYTHON, VllmProcess

from .test_stack import PATIENCE_S, TOKENS, Streamed

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

BLOCKS = 24
"""Of 128 tokens: a few requests fill the servers."""
CHURN_S = 30.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, VllmProcess]]:
    """Two of them."""
    folder = tmp_path_factory.mktemp
    with (
        VllmProcess(folder("one"), connector=True, blocks=BLOCKS) as one,
        VllmProcess(folder("two"), connector=True, blocks=BLOCKS) as two,
    ):
        yield {"one": one, "two": two}


def complete(server: VllmProcess, ids: list[int], tokens: int, source: str | None = None) -> dict[str, Any]:
    """Let a server complete ids, from another's KV if it is said where."""
    body: dict[str, Any] = {"model": DEFAULT_MODEL, "prompt": ids, "max_tokens": tokens, "temperature": 0}
    body |= {"return_token_ids": True, "kv_transfer_params": {"mell": {} if source is None else {"from": source}}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def prompt(seed: int, tokens: int) -> list[int]:
    """Ids like no others."""
    draw = random.Random(seed)
    return [draw.randrange(100, 40_000) for _ in range(tokens)]


def digests(ids: list[int], told: dict[str, Any]) -> list[bytes]:
    """Of the full blocks of these ids, at servers that tell this of themselves."""
    made: list[bytes] = []
    size = told["block_tokens"]
    extend_digests(made, root_digest(told["layout"]), ids, len(ids) // size, size)
    return made


def taken(server: VllmProcess, names: list[bytes], told: dict[str, Any]) -> np.ndarray:
    """The first of these blocks, a row each."""
    return np.concatenate(list(take(server.kv_address, names, told["block_bytes"])))


def test_a_request_goes_on_from_anothers_kv(servers: dict[str, VllmProcess]) -> None:
    """While that one still runs: all full blocks are fetched, and the text is the one that it makes there."""
    one, two = servers["one"], servers["two"]
    ids = prompt(1, 1000)
    there: dict[str, Any] = {}
    running = threading.Thread(target=lambda: there.update(complete(one, ids, 60)))
    running.start()
    told = complete(two, prompt(2, 10), 1)["kv_transfer_params"]["mell"]
    names = digests(ids, told)
    eventually(lambda: count_held(one.kv_address, names) == len(names), "its blocks are full", 60.0)
    assert running.is_alive()
    fetched = complete(two, ids, 1, one.kv_address)["kv_transfer_params"]["mell"]
    here = complete(two, ids, 60)
    running.join()
    assert fetched["fetched_tokens"] == 896
    assert here["choices"][0]["token_ids"] == there["choices"][0]["token_ids"]
    print({name: value for name, value in fetched.items() if name.startswith("fetch")})  # noqa: T201


def test_no_block_is_given_for_another(servers: dict[str, VllmProcess]) -> None:
    """However fast a server's blocks change hands while they are read: what comes is what another server computes."""
    one, two = servers["one"], servers["two"]
    told = complete(two, prompt(2, 10), 1)["kv_transfer_params"]["mell"]
    prompts = [prompt(100 + number, 700) for number in range(6)]
    names = [digests(ids, told) for ids in prompts]
    wanted: list[np.ndarray] = []
    for ids, name in zip(prompts, names, strict=True):
        complete(two, ids, 1)
        wanted.append(taken(two, name, told))
        assert len(wanted[-1]) == len(name)
    stop = threading.Event()

    def churn(seed: int) -> None:
        draw = random.Random(seed)
        while not stop.is_set():
            complete(one, draw.choice(prompts)[: draw.randrange(100, 700)], draw.randrange(1, 4))

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    counts = np.zeros(len(names[0]) + 1, dtype=int)
    end_s = time.monotonic() + CHURN_S
    while time.monotonic() < end_s:
        for name, content in zip(names, wanted, strict=True):
            got = taken(one, name, told)
            counts[len(got)] += 1
            same = content[: len(got)].view(np.float32)
            # Not the same to the last bit: other requests are in the batch.
            assert np.allclose(got.view(np.float32), same, atol=2e-2, rtol=1e-2)
    stop.set()
    for thread in threads:
        thread.join()
    print("takes by blocks given:", counts.tolist())  # noqa: T201
    assert counts[1:].sum() > 20
    assert (counts > 0).sum() > 2, "they changed hands"


def test_after_a_reset_nothing_of_before_is_given(servers: dict[str, VllmProcess]) -> None:
    """Also by a server that has nothing else to do: its weights may be others."""
    one, ids = servers["one"], prompt(3, 700)
    names = digests(ids, complete(one, ids, 1)["kv_transfer_params"]["mell"])
    eventually(lambda: count_held(one.kv_address, names) == len(names), "its blocks are known")
    url = f"{one.url}/reset_prefix_cache?reset_external=true"
    eventually(lambda: httpx.post(url, trust_env=False).json()["success"], "it is reset")
    eventually(lambda: count_held(one.kv_address, names) == 0, "nothing is given")


REFUSALS = """
import sys
from types import SimpleNamespace as S

import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from mell_vllm_connector.connector import _facts

full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)


def facts(*specs, extra=None, parallel=None, **model):
    ranks = dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "world_size"), 1)
    ranks |= {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    known = {"model": "m", "revision": None, "quantization": None, "dtype": torch.float32, "max_model_len": 99}
    config = {"rope": model.pop("rope", 1), "_path": id(model)}
    known |= {"enable_sleep_mode": False, "hf_config": S(to_diff_dict=lambda: config)}
    return _facts(
        S(
            parallel_config=S(**(ranks | (parallel or {}))),
            kv_transfer_config=KVTransferConfig(kv_role="kv_both", kv_connector_extra_config=extra or {}),
            model_config=S(**(known | model)),
            cache_config=S(cache_dtype="auto"),
            attention_config=S(backend=None),
        ),
        S(kv_cache_groups=[S(kv_cache_spec=spec, layer_names=["a", "b"]) for spec in specs], kv_cache_layout="L"),
    )


one = facts(full, extra={"address": "tcp://10.0.0.5:5601"})
assert (one.address, one.block_tokens, one.block_bytes) == ("tcp://10.0.0.5:5601", 16, 2 * full.page_size_bytes)
assert one.layout == facts(full).layout
others = [facts(full, model="n"), facts(full, max_model_len=98), facts(full, rope=2), facts(full, extra={"model": "n"})]
others.append(facts(full, parallel={"tensor_parallel_size": 2}))
assert len({one.layout} | {other.layout for other in others}) == 5, "n is n, whoever says it"
refused = {
    "full attention": lambda: facts(full, full),
    "data parallelism": lambda: facts(full, parallel={"data_parallel_size": 2}),
    "context parallelism": lambda: facts(full, parallel={"decode_context_parallel_size": 2}),
    "sleep": lambda: facts(full, enable_sleep_mode=True),
    "address of MellConnector": lambda: facts(full, extra={"address": "10.0.0.5:5601"}),
    "bind of MellConnector": lambda: facts(full, extra={"bind": "tcp://*"}),
}
for words, ask in refused.items():
    try:
        ask()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
print("all refused")
"""


def test_what_the_connector_does_not_know_is_refused_at_start() -> None:
    """In words that say what to leave out; and servers that differ in what KV depends on have different layouts."""
    path = {"PYTHONPATH": str(Path(mell_vllm_connector.__file__).parent.parent)}
    run = subprocess.run([PYTHON, "-c", REFUSALS], env=os.environ | path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all refused" in run.stdout


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker and a scheduler."""
    with Stack(tmp_path_factory.mktemp("stack"), {**QUICK, "MELL_WORKER_SILENCE_S": "10"}) as stack:
        stack.start_scheduler().ready()
        yield stack


def test_a_stream_moves_by_kv(stack: Stack, servers: dict[str, VllmProcess]) -> None:
    """There and back in mid-stream: the text of a server alone, and next to nothing is computed again."""
    workers = stack.start_before({name: server.url for name, server in servers.items()}, DEFAULT_MODEL, PATIENCE_S)
    frontend = stack.start_frontend("--admin-key", "secret", model=DEFAULT_MODEL)
    url = frontend.ready(PATIENCE_S)["url"]
    with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        eventually(lambda: client.get("/ready").status_code == 200, "ready")
        story = Streamed(client).read()
        chat = Streamed(client)
        chat.read(700)
        here, sequence = holder(frontend, chat.id)
        (there,) = set(workers) - {here}
        for target in (there, here):
            code, moved = mell(frontend, "migrate", sequence, "--to", target, "--mode", "kv")
            assert code == 0, moved
            chat.read(20)
        assert not chat.done, "both moves were made in mid-stream"
        assert chat.read() == story
        assert chat.usage is not None
        assert chat.usage["completion_tokens"] == TOKENS
    for name in (there, here):
        event = workers[name].events("migration_committed")[-1]
        print(f"moved to {name}:", {k: v for k, v in event.items() if k.endswith(("_us", "_tokens", "_bytes"))})  # noqa: T201
        assert event["mode"] == "kv"
    assert workers[there].events("migration_committed")[-1]["copied_bytes"] > 0
