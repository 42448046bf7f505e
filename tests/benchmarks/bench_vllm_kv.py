"""What KV from another vLLM server saves: a prompt computed or fetched, and moves by tokens or by KV, in turn."""

import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mell_shared.models import DEFAULT_MODEL
from tests.benchmarks.figures import print_table, size, spread
from tests.cluster.stack import QUICK, Service, Stack, eventually
from tests.cluster.test_operators import holder, mell
from tests.vllm_process import VllmProcess

pytestmark = [pytest.mark.benchmark, pytest.mark.vllm, pytest.mark.timeout(1800)]

ROUNDS = size("ROUNDS", 5)
PROMPT_TOKENS = size("PROMPT_TOKENS", 1001)
PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, VllmProcess]]:
    """Two with connectors."""
    folder = tmp_path_factory.mktemp
    with VllmProcess(folder("one"), connector=True) as one, VllmProcess(folder("two"), connector=True) as two:
        yield {"one": one, "two": two}


def prompt(seed: int) -> list[int]:
    """Ids that no server has seen."""
    draw = random.Random(seed)
    return [draw.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]


def complete(server: VllmProcess, ids: list[int], source: str = "") -> tuple[float, dict[str, Any]]:
    """Let a server make one token; returns the seconds, and what its connector says."""
    body: dict[str, Any] = {"model": DEFAULT_MODEL, "prompt": ids, "max_tokens": 1, "temperature": 0}
    body["kv_transfer_params"] = {"mell": {"from": source} if source else {}}
    begun_s = time.perf_counter()
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S, trust_env=False)
    took_s = time.perf_counter() - begun_s
    return took_s, answer.json()["kv_transfer_params"]["mell"]


def test_a_prompt_computed_and_fetched(servers: dict[str, VllmProcess]) -> None:
    """The time to one token after a prompt that another server has, or nobody. BENCH_ROUNDS, BENCH_PROMPT_TOKENS."""
    computed: list[float] = []
    fetched: list[float] = []
    rates: list[float] = []
    for turn in range(ROUNDS):
        complete(servers["one"], ids := prompt(turn))
        time.sleep(1)  # the other server's last step is over
        took_s, told = complete(servers["two"], ids, servers["one"].kv_address)
        assert told["fetched_tokens"] > PROMPT_TOKENS / 2
        fetched.append(took_s)
        rates.append(told["fetched_bytes"] / told["fetch_us"])
        computed.append(complete(servers["two"], prompt(1000 + turn))[0])
    ratios = [after / before for before, after in zip(computed, fetched, strict=True)]
    rows = [
        ["computed, s", spread(computed, 2)],
        ["fetched, s", spread(fetched, 2)],
        ["ratio", spread(ratios, 2)],
        ["fetched, MB/s", spread(rates)],
    ]
    print_table(
        f"One token after a prompt of {PROMPT_TOKENS} tokens, {ROUNDS} rounds in turn", ["what", "figure"], rows
    )


@pytest.fixture(scope="module")
def workers(
    servers: dict[str, VllmProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, dict[str, Service]]]:
    """A frontend, and a worker before each server."""
    with Stack(tmp_path_factory.mktemp("stack"), {**QUICK, "MELL_WORKER_SILENCE_S": "10"}) as stack:
        stack.start_scheduler().ready()
        made = stack.start_before({name: server.url for name, server in servers.items()}, DEFAULT_MODEL, PATIENCE_S)
        frontend = stack.start_frontend("--admin-key", "secret", model=DEFAULT_MODEL)
        frontend.ready(PATIENCE_S)
        yield frontend, made


def test_moves_by_tokens_and_by_kv(workers: tuple[Service, dict[str, Service]]) -> None:
    """A stream after a long prompt goes to a server that has nothing of it: how long that takes, how long it stands."""
    frontend, _ = workers
    took: dict[str, list[float]] = {"tokens": [], "kv": []}
    stood: dict[str, list[float]] = {"tokens": [], "kv": []}
    with httpx.Client(base_url=frontend.ready()["url"], timeout=PATIENCE_S, trust_env=False) as client:
        eventually(lambda: client.get("/ready").status_code == 200, "ready")
        for turn in range(2 * ROUNDS):
            mode = ("tokens", "kv", "kv", "tokens")[turn % 4]
            event = _move(client, workers, prompt(5000 + turn), mode)
            took[mode].append((event["prefill_us"] + event["copy_us"]) / 1e6)
            stood[mode].append(event["stopped_us"] / 1e6)
    rows = []
    for name, figures in (("until the target has its KV, s", took), ("it stands still, s", stood)):
        ratios = [kv / tokens for kv, tokens in zip(figures["kv"], figures["tokens"], strict=True)]
        rows.append([name, spread(figures["tokens"], 2), spread(figures["kv"], 2), spread(ratios, 2)])
    title = f"A stream after a prompt of {PROMPT_TOKENS} tokens moves, {ROUNDS} rounds in turn"
    print_table(title, ["what", "by tokens", "by KV", "ratio"], rows)


def _move(
    client: httpx.Client, workers: tuple[Service, dict[str, Service]], ids: list[int], mode: str
) -> dict[str, Any]:
    """Move a stream once; returns the news of it."""
    frontend, made = workers
    body = {"model": DEFAULT_MODEL, "prompt": ids, "temperature": 0, "max_tokens": 900, "stream": True}
    body |= {"ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        first = next(lines)
        for _ in range(3):
            next(lines)
        here, sequence = holder(frontend, first.split('"id":"')[1].split('"')[0])
        (there,) = set(made) - {here}
        before = len(made[there].events("migration_committed"))
        code, moved = mell(frontend, "migrate", sequence, "--to", there, "--mode", mode)
        assert code == 0, moved
        news = eventually(lambda: made[there].events("migration_committed")[before:], "the news of the move")
    eventually(lambda: not any(w["running"] for w in mell(frontend, "status")[1]["workers"]), "it has ended")
    assert news[0]["mode"] == mode
    return news[0]
