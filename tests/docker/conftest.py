"""The stack of docker-compose.yml with the fake engine, in a real container engine.

Uses the engine that runs, else starts one of its own, with a base image and wheels made here instead of pulled.
MELL_DOCKER_TEST_CACHE names a folder that keeps those two from one run to the next.
"""

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docker.engine import (
    command,
    compose_command,
    copy_context,
    engine_answers,
    fill_wheelhouse,
    import_base_image,
    own_engine,
)

PROJECT = "mell-docker-test"
_ADMIN_KEY = "of-these-tests"
_HEALTHY_S = 180.0
_IMAGES = ("console", "frontend", "gpu-worker", "scheduler")
_SLOW_ENGINE = """\
services:
  gpu_worker:
    environment: {MELL_FAKE_STEP_US: "10000", MELL_FAKE_KV_BYTES_PER_TOKEN: "4096"}
"""
"""So that a request runs long enough to be moved, and has KV worth moving."""


@dataclass(frozen=True)
class ComposedStack:
    """A stack of containers: where it is defined, the variables that shaped it, where it answers."""

    folder: Path
    environment: dict[str, str]
    url: str

    def compose(self, *arguments: str) -> str:
        """Run a compose command on the stack."""
        return command(*compose_command(), "-p", PROJECT, *arguments, environment=self.environment, folder=self.folder)

    def docker(self, *arguments: str) -> str:
        """Run an engine command."""
        return command("docker", *arguments, environment=self.environment)

    def image(self, service: str) -> str:
        """Return the name of a service's image."""
        return f"{PROJECT}-{service}"

    def mell(self, *arguments: str) -> str:
        """Run `mell` in a container of its own on the stack's inner network, and return what it prints."""
        network, key = f"{PROJECT}_inner", f"MELL_ADMIN_KEY={_ADMIN_KEY}"
        return self.docker("run", "--rm", "--network", network, "--env", key, self.image("console"), *arguments)

    def containers(self) -> dict[str, dict[str, str]]:
        """Return the stack's containers by name, each with what the engine says of its state."""
        names = self.docker("ps", "-a", "--filter", f"name={PROJECT}", "--format", "{{.Names}}").split()
        lines = self.docker("inspect", "--format", "{{json .State}}", *names).splitlines()
        return dict(zip(names, map(json.loads, lines), strict=True))

    def up(self, workers: int) -> None:
        """Start or scale the stack and return when every container is healthy and the scheduler knows the workers."""
        self.compose("up", "-d", "--no-build", "--scale", f"gpu_worker={workers}")
        deadline_s = time.monotonic() + _HEALTHY_S
        while not self._settled(workers):
            assert time.monotonic() < deadline_s, self.compose("ps") + self.compose("logs", "--tail", "20")
            time.sleep(0.5)

    def workers(self) -> list[dict[str, object]]:
        """Return the workers that the scheduler knows, asked through the stack's own network."""
        found: list[dict[str, object]] = json.loads(self.mell("status", "--json"))["workers"]
        return found

    def _settled(self, workers: int) -> bool:
        states = self.containers()
        waiting = [state for name, state in states.items() if "model" not in name and not _healthy(state)]
        return not waiting and len(self.workers()) == workers


def _healthy(state: dict[str, object]) -> bool:
    health = state.get("Health")
    return isinstance(health, dict) and health.get("Status") == "healthy"


@pytest.fixture(scope="session")
def workplace() -> Iterator[Path]:
    """Return a short-lived folder with a short name: a socket's path has few letters."""
    with tempfile.TemporaryDirectory(prefix="mell-docker-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def stack(workplace: Path) -> Iterator[ComposedStack]:
    """Build the images, run the stack with two workers, and remove all of it afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"MELL_ENGINE": "fake", "MELL_MODEL": "fake", "MELL_PUBLISH": address, "MELL_ADMIN_KEY": _ADMIN_KEY}
    settings["COMPOSE_FILE"] = "docker-compose.yml:slow.yml"
    for image in _IMAGES:
        variable = f"MELL_{image.removeprefix('gpu-').upper()}_IMAGE"
        settings[variable] = f"{PROJECT}-{image}"
    if engine_answers():
        yield from _running(ComposedStack(copy_context(workplace / "context", None), settings, f"http://{address}"))
        return
    cache = Path(os.environ.get("MELL_DOCKER_TEST_CACHE") or workplace)
    cache.mkdir(parents=True, exist_ok=True)
    with own_engine(workplace) as host:
        base = import_base_image(host, cache)
        folder = copy_context(workplace / "context", fill_wheelhouse(cache))
        settings.update(DOCKER_HOST=host, MELL_BASE_IMAGE=base, MELL_PIP_NO_INDEX="1")
        yield from _running(ComposedStack(folder, settings, f"http://{address}"))


def _running(made: ComposedStack) -> Iterator[ComposedStack]:
    (made.folder / "slow.yml").write_text(_SLOW_ENGINE)
    made.compose("build")
    try:
        made.up(workers=2)
        yield made
    finally:
        made.compose("down", "--volumes", "--timeout", "20")
        made.docker("rmi", "--force", *(made.image(image) for image in _IMAGES))
