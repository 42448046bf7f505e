"""The life of a service process: its event loop, the signals that stop it, its exit code, its parent's death."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from mell_shared.bus import BrokerUnreachableError

_PR_SET_PDEATHSIG = 1


class ServiceError(Exception):
    """The service cannot go on; the message is one line for whoever runs it."""


class StartError(ServiceError):
    """The service cannot start; the message is one line that says what to do."""


ServiceMain = Callable[[asyncio.Event], Awaitable[None]]
"""A service's life: returns after a clean stop, which it begins when the event is set."""


def run_service(main: ServiceMain) -> None:
    """Run `main` until it returns, SIGTERM or SIGINT setting its event; a second signal ends the process at once.

    Exits 0 after a clean stop, 1 with one line on stderr for a `ServiceError` or an unreachable broker; any other
    exception is a bug and propagates.
    """
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_until_stopped(main))
    except (ServiceError, BrokerUnreachableError) as error:
        sys.stderr.write(f"mell: {error}\n")
        raise SystemExit(1) from error
    except ExceptionGroup as group:
        # From a service's TaskGroup.
        told = _foreseen(group)
        if told is None:
            raise
        sys.stderr.write(f"mell: {told}\n")
        raise SystemExit(1) from group


def _foreseen(group: ExceptionGroup[Exception]) -> Exception | None:
    """Return the first of a group's failures if a user can mend all of them, None if one is a bug."""
    foreseen, bugs = group.split((ServiceError, BrokerUnreachableError))
    if bugs is not None or foreseen is None:
        return None
    first: Exception = foreseen
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    return first


async def _until_stopped(main: ServiceMain) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await main(stop)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the fastest event loop there is here."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def death_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """Return a `preexec_fn` that sends the child `number` when the thread that started it ends; None off Linux."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the call

    return arm
