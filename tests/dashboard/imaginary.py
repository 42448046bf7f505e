"""A frontend before a cluster that does not exist: as many GPUs and requests as wanted, which grow, end and move."""

import asyncio
import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry

from mell_frontend.app import create_app
from mell_frontend.settings import FrontendSettings
from mell_shared.messages.admin import (
    NOWHERE,
    SEQUENCE_STATES,
    AdminReply,
    AdminRequest,
    GpuUse,
    Live,
    LiveRequest,
    MoveStatus,
    MovingReply,
    Status,
    WorkerStatus,
)
from tests.frontend.scripted_gateway import ScriptedGateway

BLOCKS = 4_000
RUNNING, PLACED, MOVING = (SEQUENCE_STATES.index(state) for state in ("running", "placed", "moving"))


class ImaginaryGateway(ScriptedGateway):
    """Answers each `LiveRequest` with the next second of its cluster; the seed says how it goes."""

    def __init__(self, gpus: int, requests: int, moves: int = 6, seed: int = 7) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self._gpus = gpus
        self._requests = requests
        self._moves_each = moves
        self._models = ["llama-3.1-8b", "qwen3-32b", "mistral-small"]
        self._rows: list[list[int]] = []
        """Number, GPU, target, blocks."""
        self._born = 0
        self._second = 0
        self._begun = 0
        self._moving: list[MoveStatus] = []
        self._recent: deque[MoveStatus] = deque(maxlen=64)
        self._used: deque[int] = deque(maxlen=300)
        self._shadow: deque[int] = deque(maxlen=300)
        for _ in range(300):
            self._live_on()

    async def admin(self, request: AdminRequest) -> AdminReply:
        """Return the next second; everything else is taken for a pause."""
        if not isinstance(request, LiveRequest):
            return MovingReply(paused=False)
        self._live_on()
        self.tokens_accepted += 30 * len(self._rows)
        return self.state()

    def _live_on(self) -> None:
        draw, self._second = self._draw, self._second + 1
        self._land()
        in_use = self._gpus - self._gpus // 8
        while len(self._rows) < self._requests:
            self._born += 1
            self._rows.append([self._born, draw.randrange(in_use), NOWHERE, draw.randrange(20, 200)])
        for row in self._rows:
            row[3] += 2
        self._rows = [row for row in self._rows if row[2] != NOWHERE or draw.random() > 0.02]
        for row in draw.sample(self._rows, self._moves_each):
            if row[2] == NOWHERE and (target := draw.randrange(in_use)) % 3 == row[1] % 3 and target != row[1]:
                row[2] = target
                self._begun += 1
                self._moving.append(self._move(row))
        self._used.append(len({row[1] for row in self._rows}))
        self._shadow.append(round(self._used[-1] * 1.17) + draw.randrange(2))

    def _land(self) -> None:
        for move in self._moving:
            done = {"outcome": "committed", "copied_bytes": move.blocks * 16 * 65_536, "took_s": 0.6, "stopped_s": 0.02}
            self._recent.appendleft(move.model_copy(update=done))
        self._moving = []
        for row in self._rows:
            if row[2] != NOWHERE:
                row[1], row[2] = row[2], NOWHERE

    def _move(self, row: list[int]) -> MoveStatus:
        return MoveStatus(
            migration=f"1-{self._begun}",
            sequence=_name(row[0]),
            source=f"gpu-{row[1] + 1}-0a1b2c3d",
            target=f"gpu-{row[2] + 1}-0a1b2c3d",
            mode=("kv", "tokens", "hybrid")[self._begun % 3],  # type: ignore[arg-type]
            reason="consolidate",
            blocks=row[3],
            took_s=0.4,
        )

    def state(self) -> Live:
        """The second as it is."""
        rows = sorted(self._rows, key=lambda row: row[1])
        return Live.model_construct(
            status=self._status(),
            sequences=tuple(_name(row[0]) for row in rows),
            workers=[row[1] for row in rows],
            targets=[row[2] for row in rows],
            tokens=[16 * row[3] for row in rows],
            blocks=[row[3] for row in rows],
            states=[MOVING if row[2] != NOWHERE else PLACED if row[0] > self._born - 20 else RUNNING for row in rows],
            sample_s=1.0,
            used_lately=list(self._used),
            shadow_lately=list(self._shadow),
        )

    def _status(self) -> Status:
        used = [0] * self._gpus
        running = [0] * self._gpus
        for _, gpu, _, blocks in self._rows:
            used[gpu] += blocks
            running[gpu] += 1
        use = GpuUse(
            since_s=self._second,
            up=self._gpus,
            used=self._used[-1],
            up_gpu_s=self._gpus * self._second,
            used_gpu_s=sum(self._used) * self._second / len(self._used),
            shadow_policy="worst-fit",
            shadow=self._shadow[-1],
            shadow_gpu_s=sum(self._shadow) * self._second / len(self._shadow),
        )
        return Status(
            scheduler="scheduler-1-5e6f7a8b",
            policy="repack",
            uptime_s=self._second,
            workers=tuple(self._worker(gpu, used[gpu], running[gpu]) for gpu in range(self._gpus)),
            queued=0,
            placed=self._born,
            rejected=0,
            migrating=len(self._moving),
            migrated=self._begun - len(self._moving),
            moves=tuple(self._moving),
            recent_moves=tuple(self._recent),
            gpu_use=use,
        )

    def _worker(self, gpu: int, used: int, running: int) -> WorkerStatus:
        fields: dict[str, Any] = {
            "worker": f"gpu-{gpu + 1}-0a1b2c3d", "name": f"gpu-{gpu + 1}", "host": f"node-{gpu // 8 + 1}",
            "model": self._models[gpu % 3], "engine": "torch", "device": f"cuda:{gpu % 8}",
            "state": ("draining" if gpu % 40 == 17 else "active") if running else "standby",
            "kv_blocks": BLOCKS, "used_blocks": min(used, BLOCKS), "block_tokens": 16, "running": running, "waiting": 0,
            "step_us": 31_000, "report_age_s": 0.5, "kv_bytes_per_token": 65_536, "sequences": running,
            "migration_modes": ("kv", "tokens", "hybrid"),
        }  # fmt: skip
        return WorkerStatus.model_validate(fields)


def _name(number: int) -> str:
    return f"chatcmpl-{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:08x}.0.0"


@contextmanager
def imaginary_frontend(gateway: ImaginaryGateway, **settings: Any) -> Iterator[str]:
    """Serve the dashboard of such a cluster from a thread; give its URL."""
    chosen = FrontendSettings(_env_file=None, models=["fake"], **settings)
    app = create_app(chosen, gateway, [], CollectorRegistry())
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        gateway.stopping = server.should_exit = True
        thread.join()
