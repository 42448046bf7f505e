"""`mell scaler` from its flags to its exit code."""

import asyncio
import signal

import structlog

from mell_console.admin.ask import Frontend
from mell_console.scaler.command_port import CommandPort
from mell_console.scaler.core import ScalerCore
from mell_console.scaler.loop import ScalerLoop
from mell_console.scaler.settings import ScalerSettings
from mell_console.scaler.values import Tell
from mell_shared.clock import SystemClock
from mell_shared.log import configure_logging


def main(arguments: list[str]) -> int:
    """Scale until Ctrl-C or SIGTERM; return the exit code."""
    settings = ScalerSettings.from_command_line(arguments)
    configure_logging(settings.log_level, settings.log_format, service="scaler", process="scaler")
    asyncio.run(_run(settings))
    return 0


async def _run(settings: ScalerSettings) -> None:
    port = CommandPort(settings.scale_command, settings.scale_model, settings.scale_command_s)
    frontend = Frontend(settings.url, settings.admin_key)
    loop = ScalerLoop(ScalerCore(settings.limits()), settings.scale_model, frontend, port, SystemClock())
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    structlog.get_logger().info("ready", url=settings.url, least=settings.min_workers, most=settings.max_workers)
    await loop.run(stop, _log)
    structlog.get_logger().info("stopped")


def _log(told: Tell) -> None:
    getattr(structlog.get_logger(), told.level)("scaling", text=told.text)
