from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.torch_engine import load_torch_engine
from mell_gpu_worker.model_store import pull
from mell_shared.messages.sampling import SamplingParams
from mell_shared.models import default_model_dir
from tests.gpu_worker.engine.driver import Driver, Job
from tests.gpu_worker.engine.reference import Tally, generate

QUESTIONS = ["What is the capital of France?", "Tell me a very short story about a cat and 37 mice.", "2+2?"]
NO_END = SamplingParams(temperature=0, seed=0, min_tokens=8)
"""As the reference's `min_new_tokens`: it may not end early."""


@pytest.mark.connected
def test_the_default_model_answers_as_generate_does(request: pytest.FixtureRequest) -> None:
    """The real model, pulled by the store, mixed and chunked, gives the greedy tokens of `generate` for each alone."""
    folder = pull("smollm2-135m", default_model_dir(), lambda _stage, _fraction: None)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in QUESTIONS
    ]
    engine = load_torch_engine(
        EngineOptions(engine="torch", model="smollm2-135m", model_dir=default_model_dir(), kv_blocks=64, threads=1)
    )
    assert engine.spec.eos_token_ids == (2,)
    jobs = [Job(question, list(ids), len(ids), 8, NO_END) for question, ids in zip(QUESTIONS, prompts, strict=True)]
    Driver(engine, seed=0, most_chunk=40).run(jobs)
    engine.close()
    tally = Tally()
    for job, prompt in zip(jobs, prompts, strict=True):
        tokens, logits = generate(model, prompt, job.max_tokens)
        tally.compare(job.output, tokens, logits)
    tally.check(request.config)
    assert "Paris" in tokenizer.decode(jobs[0].output)
