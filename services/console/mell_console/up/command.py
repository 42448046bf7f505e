"""`mell up` from its flags to its exit code."""

import asyncio
import os
import signal
import sys

from rich.console import Console

from mell_console.up.greeting import greeting
from mell_console.up.machine import read_machine
from mell_console.up.plan import PlanError, Wish, plan_workers
from mell_console.up.ports import take_port
from mell_console.up.runfolder import make_run_folder
from mell_console.up.scale import scale
from mell_console.up.screen import Screen, make_screen
from mell_console.up.settings import UpSettings
from mell_console.up.stack import Stack, StackPlan
from mell_shared.bus import BrokerUnreachableError
from mell_shared.clock import SystemClock
from mell_shared.models import DEFAULT_MODEL, FAKE_MODEL
from mell_shared.process import StartError

_INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Run a stack until Ctrl-C or SIGTERM; return the exit code."""
    settings = UpSettings.from_command_line(arguments)
    screen = make_screen(Console(highlight=False))
    try:
        return asyncio.run(_run(_plan(settings), screen))
    except (StartError, PlanError, BrokerUnreachableError) as error:
        screen.close()
        sys.stderr.write(f"mell: {error}\n")
        return 1
    finally:
        screen.close()


def _plan(settings: UpSettings) -> StackPlan:
    """Decide everything before anything is started; raises `PlanError`, `StartError`."""
    models = settings.model or [FAKE_MODEL if settings.engine == "fake" else DEFAULT_MODEL]
    if settings.scales and len(models) > 1:
        raise PlanError(f"--workers {settings.workers} is for one model, but there are {len(models)}: give a number")
    if settings.scales and settings.engine == "vllm":
        raise PlanError(f"--workers {settings.workers}: vLLM servers run already, each with its worker; give a number")
    wish = Wish(
        models=tuple(models),
        workers=len(settings.vllm_url) or settings.most_workers,
        engine=settings.engine,
        served_names=tuple(settings.served_model_name),
        vllm_urls=tuple(settings.vllm_url),
        devices=settings.devices,
        memory_share=settings.memory_share,
    )
    workers = plan_workers(read_machine(), wish)
    port = take_port(settings.host, settings.port)
    try:
        folder = make_run_folder(settings.log_dir)
    except OSError as error:
        raise StartError(f"cannot write logs to {error.filename}: {error.strerror}; use --log-dir") from error
    return StackPlan(settings, workers, port, folder, dict(os.environ))


async def _run(plan: StackPlan, screen: Screen) -> int:
    stack = Stack(plan, screen, SystemClock())
    stop = asyncio.Event()
    _on_signals(stop, stack, screen)
    starting = asyncio.create_task(stack.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return _INTERRUPTED
        starting.result()
        _greet(plan, screen)
        if plan.settings.scales:
            await scale(plan, stack, stop, lambda told: screen.say(f"scaler: {told.text}", told.level))
        await stopping
        return 0
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.wait({starting, stopping})
        await stack.stop()
        if stop.is_set():
            screen.say("everything is stopped")


def _on_signals(stop: asyncio.Event, stack: Stack, screen: Screen) -> None:
    def on_signal() -> None:
        if stop.is_set():
            stack.kill()
            return
        stop.set()
        screen.close()
        screen.say("stopping: frontend, workers, scheduler, broker (again: kill them)")

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


def _greet(plan: StackPlan, screen: Screen) -> None:
    screen.close()
    model = plan.workers[0].served_name
    screen.say(f"\nMell answers at {plan.url}/v1 (logs in {plan.folder}; Ctrl-C stops everything)")
    screen.say(f"Watch it at {plan.url}/dashboard\n")
    screen.say(greeting(plan.url, model, plan.api_key))
