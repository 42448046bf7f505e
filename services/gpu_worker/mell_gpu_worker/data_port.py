"""Opens the data port that the settings ask for, and finds out at once whether it works."""

import ipaddress
from typing import Any

import structlog

from mell_gpu_worker.engine.base import Engine
from mell_gpu_worker.metrics import DataCounts
from mell_gpu_worker.settings import WorkerSettings
from mell_gpu_worker.transport.addresses import address_towards
from mell_gpu_worker.transport.base import Tell, Transport, TransportError, TransportOptions
from mell_gpu_worker.transport.factory import TransportUnavailableError, open_transport
from mell_gpu_worker.transport.self_test import LaneMeasured, measure_itself
from mell_shared.process import StartError

_SELF_TEST_S = 20.0
_SPARE_OFFERS = 2
"""Beside the moves: a probe, and one that is about to close."""
_NATS_PORT = 4222


async def open_data_port(settings: WorkerSettings, engine: Engine, counts: DataCounts) -> Transport:
    """Open the transport; what it tells of strangers is logged and counted. Raises `StartError`."""
    options = await _options(settings, cuda=engine.spec.device.startswith("cuda"))
    try:
        return await open_transport(options, _teller(counts))
    except TransportUnavailableError as error:
        raise StartError(f"{error} (--transport, --data-host, --data-port)") from error


async def try_data_port(transport: Transport, engine: Engine, slow_bytes_per_s: float) -> LaneMeasured:
    """Measure the lane of a worker to itself, over memory like its pool's; warn if slow. Raises `StartError`."""
    log = structlog.get_logger()
    try:
        lane = await measure_itself(transport, _SELF_TEST_S, engine.scratch)
    except TransportError as error:
        raise StartError(
            f"nothing gets through to this worker's own data port {transport.address} ({error}): "
            "set --data-host to an address of this machine, or --migration-modes '' to move nothing"
        ) from error
    figures = {"bytes_per_s": round(lane.bytes_per_s), "latency_us": round(lane.latency_s * 1e6)}
    if lane.bytes_per_s < slow_bytes_per_s:
        log.warning("data_port_slow", address=transport.address, slower_than=round(slow_bytes_per_s), **figures)
    else:
        log.info("data_port", address=transport.address, **figures)
    return lane


async def _options(settings: WorkerSettings, *, cuda: bool) -> TransportOptions:
    host = settings.data_host
    if not host:
        try:
            host = await address_towards(settings.nats_url, _NATS_PORT)
        except (OSError, ValueError) as error:
            raise StartError(f"no address of this machine is known to others ({error}): set --data-host") from error
    return TransportOptions(
        kind=settings.transport,
        host=host,
        port=settings.data_port,
        max_transfer_bytes=settings.max_transfer_bytes,
        max_offers=settings.max_incoming_moves + _SPARE_OFFERS,
        chunk_bytes=settings.chunk_bytes,
        chunks_in_flight=settings.chunks_in_flight,
        ucx_net_devices=settings.ucx_net_devices or ("lo" if _is_loopback(host) else ""),
        ucx_tls=settings.ucx_tls,
        ucx_rndv_scheme="" if cuda else "put_zcopy",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _teller(counts: DataCounts) -> Tell:
    log = structlog.get_logger()

    def tell(event: str, fields: dict[str, Any]) -> None:
        counts.door[event] += 1
        log.warning(event, **fields)

    return tell
