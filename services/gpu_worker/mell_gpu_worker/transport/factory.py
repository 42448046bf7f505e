"""Chooses and opens the transport that a worker's settings ask for."""

import importlib.util

from mell_gpu_worker.transport.base import Tell, Transport, TransportOptions
from mell_gpu_worker.transport.tcp import TcpTransport


class TransportUnavailableError(Exception):
    """The transport asked for cannot run here; the message says what to do."""


def ucx_installed() -> bool:
    """Return whether ucxx is there, without importing it: that takes a second and sets UCX up."""
    return importlib.util.find_spec("ucxx") is not None


def transport_kind(asked: str) -> str:
    """Return the kind that is meant by `asked`: UCX for `auto` where it is installed, else TCP."""
    return asked if asked != "auto" else ("ucx" if ucx_installed() else "tcp")


async def open_transport(options: TransportOptions, tell: Tell) -> Transport:
    """Open the transport and listen.

    Raises `TransportUnavailableError` for an unknown kind, a missing package, or a port that cannot be had.
    """
    kind = transport_kind(options.kind)
    try:
        if kind == "tcp":
            return await TcpTransport.open(options, tell)
        if kind == "ucx":
            return await _open_ucx(options, tell)
    except OSError as error:
        raise TransportUnavailableError(f"the data port cannot be opened: {error}; choose another port") from error
    raise TransportUnavailableError(f"{kind!r} is no transport: use auto, ucx or tcp")


async def _open_ucx(options: TransportOptions, tell: Tell) -> Transport:
    try:
        from mell_gpu_worker.transport.ucx import UcxTransport  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise TransportUnavailableError(
            f"UCX cannot be loaded ({error}): install mell[ucx], or use the tcp transport"
        ) from error
    return await UcxTransport.open(options, tell)
