"""A stack of real processes under streaming clients, for faults: who is where, what is ordered, what is struck."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.faults.crowd import STORIES, TOKENS, Crowd, ask_for
from tests.cluster.faults.rows import FIGURES
from tests.cluster.faults.struck_worker import STRUCK
from tests.cluster.stack import QUICK, Service, Stack, chat, eventually
from tests.processes import stands_still

STEP_US = 20_000
_FLAGS = ("--fake-kv-bytes-per-token", "4096", "--chunk-bytes", "65536", "--lane-probes", "0", "--transport", "tcp")
_PATIENT = {"MELL_PLACE_DEADLINE_S": "60", "MELL_WORKER_GRACE_S": "60"}
"""A process that starts in the place of one that is gone may take its time on a busy machine."""
_FIGURES = {"MELL_LOG_FORMAT": "json", "MELL_PROFILE_S": "0"} | _PATIENT
"""Settings as users have them, for figures; tests take quicker ones."""
_QUICK = QUICK | {"MELL_WORKER_SILENCE_S": "1.5", "MELL_FRONTEND_SILENCE_S": "3"} | _PATIENT
"""Whoever is taken for dead by mistake costs work here, no text."""


class Scene:
    """A broker, and what a test starts on it; gone when the context is left."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.stack = Stack(folder, _FIGURES if FIGURES else _QUICK | settings)
        self.stories: list[str] = []
        self.well: list[Service] = []
        """Workers that nothing happens to unasked."""
        self.schedulers: list[Service] = []
        self.frontend: Service | None = None

    def __enter__(self) -> "Scene":
        self.stack.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stack.__exit__(*exc_info)

    # --- processes

    def serve(self, *services: Service) -> None:
        """Start a frontend beside these, and let every story be told while nothing is wrong."""
        self.frontend = self.stack.start_frontend()
        for service in services:
            service.ready()
        with self.stack.client(self.frontend) as client, ThreadPoolExecutor(STORIES) as pool:

            def tell(story: int) -> str:
                answer = client.post("/v1/chat/completions", json=chat(TOKENS, **ask_for(story))).raise_for_status()
                return str(answer.json()["choices"][0]["message"]["content"])

            self.stories = list(pool.map(tell, range(STORIES)))
        assert len(set(self.stories)) == STORIES
        assert {len(story) for story in self.stories} == {TOKENS}

    def worker(self, name: str, *flags: str) -> Service:
        """Start a worker."""
        return self.stack.start_worker(name, *_FLAGS, *flags, step_us=STEP_US, kv_blocks=1024)

    def victim(self, point: str, number: str) -> Service:
        """Start a worker that will be struck."""
        flags = ["--max-model-len", "4096", "--kv-blocks", "1024", "--fake-step-us", str(STEP_US)]
        module = "tests.cluster.faults.struck_worker"
        return self.stack.start(module, point, number, "--engine", "fake", "--worker-name", "victim", *flags, *_FLAGS)

    @staticmethod
    def stop(*services: Service) -> None:
        """Let services leave in order."""
        for service in services:
            service.ask_to_stop()
        for service in services:
            assert service.exit_code() == 0, service.lines()[-5:]

    def crowd(self, clients: int = STORIES, frontend: Service | None = None) -> Crowd:
        """Return clients of a frontend, not begun yet."""
        return Crowd((frontend or self._frontend()).ready()["url"], self.stories, clients)

    def _frontend(self) -> Service:
        assert self.frontend is not None, "the scene serves"
        return self.frontend

    # --- what operators see and do

    def admin(self, method: str, path: str, **body: Any) -> httpx.Response:
        """Ask a frontend's `/admin`."""
        url = self._frontend().ready()["url"]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            return client.request(method, f"/admin/{path}", json=body if method == "POST" else None)

    def status(self) -> dict[str, Any]:
        """Return the scheduler's view, every sequence included; empty while no scheduler answers."""
        response = self.admin("GET", "status?sequences=true")
        if response.status_code == 503:
            return {"workers": [], "sequences": [], "migrating": 0}
        return dict(response.raise_for_status().json())

    def serving(self) -> int:
        """Return how many workers take work."""
        return sum(worker["state"] in ("active", "standby") for worker in self.status()["workers"])

    def held(self, worker_id: str) -> list[dict[str, Any]]:
        """Return the sequences that run on a worker, the youngest first."""
        rows = [row for row in self.status()["sequences"] if (row["worker"], row["state"]) == (worker_id, "running")]
        return sorted(rows, key=lambda row: int(row["tokens"]))

    def move(self, source: Service, target: Service, until: Callable[[], Any]) -> None:
        """Order moves of what runs on a worker to another, one after the other, until something holds."""
        to = worker_id(target)

        def ordered() -> Any:
            if until():
                return True
            for row in self.held(worker_id(source))[:1]:
                answer = self.admin("POST", f"requests/{row['sequence']}/migrate", to=to, mode="kv", wait_s=0)
                # It may have ended, or be moving, by now; or no scheduler leads just now.
                assert answer.status_code in (200, 202, 404, 409, 410, 503), answer.text
            return until()

        eventually(ordered, f"a move to {to} goes so far")

    def shut(self, *workers: Service) -> None:
        """Let these workers take nothing new."""
        for worker in workers:
            self.admin("POST", f"workers/{worker_id(worker)}/drain").raise_for_status()

    def open(self, *workers: Service) -> None:
        """Let these workers take work again."""
        for worker in workers:
            self.admin("POST", f"workers/{worker_id(worker)}/undrain").raise_for_status()

    def nothing_left(self) -> None:
        """Wait until no worker holds anything, and nothing moves; what is well has no more files open than before."""

        def idle() -> bool:
            status = self.status()
            workers = status["workers"]
            return (
                bool(workers) and not any(w["running"] or w["used_blocks"] for w in workers) and not status["migrating"]
            )

        try:
            eventually(idle, "nothing is left on any worker")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status()}") from error


def worker_id(worker: Service) -> str:
    """Return the id of a worker, once it is ready."""
    return str(worker.ready()["worker"])


def standing(service: Service) -> bool:
    """Whether every thread of a process stands still."""
    return stands_still(service.process.pid)


def freeze(service: Service) -> None:
    """SIGSTOP; returns when the process stands."""
    service.process.send_signal(signal.SIGSTOP)
    eventually(lambda: standing(service), "it stands")


def thaw(service: Service) -> None:
    """SIGCONT."""
    service.process.send_signal(signal.SIGCONT)


def is_struck(service: Service) -> bool:
    """Whether a worker was struck at its point."""
    return any(line.startswith(STRUCK) for line in service.lines())
