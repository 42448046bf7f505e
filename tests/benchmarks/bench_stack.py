from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest

from mell_gpu_worker.model_store import pull
from mell_shared.models import default_model_dir
from tests.benchmarks.figures import memory_read_gb_per_s, print_table, size, spread, verdict
from tests.benchmarks.processes import CLIENT, FAKE, SERVICES, BareEngine, MeasuredStack, Round

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]

MODEL = "smollm2-135m"
ROUNDS = size("ROUNDS", 5)


def test_stack_against_bare_engine(tmp_path: Path) -> None:
    """The same batches by the stack and by the engine alone, in turn: tokens per second and CPU time of each process.

    BENCH_ROUNDS, BENCH_STREAMS, BENCH_PROMPT_TOKENS, BENCH_OUTPUT_TOKENS.
    """
    streams, output_tokens = size("STREAMS", 16), size("OUTPUT_TOKENS", 48)
    prompt_tokens = size("PROMPT_TOKENS", 64)
    engine = ("--model", MODEL, "--threads", "1", "--kv-blocks", "512")
    # Plain completions: a chat template's beginning would come from the prefix cache, which the bare loop has not.
    shape = {"endpoint": "completions", "concurrency": streams, "requests": streams, "prompt_tokens": prompt_tokens}
    pull(MODEL, default_model_dir(), lambda _stage, _fraction: None)
    rounds, bare, memory = [], [], []
    with MeasuredStack(tmp_path, MODEL, *engine[2:]) as stack, BareEngine(*engine) as alone:
        lengths = stack.load(**shape, output_tokens=4, seed=1000).prompt_tokens
        alone.run(lengths, 4)
        for number in range(ROUNDS):
            memory.append(memory_read_gb_per_s())
            if number % 2:
                bare.append(alone.run(lengths, output_tokens))
            rounds.append(stack.load(**shape, output_tokens=output_tokens, seed=number))
            if not number % 2:
                bare.append(alone.run(lengths, output_tokens))
    rates = [run["tokens"] / run["wall_s"] for run in bare]
    ratios = [run.tokens_per_s / rate for run, rate in zip(rounds, rates, strict=True)]
    bare_ms = [run["cpu_s"] / run["tokens"] * 1e3 for run in bare]
    rows = [[name, spread([run.us_per_token(name) / 1e3 for run in rounds], 3)] for name in (*SERVICES, CLIENT)]
    rows += [
        ["bare engine loop", spread(bare_ms, 3)],
        ["services / bare engine, same rounds", spread(_cpu_ratios(rounds, bare_ms), 3)],
    ]
    title = f"{MODEL}, {streams} streams, about {prompt_tokens} + {output_tokens} tokens, {ROUNDS} rounds in turn"
    print_table(title, ["process", "CPU ms per output token"], rows)
    print_table(
        "Tokens per second",
        ["figure", "median (range)"],
        [
            ["stack", spread([run.tokens_per_s for run in rounds], 1)],
            ["bare engine loop", spread(rates, 1)],
            ["stack / bare", f"{spread(ratios, 3)}; {verdict(ratios, 0.95)}"],
            ["memory read, GB/s", spread(memory, 1)],
        ],
    )


def _cpu_ratios(rounds: Sequence[Round], bare_ms: Sequence[float]) -> list[float]:
    all_ms = [sum(run.us_per_token(name) for name in SERVICES) / 1e3 for run in rounds]
    return [services / alone for services, alone in zip(all_ms, bare_ms, strict=True)]


def test_fake_engine_throughput(tmp_path: Path) -> None:
    """What the stack costs when the engine costs next to nothing: tokens per second, TTFT, and where the time goes.

    BENCH_ROUNDS, BENCH_STREAMS, BENCH_OUTPUT_TOKENS.
    """
    streams, output_tokens = size("STREAMS", 200), size("OUTPUT_TOKENS", 256)
    memory, busy, single, paced = [], [], [], []
    with MeasuredStack(tmp_path, "fake", *FAKE) as stack:
        stack.load(concurrency=streams, requests=streams, output_tokens=32, prompt_tokens=32, seed=1000)
        for seed in range(ROUNDS):
            memory.append(memory_read_gb_per_s())
            requests = {"prompt_tokens": 32, "seed": seed}
            busy.append(stack.load(concurrency=streams, requests=2 * streams, output_tokens=output_tokens, **requests))
            single.append(stack.load(concurrency=1, requests=50, output_tokens=1, **requests))
            paced.append(stack.load(rate=50, requests=100, output_tokens=64, **requests))
    title = f"Fake engine without latency, {streams} streams of {output_tokens} tokens, {ROUNDS} rounds"
    print_table(
        title,
        ["process", "CPU us per output token", "cores used"],
        [
            [
                name,
                spread([run.us_per_token(name) for run in busy], 1),
                spread([run.cores(name) for run in busy], 2),
            ]
            for name in (*SERVICES, CLIENT)
        ],
    )
    print_table(
        "Tokens per second to the clients",
        ["figure", "median (range)"],
        [
            ["output tokens per second", spread([run.tokens_per_s for run in busy])],
            ["tokens in one SSE event", spread([run.tokens / run.pieces for run in busy], 2)],
            ["memory read, GB/s", spread(memory, 1)],
        ],
    )
    loads = {
        "one request at a time": single,
        "50 requests started per second, 64 tokens each": paced,
        f"{streams} streams, all cores busy": busy,
    }
    print_table(
        "Added time to first token, ms",
        ["load", "p50", "p99"],
        [
            [name, *(spread([run.report["ttft_ms"][point] for run in runs], 1) for point in ("p50", "p99"))]
            for name, runs in loads.items()
        ],
    )


def test_memory(tmp_path: Path) -> None:
    """Resident memory of each service: idle, the most under load, and after ever more requests.

    Ended sequences are remembered for a minute, so that memory is flat only after the first minute. BENCH_REQUESTS,
    BENCH_RATE (requests per second).
    """
    requests, rate = size("REQUESTS", 10_000), size("RATE", 100)
    marks = [requests // 5, requests * 3 // 5, requests]
    columns: dict[str, dict[str, float]] = {}
    peaks = dict.fromkeys(SERVICES, 0.0)
    ended = count(1)

    def tell(_began: int, done: int) -> None:
        if done and (number := next(ended)) % 50 == 0:
            now = stack.memory_mb()
            peaks.update({name: max(peaks[name], now[name]) for name in SERVICES})
            if number in marks:
                columns[f"after {number:,}"] = now

    with MeasuredStack(tmp_path, "fake", *FAKE) as stack:
        columns["idle"] = stack.memory_mb()
        run = stack.load(tell=tell, rate=rate, requests=requests, output_tokens=16, prompt_tokens=32)
    columns = {"idle": columns.pop("idle"), "most under load": peaks, **columns}
    print_table(
        f"Resident memory, MB; {requests:,} requests of 32 + 16 tokens, {run.report['requests_per_s']:.0f} per second",
        ["service", *columns],
        [[name, *(f"{column[name]:.1f}" for column in columns.values())] for name in SERVICES],
    )
