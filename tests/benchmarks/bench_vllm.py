"""What Mell costs before a vLLM server: the same load on the server itself and through a worker before it, in turn."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mell_console.bench.settings import BenchSettings
from mell_shared.models import DEFAULT_MODEL
from tests.benchmarks.figures import print_table, size, spread
from tests.benchmarks.processes import SERVICES, MeasuredStack, Round, run_load
from tests.vllm_process import VllmProcess

pytestmark = [pytest.mark.benchmark, pytest.mark.vllm, pytest.mark.timeout(1800)]

ROUNDS = size("ROUNDS", 5)


def test_before_a_server(tmp_path: Path, real_vllm: VllmProcess) -> None:
    """Tokens per second and latencies of both, with one stream and with some; CPU time of Mell's own processes.

    BENCH_ROUNDS, BENCH_STREAMS, BENCH_PROMPT_TOKENS, BENCH_OUTPUT_TOKENS.
    """
    shape = {"prompt_tokens": size("PROMPT_TOKENS", 64), "output_tokens": size("OUTPUT_TOKENS", 64)}
    before = ("--engine", "vllm", "--vllm-url", real_vllm.url)
    with MeasuredStack(tmp_path, DEFAULT_MODEL, *before) as stack:
        for streams in dict.fromkeys((1, size("STREAMS", 8))):
            load = {**shape, "concurrency": streams, "requests": max(2, streams)}
            direct: list[Round] = []
            through: list[Round] = []
            # A prompt of its own for each, which the server has not cached.
            for turn in range(2 * ROUNDS):
                if turn % 4 in (0, 3):
                    bare = BenchSettings(url=real_vllm.url, model=DEFAULT_MODEL, **load, seed=turn)
                    direct.append(run_load(bare, dict))
                else:
                    through.append(stack.load(**load, seed=turn))
            _print(f"{streams} streams of {load['prompt_tokens']} + {load['output_tokens']} tokens", direct, through)


def _print(title: str, direct: list[Round], through: list[Round]) -> None:
    figures: list[tuple[str, Callable[[Round], float]]] = [
        ("tokens/s", lambda run: run.tokens_per_s),
        ("TTFT p50, ms", lambda run: run.report["ttft_ms"]["p50"]),
        ("inter-token p50, ms", lambda run: run.report["inter_token_ms"]["p50"]),
    ]
    rows = []
    for name, figure in figures:
        here, there = [figure(run) for run in direct], [figure(run) for run in through]
        ratios = [mell / bare for mell, bare in zip(there, here, strict=True)]
        rows.append([name, spread(here, 1), spread(there, 1), spread(ratios, 2)])
    print_table(f"{title}, {ROUNDS} rounds in turn", ["figure", "vLLM alone", "through Mell", "ratio"], rows)
    used = [[name, spread([run.us_per_token(name) / 1e3 for run in through], 2)] for name in SERVICES]
    print_table("CPU time of Mell", ["process", "ms per output token"], used)
