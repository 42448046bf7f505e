"""Ports that a test has to name before anybody listens there."""

import random
import socket
from pathlib import Path

_OF_THE_SYSTEM = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a free port of loopback, of those that the system gives to nobody who asks for any, or connects."""
    first = int(_OF_THE_SYSTEM.read_text().split()[0])
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(10_000, max(first, 20_000))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
