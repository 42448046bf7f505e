"""Mell's real processes for a test: a broker, a scheduler, workers with the fake engine, a frontend."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from mell_shared.nats_server import NatsServer
from mell_shared.process import death_with_parent

_PATIENCE_S = 60.0
"""Only ends a test that has failed."""

QUICK = {
    "MELL_LOG_FORMAT": "json",
    "MELL_REPORT_INTERVAL_S": "0.2",
    "MELL_STATUS_INTERVAL_S": "0.2",
    "MELL_PROFILE_S": "0",
    # On a busy machine a process that is well may say nothing for seconds: it must not be taken for dead.
    "MELL_WORKER_SILENCE_S": "60",
    "MELL_PLACE_DEADLINE_S": "60",
    "MELL_WORKER_GRACE_S": "10",
}
LOSING = QUICK | {"MELL_WORKER_SILENCE_S": "5"}
"""For tests that kill workers; as users have it."""


def eventually(condition: Callable[[], Any], what: str | Callable[[], str], patience_s: float = _PATIENCE_S) -> Any:
    """Return the first true value of `condition`; `what` may be asked at the end, to tell how things stand then."""
    deadline_s = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"never happened: {what if isinstance(what, str) else what()}"
        time.sleep(0.02)
    return value


class Service:
    """One process of Mell, with its log."""

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.module = module
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=death_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one system call, allocates nothing
            )

    def lines(self) -> list[str]:
        """Return all that it wrote, by line."""
        # As far as they are whole: it may be writing the last one.
        return self._log.read_text(errors="replace").rpartition("\n")[0].splitlines()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of that name that it has logged."""
        lines = [line for line in self.lines() if line.startswith("{") and line.endswith("}")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def ready(self, patience_s: float = _PATIENCE_S) -> dict[str, Any]:
        """Wait for its `ready` event and return it."""
        events = eventually(
            lambda: self.events("ready") or self.process.poll() is not None,
            lambda: f"ready in {self._log.read_text()}",
            patience_s,
        )
        assert isinstance(events, list), f"it ended: {self._log.read_text()}"
        return dict(events[0])

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self.process.kill()
        self.process.wait()

    def exit_code(self) -> int:
        """Wait for its end."""
        return self.process.wait(_PATIENCE_S)


class Stack:
    """The processes of one test with these `MELL_` settings; all are gone when the context is left."""

    def __init__(self, folder: Path, settings: Mapping[str, str] = MappingProxyType(QUICK), access: str = "") -> None:
        self._folder = folder
        self._settings = dict(settings)
        self._services: list[Service] = []
        self._users: dict[str, str] = {}
        self.broker_folder = folder / "nats"
        self.broker = NatsServer(self.broker_folder, access=access)

    def __enter__(self) -> "Stack":
        self.broker.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill(*self._services)
        self.broker.kill()

    def kill(self, *services: Service) -> None:
        """End processes as a crash does."""
        for service in services:
            service.kill()

    def log_in(self, module: str, user: str) -> None:
        """Let the processes of a module connect as `user` (`name:password`) from now on."""
        self._users[module] = user

    def start(self, module: str, *arguments: str) -> Service:
        """Start one more process."""
        user = self._users.get(module)
        url = f"nats://{user}@{self.broker.address}" if user else self.broker.url
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MELL_")}
        environment |= self._settings | {"MELL_NATS_URL": url}
        log = self._folder / f"{len(self._services)}-{module}.log"
        service = Service(module, list(arguments), environment, log)
        self._services.append(service)
        return service

    def start_scheduler(self, *flags: str) -> Service:
        """Start a scheduler, which expects reports less often than they come: it shuns a worker that misses three."""
        return self.start("mell_scheduler", "--report-interval-s", "1", *flags)

    def start_worker(self, name: str, *flags: str, step_us: int = 10_000, kv_blocks: int = 256) -> Service:
        """Start a worker whose steps take `step_us`."""
        limits = ["--max-model-len", "4096", "--kv-blocks", str(kv_blocks), "--fake-step-us", str(step_us)]
        return self.start("mell_gpu_worker", "--engine", "fake", "--worker-name", name, *limits, *flags)

    def start_before(self, urls: Mapping[str, str], model: str, patience_s: float) -> dict[str, Service]:
        """Start a worker of its name before the vLLM server at each of `urls`; return them once they are ready."""
        flags = ("--engine", "vllm", "--model", model)
        workers = {
            name: self.start("mell_gpu_worker", *flags, "--vllm-url", url, "--worker-name", name)
            for name, url in urls.items()
        }
        for worker in workers.values():
            worker.ready(patience_s)
        return workers

    def start_frontend(self, *flags: str, model: str = "fake") -> Service:
        """Start a frontend on a free port."""
        return self.start("mell_frontend", "--models", model, "--port", "0", *flags)

    def client(self, frontend: Service) -> httpx.Client:
        """Return a client of a frontend that is ready."""
        return httpx.Client(base_url=frontend.ready()["url"], timeout=_PATIENCE_S, trust_env=False)


def chat(max_tokens: int, **more: Any) -> dict[str, Any]:
    """Return the body of a chat request whose text depends on nothing but itself."""
    messages = [{"role": "user", "content": "Tell me a story."}]
    return {
        "model": "fake",
        "messages": messages,
        "seed": 7,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        **more,
    }


def whole_text(client: httpx.Client, max_tokens: int) -> str:
    """Return the text of an undisturbed answer."""
    response = client.post("/v1/chat/completions", json=chat(max_tokens))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


class StreamedChat:
    """One streamed answer, read chunk by chunk."""

    def __init__(self, client: httpx.Client, max_tokens: int, **more: Any) -> None:
        body = chat(max_tokens, stream=True, **more)
        self._request = client.build_request("POST", "/v1/chat/completions", json=body)
        self._response = client.send(self._request, stream=True)
        assert self._response.status_code == 200, self._response.read()
        self._lines = self._response.iter_lines()
        self.id = ""
        """The answer's, from its first chunk on."""
        self.text = ""
        self.finish_reason: str | None = None
        self.done = False

    def read(self, characters: int | None = None) -> str:
        """Read until the text has that many characters, or to the end; returns all text so far."""
        while not self.done and (characters is None or len(self.text) < characters):
            self._take(next(self._lines))
        return self.text

    def read_error(self) -> dict[str, Any]:
        """Read until the stream says that it failed; returns the error."""
        while True:
            line = next(self._lines)
            if line.startswith("data: ") and "error" in (chunk := json.loads(line.removeprefix("data: "))):
                return dict(chunk["error"])

    def leave(self) -> None:
        """Close the connection."""
        self._response.close()

    def _take(self, line: str) -> None:
        if not line.startswith("data: "):
            assert not line or line.startswith(":"), f"not an event: {line}"
            return
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        assert "error" not in chunk, chunk
        self.id = chunk["id"]
        for choice in chunk["choices"]:
            self.text += choice["delta"].get("content") or ""
            self.finish_reason = choice["finish_reason"] or self.finish_reason
