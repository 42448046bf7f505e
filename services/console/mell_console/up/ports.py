"""The HTTP port of a stack: chosen and checked before anything is started."""

import errno
import socket

from mell_shared.process import StartError


def take_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0, after making sure that it can be listened on; raises `StartError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1)
            chosen: int = listener.getsockname()[1]
            return chosen
    except socket.gaierror as error:
        raise StartError(f"--host {host} is no address of this machine: use 127.0.0.1 or 0.0.0.0") from error
    except OSError as error:
        raise StartError(_why(error, host, port)) from error


def public_url(host: str, port: int) -> str:
    """Return the URL at which a client on this machine reaches the frontend."""
    address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{address}:{port}"


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: stop what listens there, or use --port 0 for a free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine: use 127.0.0.1 or 0.0.0.0"
    if error.errno == errno.EACCES:
        return f"port {port} needs rights that this user lacks: use --port 8000"
    return f"cannot listen on {host}:{port}: {error.strerror}"
