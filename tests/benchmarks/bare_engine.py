"""The engine alone, in a process of its own: the plainest loop around `execute` that continuous batching allows.

Reads one JSON object a line, runs that batch, answers with one: what the stack is compared with.
"""

import json
import sys
import time
from collections.abc import Iterator
from random import Random

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.base import Engine
from mell_gpu_worker.engine.factory import make_engine
from mell_gpu_worker.settings import WorkerSettings
from mell_shared.log import configure_logging
from mell_shared.messages.sampling import SamplingParams


def main(arguments: list[str]) -> None:
    """Serve batches with the engine that a worker with these flags would have."""
    settings = WorkerSettings.from_command_line(arguments)
    # Standard output is for answers.
    configure_logging(settings.log_level, settings.log_format, service="bare-engine", process="", stream=sys.stderr)
    engine = make_engine(settings.engine_options)
    print(json.dumps({"ready": engine.spec.name}), flush=True)  # noqa: T201 - this is the answer
    for line in sys.stdin:
        batch = json.loads(line)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        tokens = run(engine, settings.max_step_tokens, batch["prompt_tokens"], batch["output_tokens"])
        used = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
        print(json.dumps({"tokens": tokens, **used}), flush=True)  # noqa: T201 - this is the answer


def run(engine: Engine, max_step_tokens: int, prompt_tokens: list[int], output_tokens: int) -> int:
    """Prefill prompts of these lengths, decode greedily; return the number of output tokens."""
    random = Random(len(prompt_tokens))
    texts = [[random.randrange(engine.spec.vocab_size) for _ in range(length)] for length in prompt_tokens]
    tables = list(_tables(prompt_tokens, output_tokens, engine.spec.block_tokens))
    sampling = SamplingParams(seed=1, temperature=0.0, ignore_eos=True)

    def step(rows: list[int], starts: list[int]) -> None:
        result = engine.execute(
            tuple(
                StepRow(
                    sequence=str(row),
                    token_ids=texts[row],
                    prompt_tokens=prompt_tokens[row],
                    start=start,
                    count=len(texts[row]) - start,
                    block_table=tables[row],
                    sampling=sampling,
                )
                for row, start in zip(rows, starts, strict=True)
            )
        )
        for row, sampled in zip(rows, result.sampled, strict=True):
            assert sampled is not None, result.failed
            texts[row].append(sampled.token_id)

    for rows in _prefills(prompt_tokens, max_step_tokens):
        step(rows, [0] * len(rows))
    everyone = list(range(len(texts)))
    for _ in range(output_tokens - 1):
        step(everyone, [len(text) - 1 for text in texts])
    return output_tokens * len(texts)


def _tables(prompt_tokens: list[int], output_tokens: int, block_tokens: int) -> Iterator[list[int]]:
    first = 0
    for length in prompt_tokens:
        blocks = -(-(length + output_tokens) // block_tokens)
        yield list(range(first, first + blocks))
        first += blocks


def _prefills(prompt_tokens: list[int], max_step_tokens: int) -> Iterator[list[int]]:
    """Yield the prompts that one step takes, as many as its budget has room for."""
    rows: list[int] = []
    for row, length in enumerate(prompt_tokens):
        if rows and sum(prompt_tokens[other] for other in rows) + length > max_step_tokens:
            yield rows
            rows = []
        rows.append(row)
    yield rows


if __name__ == "__main__":
    main(sys.argv[1:])
