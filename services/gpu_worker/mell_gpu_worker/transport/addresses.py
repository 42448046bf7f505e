"""Addresses of data ports, as they travel in messages."""

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
