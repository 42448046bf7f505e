import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.driver import Driver, Job
from tests.gpu_worker.engine.families import FAMILIES, VOCAB
from tests.gpu_worker.engine.reference import Tally, generate

REQUESTS = 9


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts over all families; told and checked at the end."""
    counts = Tally()
    yield counts
    counts.check(request.config)


def _jobs(seed: int) -> list[Job]:
    """Return requests of unequal lengths, a third of which begin alike."""
    draw = random.Random(seed)
    prefix = [draw.randrange(VOCAB) for _ in range(21)]
    jobs = []
    for number in range(REQUESTS):
        own = [draw.randrange(VOCAB) for _ in range(draw.choice([1, 3, 9, 30, 47]))]
        prompt = prefix + own if number % 3 else own
        jobs.append(Job(f"job-{number}", list(prompt), len(prompt), max_tokens=draw.randint(8, 30)))
    return jobs


@pytest.mark.parametrize("block_tokens", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_of_any_mix_equals_generate_alone(
    family: str,
    block_tokens: int,
    tiny_models: Callable[[str], tuple[Path, Any]],
    make_engine: MakeEngine,
    tally: Tally,
) -> None:
    """Ragged and chunked prefill, shared prefixes and preemption give the tokens of `generate` for each alone."""
    folder, model = tiny_models(family)
    driver = Driver(make_engine(folder, block_tokens=block_tokens, kv_blocks=800 // block_tokens), seed=block_tokens)
    jobs = _jobs(block_tokens)
    driver.run(jobs)
    assert driver.preemptions
    assert driver.prefix_hits
    for job in jobs:
        tokens, logits = generate(model, job.ids[: job.prompt_tokens], job.max_tokens)
        tally.compare(job.output, tokens, logits)
