"""vLLM's own engine as a peer in a benchmark: run by the Python of its environment, one JSON object a line in and out.

The first line it writes says that it is ready. A job names prompts (token ids) and how many tokens to decode for each;
its answer gives the seconds, wall and CPU of all threads, of the prefill of all prompts and of that many steps in which
all of them were decoding. Nothing is kept between jobs: there is no prefix cache.
"""

import json
import os
import sys
import time
from typing import Any

# In this process, so that it does nothing at all between two jobs.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def load(model: str, threads: int) -> Any:
    """Return vLLM's engine with the weights in float32."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}" if threads > 1 else "0")
    from vllm import LLM

    settings = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32, "disable_log_stats": True}
    return LLM(model, enable_prefix_caching=False, **settings).llm_engine


def work(engine: Any, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Prefill `prompts`, decode `tokens` for each, drop them; return what both took."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=500)
    made = dict.fromkeys((str(number) for number in range(len(prompts))), 0)
    began = time.perf_counter(), time.process_time()
    for name, ids in zip(made, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, params)
    while not all(made.values()):
        step(engine, made)
    prefilled = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        before = dict(made)
        step(engine, made)
        assert all(made[name] == before[name] + 1 for name in made), "not a step of all rows"
    decoded = time.perf_counter(), time.process_time()
    engine.abort_request(list(made))
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "prefill_wall_s": prefilled[0] - began[0],
        "prefill_cpu_s": prefilled[1] - began[1],
        "decode_wall_s": decoded[0] - prefilled[0],
        "decode_cpu_s": decoded[1] - prefilled[1],
    }


def step(engine: Any, made: dict[str, int]) -> None:
    """Let the engine take one step; note how many tokens each request has."""
    for output in engine.step():
        made[output.request_id] = len(output.outputs[0].token_ids)


def main(model: str, threads: int) -> None:
    """Answer jobs until there are no more."""
    # What vLLM and its libraries print goes beside the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = load(model, threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(engine, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
