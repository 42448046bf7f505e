"""`mell up` as a real process: what a user sees from the first line to the last, and what is left behind."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import openai
import psutil
import pytest

from mell_shared.nats_server import NatsServer
from tests.console.conftest import alive

pytestmark = pytest.mark.connected
WAIT_S = 60.0


class Up:
    """One running `mell up`, its lines as they come, and every process it ever had."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "mell_console", "up", "--port", "0", *flags]
        own = {"XDG_STATE_HOME": str(folder), "NO_COLOR": "1", "MELL_ENGINE": "fake", **environment}
        self.process = subprocess.Popen(
            command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._folder = str(folder)
        self.lines: list[str] = []
        self.family: dict[int, str] = {}
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def until(self, pattern: str, wait_s: float = WAIT_S) -> re.Match[str]:
        """Return the first further line that `pattern` is found in."""
        deadline_s = time.monotonic() + wait_s
        while (line := self._queue.get(timeout=max(0.01, deadline_s - time.monotonic()))) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line with {pattern!r} before the end of: {self.text}")

    def up(self, wait_s: float = WAIT_S) -> str:
        """Wait until it is up and return its URL."""
        url = self.until(r"Mell answers at (http://\S+)/v1", wait_s)[1]
        self.meet()
        return url

    def meet(self) -> None:
        """Remember the processes it has now."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self.family[child.pid] = " ".join(child.cmdline())

    def child(self, words: str) -> int:
        """Return the process id of the child whose command line holds `words`."""
        return next(pid for pid, command in self.family.items() if words in command)

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit code once it has ended and all is read."""
        code = self.process.wait(WAIT_S)
        self._reader.join()
        return code

    def gone(self) -> bool:
        """Return whether none of its processes is left, waiting for the kernel's signals to arrive."""
        deadline_s = time.monotonic() + WAIT_S
        while any(map(alive, self.family)) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return not any(map(alive, self.family))

    def left(self) -> list[str]:
        """Return the processes that were started for it, whoever's children they are by now, and still run."""
        return [process.name() for process in psutil.process_iter() if self._started(process)]

    def _started(self, process: psutil.Process) -> bool:
        try:
            return alive(process.pid) and process.environ().get("XDG_STATE_HOME") == self._folder
        except psutil.Error:
            return False

    @property
    def text(self) -> str:
        """All that it printed so far."""
        return "\n".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._queue.put(line)
        self._queue.put(None)


Starter = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Return what starts a `mell up`; whatever is left of it at the end is killed."""
    started: list[Up] = []

    def begin(*flags: str, **environment: str) -> Up:
        started.append(Up(tmp_path, *flags, **environment))
        return started[-1]

    yield begin
    for up in started:
        up.process.kill()
        up.wait()
        assert up.process.stdout is not None
        up.process.stdout.close()


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


@pytest.mark.timeout(400)
def test_the_default_model_answers_through_all_services(start: Starter) -> None:
    """What a newcomer gets: the real model behind two workers streams to the official client, right and repeatable."""
    up = start("--workers", "2", "--kv-blocks", "128", MELL_ENGINE="torch")
    url = up.up(wait_s=300)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=WAIT_S) as client:
        ask = partial(client.chat.completions.create, model="smollm2-135m", max_tokens=8, temperature=0)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(messages=question, stream=True))
        assert "Paris" in text
        whole = ask(messages=question)
    assert whole.choices[0].message.content == text
    assert whole.usage.completion_tokens == 8
    assert up.end(signal.SIGINT) == 0
    assert up.gone()


def test_a_stream_that_outlasts_the_stop_is_told_so(start: Starter) -> None:
    """Ctrl-C during a long answer ends the stream with an error, and no service has to be killed for it."""
    # The frontend waits three seconds for an answer that takes fifty.
    up = start("--workers", "1", "--stop-s", "5", MELL_FAKE_STEP_US="50000")
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
