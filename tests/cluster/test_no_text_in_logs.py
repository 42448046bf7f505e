"""No prompt and no output in any log, at any level: a whole stack in one process, with everything that it logs kept."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.fake import FakeEngine
from mell_shared.codec import encode
from mell_shared.log import configure_logging
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.worker import Submit
from mell_shared.subjects import Subjects
from mell_shared.testing import run_virtually
from tests.cluster.in_process import Client, InProcessStack, in_process_stack
from tests.cluster.test_overload import texts

SECRET = "my pass phrase is correct horse battery staple"
ASK: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": SECRET}],
    "max_tokens": 40,
    "ignore_eos": True,
    "seed": 3,
}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, from the lowest level up, as the services log it."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    configure_logging("debug", "json", service="all", process="all-1", stream=stream)
    yield stream
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = handlers, level


def shapes(text: str) -> list[str]:
    """Return the forms in which a text could stand in a line: itself, escaped, its beginning, its token ids."""
    ids = list(text.encode())
    return [text, json.dumps(text)[1:-1], text[:12], str(ids)[1:40], str(tuple(ids))[1:40], text.encode().hex()[:24]]


def check_silent(log: io.StringIO, *told: str) -> None:
    """Assert that something was logged, and nothing of these texts."""
    lines = log.getvalue()
    assert lines.count("\n") > 5
    for text in told:
        for shape in shapes(text):
            assert shape not in lines


def test_what_is_asked_and_answered_is_not_logged(log: io.StringIO, tmp_path: Path) -> None:
    """Streams, whole answers, tools, stop strings, clients that leave: lines are written, texts are not in them."""

    async def main() -> list[str]:
        async with in_process_stack(tmp_path, step_s=0.1) as stack:
            streamed = texts(await stack.ask({**ASK, "stream": True}))
            whole = await stack.ask({**ASK, "seed": 4, "logprobs": True, "stop": [SECRET]})
            text = json.loads(whole.body)["choices"][0]["message"]["content"]
            await stack.ask({**ASK, "response_format": {"type": "json_object"}, "user": SECRET})
            leaving = Client(stack.app)
            asked = asyncio.create_task(leaving.ask({**ASK, "stream": True}))
            await asyncio.sleep(1.0)
            leaving.left.set()
            await asked
            await asyncio.sleep(3.0)
            return [streamed, text]

    check_silent(log, SECRET, *run_virtually(main()))


@pytest.mark.parametrize(
    "body",
    [
        SECRET.encode(),
        json.dumps({**ASK, "messages": SECRET}).encode(),
        json.dumps({**ASK, "messages": [{"role": SECRET, "content": SECRET}]}).encode(),
        json.dumps({**ASK, "temperature": SECRET}).encode(),
        json.dumps({**ASK, "model": SECRET}).encode(),
        json.dumps({**ASK, "messages": [{"role": "user", "content": SECRET * 200}]}).encode(),
    ],
)
def test_what_is_refused_is_not_logged(log: io.StringIO, tmp_path: Path, body: bytes) -> None:
    """A wrong request is logged by its code alone, though its answer may quote it."""

    async def main() -> None:
        async with in_process_stack(tmp_path, worker={"kv_blocks": 64}) as stack:
            answer = await stack.ask(body)
            assert 400 <= answer.status < 500

    run_virtually(main())
    check_silent(log, SECRET)


def test_what_cannot_be_read_is_not_logged(log: io.StringIO, tmp_path: Path) -> None:
    """Messages that are none, with a prompt in them, are dropped and counted on every subject without a quote."""

    async def main() -> None:
        async with in_process_stack(tmp_path) as stack:
            bus, subjects = stack.broker.connect(), Subjects()
            ids = list(SECRET.encode())
            wrong = Submit(
                sequence="s", generation=1, frontend="f", model="m", prompt_ids=ids, sampling=SamplingParams(seed=1)
            )
            broken = encode(wrong)[:-2]
            for subject in (
                subjects.place,
                subjects.scheduler_events,
                subjects.worker_commands("worker-1"),
                subjects.frontend_tokens("frontend"),
                subjects.frontend_control("frontend"),
            ):
                for data in (broken, encode(wrong), SECRET.encode()):
                    await bus.publish(subject, data, "nobody")
            await asyncio.sleep(1.0)

    run_virtually(main())
    assert "message_dropped" in log.getvalue()
    check_silent(log, SECRET)


def test_what_fails_is_not_logged(log: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that breaks in the middle of a sequence, traceback and all, gives nothing away."""
    run, steps = FakeEngine.execute, 0

    def broken(engine: FakeEngine, rows: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 5:
            raise EngineError("the engine broke")
        return run(engine, rows)

    monkeypatch.setattr(FakeEngine, "execute", broken)

    async def ask(stack: InProcessStack) -> None:
        answer = await stack.ask({**ASK, "stream": True})
        assert b"error" in answer.body

    async def main() -> None:
        async with in_process_stack(tmp_path, step_s=0.1) as stack:
            await ask(stack)

    run_virtually(main())
    check_silent(log, SECRET)
