"""Logging: structlog for our events, the standard library's routed into it, one JSON object or console line each.

Events name what happened (`worker_joined`) with fields. Prompts and outputs are never logged: tracebacks carry no
local variables, and messages that fail validation are summarised without their content.
"""

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]


def configure_logging(level: Level, style: Format, *, service: str, process: str, stream: TextIO | None = None) -> None:
    """Log to `stream` (standard output if None) from `level` up, with the service's name and process id on each line.

    `auto` means console lines on a terminal, else JSON. Call it once, at start; a repeat replaces the set-up.
    """
    stream = stream or sys.stdout
    as_json = style == "json" or (style == "auto" and not stream.isatty())
    shared = _shared_processors(service, process)
    structlog.configure(
        processors=[*shared, *_renderers(as_json, stream)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(as_json, stream)],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)


def _shared_processors(service: str, process: str) -> list[Processor]:
    def add_identity(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        event.setdefault("id", process)
        return event

    return [
        structlog.contextvars.merge_contextvars,
        add_identity,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _renderers(as_json: bool, stream: TextIO) -> list[Processor]:
    if as_json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # The default formatter prints local variables, which hold prompts.
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
