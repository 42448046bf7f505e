"""Who may use `/admin`: whoever has the admin key; where there is none, whoever certainly is on this machine."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from mell_frontend.asgi import Scope, header_of
from mell_frontend.errors import ApiError
from mell_frontend.keys import KeyRing, keys_from_values

ADMIN_PATHS = "/admin/"
"""What operators ask: it has a key of its own, which API keys do not replace."""

_FORWARDED = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip")


class AdminGate:
    """Knows only the key's digest. `admin_key` is empty, the key, or `sha256:HEX` of it; raises `KeysFileError`."""

    def __init__(self, admin_key: str) -> None:
        self._ring = KeyRing(keys_from_values([admin_key], "admin key")) if admin_key else None

    def check(self, scope: Scope) -> None:
        """Let a request pass, or raise `ApiError` (401, 403)."""
        if self._ring is None:
            if not is_local(scope):
                raise _no_key_set()
        elif self._ring.find(header_of(scope, b"authorization")) is None:
            message = "Incorrect or missing admin key (MELL_ADMIN_KEY): send it as `Authorization: Bearer KEY`."
            fault = ApiError(401, message, code="invalid_admin_key")
            fault.headers["WWW-Authenticate"] = "Bearer"
            raise fault


def _no_key_set() -> ApiError:
    message = (
        "This frontend has no admin key, so only this machine itself may ask, and not through a proxy: "
        "start it with MELL_ADMIN_KEY set, and send that key."
    )
    return ApiError(403, message, code="admin_key_not_set")


def is_local(scope: Scope) -> bool:
    """Whether a request certainly comes from this machine.

    The peer's address alone does not say so: a proxy here speaks for anybody, and a web page that a browser here
    shows can send requests to this machine, also under a name of its own (DNS rebinding).
    """
    peer = (scope.get("client") or ("",))[0]
    if not _is_loopback(peer) or any(header_of(scope, name) is not None for name in _FORWARDED):
        return False
    host, origin = header_of(scope, b"host"), header_of(scope, b"origin")
    return _names_loopback(b"//" + (host or b"")) and (origin is None or _names_loopback(origin))


def _names_loopback(url: bytes) -> bool:
    try:
        name = urlsplit(url.decode("ascii")).hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
