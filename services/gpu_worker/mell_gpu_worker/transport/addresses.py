"""Addresses of data ports, as they travel in messages."""

import asyncio
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from mell_gpu_worker.transport.base import RefusedError


@dataclass(frozen=True, slots=True)
class Address:
    """`scheme://host:port`; the scheme names the transport."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, scheme: str) -> "Address":
        """Read an address; raises `RefusedError` if it is none, or of another transport than `scheme`."""
        try:
            parts = urlsplit(text)
            found = cls(parts.scheme, parts.hostname or "", parts.port or 0)
        except ValueError:
            raise RefusedError(f"{text!r} is no data address") from None
        if found.scheme != scheme:
            raise RefusedError(f"the peer's data address {text!r} is not for {scheme}: all workers need one transport")
        if not found.host or not found.port:
            raise RefusedError(f"{text!r} is no data address")
        return found


async def address_towards(url: str, default_port: int) -> str:
    """Return this machine's address on the way to a URL's host: where others that reach that host find this machine.

    Raises `OSError` if the host is unknown or there is no way to it, `ValueError` if the URL is none. Nothing is sent.
    """
    parts = urlsplit(url if "//" in url else f"//{url}")
    found = await asyncio.get_running_loop().getaddrinfo(
        parts.hostname or "localhost", parts.port or default_port, type=socket.SOCK_DGRAM
    )
    family, kind, protocol, _, where = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])
