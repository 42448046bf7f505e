import asyncio
from collections.abc import Callable
from typing import Any

from mell_console.admin.ask import AdminError
from mell_console.scaler.core import ScalerCore
from mell_console.scaler.loop import ScaleError, ScalerLoop
from mell_console.scaler.values import StartWorkers, StopWorker, Tell
from mell_shared.clock import ManualClock
from mell_shared.messages.admin import DrainReply, ModelStatus, Status, WorkerStatus
from tests.console.scaler.world import QUICK


def row(name: str, model: str = "m", **changes: Any) -> WorkerStatus:
    """Return a worker's row of a status."""
    fields: dict[str, Any] = {
        "worker": f"{name}-id",
        "name": name,
        "host": "here",
        "model": model,
        "engine": "fake",
        "device": "cpu",
        "state": "standby",
        "kv_blocks": 8,
        "used_blocks": 0,
        "block_tokens": 16,
        "running": 0,
        "waiting": 0,
        "step_us": 0,
        "report_age_s": 0.0,
    }
    return WorkerStatus(**(fields | changes))


class Cluster:
    """A frontend that answers from memory; a second passes with each status."""

    def __init__(self) -> None:
        self.rows = [row("worker-1")]
        self.wanted = 1
        self.posts: list[str] = []
        self.down = False
        self.clock = ManualClock()

    def get(self, path: str, adapter: Any) -> Any:
        """Answer a status."""
        self.clock.advance_us(1_000_000)
        if self.down:
            raise AdminError("nobody answers")
        rows = tuple(self.rows)
        models = tuple(ModelStatus(model=name, gpus_wanted=self.wanted) for name in {r.model for r in rows})
        return Status(
            scheduler="s", policy="p", uptime_s=1, workers=rows, queued=0, placed=0, rejected=0, models=models
        )

    def post(self, path: str, body: dict[str, Any], adapter: Any, wait_s: float = 0.0) -> Any:
        """Take an order to drain or undrain."""
        self.posts.append(path)
        worker, order = path.split("/")[1:]
        state = "drained" if order == "drain" else "standby"
        self.rows = [r.model_copy(update={"state": state}) if r.worker == worker else r for r in self.rows]
        return DrainReply(worker=worker, name=worker, draining=order == "drain")


class MemoryPort:
    """Starts and stops rows of the status; fails with what `fault` says."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.fault = ""

    async def start(self, order: StartWorkers) -> None:
        """See `Port`."""
        if self.fault:
            raise ScaleError(self.fault)
        self.cluster.rows = [*self.cluster.rows, *map(row, order.names)]

    async def stop(self, order: StopWorker) -> None:
        """See `Port`."""
        if self.fault:
            raise ScaleError(self.fault)
        rows = [r for r in self.cluster.rows if r.worker != order.worker]
        self.cluster.rows = rows


class Stage:
    """A loop that runs as fast as it can, until something has been told or has come about."""

    def __init__(self, monkeypatch: Any, model: str = "") -> None:
        monkeypatch.setattr("mell_console.scaler.loop._INTERVAL_S", 0.001)
        self.cluster = Cluster()
        self.port = MemoryPort(self.cluster)
        self.told: list[Tell] = []
        self.loop = ScalerLoop(ScalerCore(QUICK), model, self.cluster, self.port, self.cluster.clock)  # type: ignore[arg-type]
        self.stop = asyncio.Event()
        self.running: asyncio.Task[None] = asyncio.create_task(self.loop.run(self.stop, self.told.append))

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for it."""
        async with asyncio.timeout(60):
            while not condition():
                assert not self.running.done(), self.running
                await asyncio.sleep(0.002)

    def names(self) -> list[str]:
        """Return the workers that are there."""
        return [r.name for r in self.cluster.rows]

    def said(self, words: str) -> bool:
        """Whether that was told."""
        return any(words in tell.text for tell in self.told)

    async def end(self) -> None:
        """Stop it in order."""
        self.stop.set()
        await self.running


async def test_a_wish_becomes_workers_and_they_go_again(monkeypatch: Any) -> None:
    """Status in, orders out: started by the port, drained by `/admin`, stopped by the port."""
    stage = Stage(monkeypatch)
    stage.cluster.wanted = 3
    await stage.until(lambda: len(stage.names()) == 3)
    stage.cluster.wanted = 1
    await stage.until(lambda: stage.names() == ["worker-1"])
    assert stage.cluster.posts == ["workers/worker-3-id/drain", "workers/worker-2-id/drain"]
    await stage.end()


async def test_nothing_is_done_while_nobody_answers_and_it_is_told_once(monkeypatch: Any) -> None:
    """Without a status there is no order; when it comes back all goes on."""
    stage = Stage(monkeypatch)
    stage.cluster.down = True
    await stage.until(lambda: stage.said("nobody answers"))
    since_us = stage.cluster.clock.now_us()
    await stage.until(lambda: stage.cluster.clock.now_us() > since_us + 20_000_000)
    assert len([tell for tell in stage.told if "nobody answers" in tell.text]) == 1
    stage.cluster.down, stage.cluster.wanted = False, 2
    await stage.until(lambda: len(stage.names()) == 2)
    assert stage.said("known again")
    await stage.end()


async def test_failures_of_the_port_are_told_and_mended(monkeypatch: Any) -> None:
    """A start and a stop that fail are told with their reason, and done when the port works again."""
    stage = Stage(monkeypatch)
    stage.port.fault = "no money"
    stage.cluster.wanted = 2
    await stage.until(lambda: stage.said("starting failed: no money"))
    stage.port.fault = ""
    await stage.until(lambda: len(stage.names()) == 2)
    stage.port.fault = "no courage"
    stage.cluster.wanted = 1
    await stage.until(lambda: stage.said("failed: no courage"))
    await stage.until(lambda: "workers/worker-2-id/undrain" in stage.cluster.posts)
    stage.port.fault = ""
    await stage.until(lambda: stage.names() == ["worker-1"])
    await stage.end()


async def test_of_several_models_one_has_to_be_named(monkeypatch: Any) -> None:
    """Without a name nothing is done and it says so; with one only its workers count."""
    unnamed = Stage(monkeypatch)
    unnamed.cluster.rows, unnamed.cluster.wanted = [row("worker-1"), row("x", "other")], 2
    await unnamed.until(lambda: unnamed.said("--scale-model"))
    assert unnamed.names() == ["worker-1", "x"]
    await unnamed.end()
    named = Stage(monkeypatch, model="m")
    named.cluster.rows, named.cluster.wanted = [row("worker-1"), row("x", "other")], 2
    await named.until(lambda: named.names() == ["worker-1", "x", "worker-2"])
    await named.end()
