"""`mell up` as a real process: what a user sees from the first line to the last, and what is left behind."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from mell_shared.nats_server import NatsServer
from tests.console.up_process import WAIT_S, Starter, Up

pytestmark = [pytest.mark.connected, pytest.mark.timeout(600)]


def chat(url: str, model: str = "fake") -> str:
    """Return the text of a streamed chat answer of twelve tokens, by the official client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5, timeout=WAIT_S) as client:
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=12,
            seed=1,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_stack_answers_survives_deaths_and_leaves_nothing(start: Starter) -> None:
    """Two workers answer the official client, also after a worker and the broker were killed; SIGINT ends all."""
    up = start("--workers", "2")
    url = up.up()
    first = chat(url)
    assert first
    for step in ("broker: ", "scheduler: ", "worker-1: ", "worker-2: ", "frontend: "):
        assert any(line.startswith(step) and line.endswith(" s)") for line in up.lines), step

    os.kill(up.child("--worker-name worker-1"), signal.SIGKILL)
    up.until(r"worker-1: was killed by SIGKILL .* starting it again")
    up.until(r"worker-1: is ready again")
    up.meet()
    assert chat(url) == first

    os.kill(up.child("nats-server"), signal.SIGKILL)
    up.until(r"nats: is ready again")
    up.meet()
    assert chat(url) == first

    assert up.end(signal.SIGINT) == 0
    assert "everything is stopped" in up.lines[-1]
    assert up.gone()
    assert "Traceback" not in up.text


def test_the_default_model_answers_through_all_services(start: Starter) -> None:
    """What a newcomer gets: the real model behind two workers streams to the official client, right and repeatable."""
    up = start("--workers", "2", "--kv-blocks", "128", MELL_ENGINE="torch")
    url = up.up(wait_s=300)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=WAIT_S) as client:
        ask: Any = partial(client.chat.completions.create, model="smollm2-135m", max_tokens=8, temperature=0)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(messages=question, stream=True))
        assert "Paris" in text
        whole = ask(messages=question)
    assert whole.choices[0].message.content == text
    assert whole.usage.completion_tokens == 8
    assert up.end(signal.SIGINT) == 0
    assert up.gone()


def test_a_stream_that_outlasts_the_stop_is_told_so(start: Starter) -> None:
    """Ctrl-C during a long answer ends the stream with an error, and no service has to be killed for it."""
    # Services give up after two seconds an answer that takes fifty, and then have almost a minute to end.
    up = start("--workers", "1", "--stop-s", "60", MELL_STOP_DEADLINE_S="2", MELL_FAKE_STEP_US="50000")
    url = up.up()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        stream = client.completions.create(
            model="fake", prompt="Hello", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        up.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="stopping"):
            for _chunk in stream:
                pass
    assert up.wait() == 0
    assert "was killed" not in up.text
    assert up.gone()


def test_nothing_survives_a_kill_of_the_command(start: Starter) -> None:
    """A kill -9 of `mell up` takes every service and the broker along."""
    up = start("--workers", "2")
    up.up()
    assert len(up.family) == 5
    up.end(signal.SIGKILL)
    assert up.gone()


def test_several_models_and_an_outside_broker(start: Starter, tmp_path: Path) -> None:
    """Workers are divided among models, each under its public name; MELL_NATS_URL is used instead of a broker."""
    with NatsServer(tmp_path / "outside") as outside:
        up = start("--model", "fake,fake", "--served-model-name", "left,right", MELL_NATS_URL=outside.url)
        url = up.up()
        assert chat(url, "left")
        assert chat(url, "right")
        assert not any("nats-server" in command for command in up.family.values())
        assert up.end(signal.SIGTERM) == 0
    assert up.gone()


def test_an_interrupt_while_starting_stops_what_has_started(start: Starter) -> None:
    """Ctrl-C before the stack is up ends it with code 130."""
    up = start()
    up.until(r"^broker: ")
    up.meet()
    assert up.end(signal.SIGINT) == 130
    assert up.gone()


def fails(up: Up, words: str) -> None:
    """Assert that it ends with code 1, one line with `words`, and nothing left."""
    assert up.wait() == 1
    told = [line for line in up.lines if line.startswith("mell: ")]
    assert len(told) == 1, up.text
    assert words in told[0]
    assert "Traceback" not in up.text
    assert up.left() == []


def test_a_taken_port_is_one_line(start: Starter) -> None:
    """A second stack on the same port says what to do."""
    up = start()
    port = up.up().rpartition(":")[2]
    other = start("--port", port)
    assert other.wait() == 1
    assert other.lines == [
        f"mell: port {port} on 127.0.0.1 is taken: stop what listens there, or use --port 0 for a free one"
    ]
    assert up.end(signal.SIGINT) == 0


def test_an_unreachable_outside_broker_is_one_line(start: Starter) -> None:
    """MELL_NATS_URL that nobody answers at ends the start."""
    fails(start(MELL_NATS_URL="nats://127.0.0.1:1"), "127.0.0.1:1")


def test_a_missing_model_is_one_line(start: Starter) -> None:
    """A model that is not there says how to get it, and stops what had started."""
    fails(start("--engine", "torch", "--model", "no-such-model"), "no-such-model")


def test_a_service_that_cannot_start_is_one_line_with_its_reason(start: Starter) -> None:
    """A worker that refuses its settings is named with its own last words."""
    fails(start(MELL_BLOCK_TOKENS="100000"), "worker-")


def test_a_plan_that_does_not_fit_is_one_line(start: Starter) -> None:
    """More models than workers is refused before anything starts."""
    fails(start("--model", "a,b,c", "--workers", "2"), "--workers 3")


def test_a_range_of_workers_for_several_models_is_one_line(start: Starter) -> None:
    """One scaler scales one model; nothing is started."""
    fails(start("--model", "a,b", "--workers", "2..4", "--engine", "torch"), "is for one model, but there are 2")


def test_a_range_of_workers_for_servers_that_run_already_is_one_line(start: Starter) -> None:
    """Each vLLM server has its worker."""
    fails(
        start("--workers", "1..2", "--vllm-url", "http://127.0.0.1:1", MELL_ENGINE="vllm"), "vLLM servers run already"
    )
