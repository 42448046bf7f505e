"""`mell up --workers 1..4`: the scaler, whose port is the stack itself."""

import asyncio
from collections.abc import Callable

from mell_console.admin.ask import Frontend
from mell_console.scaler.core import ScalerCore
from mell_console.scaler.loop import ScaleError, ScalerLoop
from mell_console.scaler.values import StartWorkers, StopWorker, Tell
from mell_console.up.stack import Stack, StackPlan
from mell_shared.clock import SystemClock
from mell_shared.process import StartError


class StackPort:
    """Workers as child processes."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    async def start(self, order: StartWorkers) -> None:
        """See `Port`; returns when all are ready."""
        ends = await asyncio.gather(*map(self._stack.start_worker, order.names), return_exceptions=True)
        bugs = [end for end in ends if isinstance(end, BaseException) and not isinstance(end, StartError)]
        if bugs:
            raise bugs[0]
        failures = [str(end) for end in ends if isinstance(end, StartError)]
        if failures:
            raise ScaleError(failures[0], len(failures))

    async def stop(self, order: StopWorker) -> None:
        """See `Port`."""
        await self._stack.stop_worker(order.name)


async def scale(plan: StackPlan, stack: Stack, stop: asyncio.Event, tell: Callable[[Tell], None]) -> None:
    """Follow the load until `stop` is set."""
    frontend = Frontend(plan.url, plan.admin_key)
    core = ScalerCore(plan.settings.scale_limits())
    await ScalerLoop(core, plan.workers[0].served_name, frontend, StackPort(stack), SystemClock()).run(stop, tell)
