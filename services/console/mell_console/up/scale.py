"""`mell up --workers 1..4`: the scaler, whose port is the stack itself."""

import asyncio
from collections.abc import Callable, Sequence

from mell_console.admin.ask import Frontend
from mell_console.scaler.core import ScalerCore
from mell_console.scaler.loop import ScaleError, ScalerLoop
from mell_console.scaler.values import StartWorkers, StopWorker, Tell
from mell_console.up.stack import Stack, StackPlan
from mell_shared.clock import SystemClock
from mell_shared.process import StartError


class StackPort:
    """Workers as child processes; `places` are the names of all that there may be."""

    def __init__(self, stack: Stack, places: Sequence[str]) -> None:
        self._stack = stack
        self._places = tuple(places)

    async def start(self, order: StartWorkers) -> None:
        """See `Port`; returns when all are ready."""
        names = names_to_start(order, self._places, self._stack.worker_names())
        ends = await asyncio.gather(*map(self._stack.start_worker, names), return_exceptions=True)
        bugs = [end for end in ends if isinstance(end, BaseException) and not isinstance(end, StartError)]
        if bugs:
            raise bugs[0]
        failures = [str(end) for end in ends if isinstance(end, StartError)]
        if failures:
            raise ScaleError(failures[0], len(failures))

    async def stop(self, order: StopWorker) -> None:
        """See `Port`."""
        await self._stack.stop_worker(order.name)


def names_to_start(order: StartWorkers, places: Sequence[str], there: Sequence[str]) -> list[str]:
    """Return whom to start so that there are as many as ordered: the names ordered first, where they are free.

    The count decides: a worker that dies just now is there for us, and the scheduler may not know it.
    """
    wished = [name for name in order.names if name in places]
    free = [name for name in dict.fromkeys([*wished, *places]) if name not in there]
    return free[: max(0, order.count - len(there))]


async def scale(plan: StackPlan, stack: Stack, stop: asyncio.Event, tell: Callable[[Tell], None]) -> None:
    """Follow the load until `stop` is set."""
    frontend = Frontend(plan.url, plan.admin_key)
    port = StackPort(stack, [part.name for part in plan.workers])
    core = ScalerCore(plan.settings.scale_limits())
    await ScalerLoop(core, plan.workers[0].served_name, frontend, port, SystemClock()).run(stop, tell)
