"""How a service shows the broker who it is and makes sure who the broker is: what a client needs, from settings."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import nkeys

from mell_shared.bus import BrokerUnreachableError

Role = Literal["frontend", "scheduler", "worker", ""]
"""What the broker's permissions are given to; `""`: none in particular."""

INBOX = "_INBOX"


@dataclass(frozen=True, slots=True)
class BrokerAccess:
    """Beside the address: nkey and TLS. With any `tls_` file, or a `tls://` address, nothing is ever sent in clear.

    Replies come to an inbox under the role's own name, so that the broker can keep others from reading them.
    """

    role: Role = ""
    nkey_seed_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def inbox_prefix(self) -> str:
        """Where replies to this client come: `_INBOX.ROLE`, as the shipped permissions have it."""
        return f"{INBOX}.{self.role}" if self.role else INBOX

    def wants_tls(self, url: str) -> bool:
        """Whether the connection must be encrypted."""
        return urlsplit(url).scheme == "tls" or any((self.tls_ca, self.tls_cert, self.tls_key))

    def tls_context(self) -> ssl.SSLContext:
        """Return the context that trusts `tls_ca`, else the system, and shows `tls_cert`.

        Raises `BrokerUnreachableError` for files that are none.
        """
        context = _trusting(self.tls_ca)
        if self.tls_key is not None and self.tls_cert is None:
            raise BrokerUnreachableError("MELL_NATS_TLS_KEY (--nats-tls-key) needs MELL_NATS_TLS_CERT beside it")
        if self.tls_cert is not None:
            try:
                context.load_cert_chain(self.tls_cert, self.tls_key)
            except OSError as error:  # also what ssl raises
                wrong = f"cannot use the certificate {self.tls_cert} with the key {self.tls_key or self.tls_cert}"
                raise BrokerUnreachableError(f"{wrong} ({error.strerror or error}); see --nats-tls-cert") from error
        return context

    def nkey_seed(self) -> str | None:
        """Return the seed, None if there is none; raises `BrokerUnreachableError` for a file that holds none."""
        if self.nkey_seed_file is None:
            return None
        try:
            lines = self.nkey_seed_file.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise BrokerUnreachableError(
                f"cannot read the nkey seed {self.nkey_seed_file} ({error}); see MELL_NATS_NKEY_SEED_FILE"
            ) from error
        seed = next((line for line in lines if _is_user_seed(line)), None)
        if seed is None:
            raise BrokerUnreachableError(
                f"{self.nkey_seed_file} holds no seed of a user (it begins with SU); see MELL_NATS_NKEY_SEED_FILE"
            )
        return seed


def _is_user_seed(text: str) -> bool:
    if not text.startswith("SU"):
        return False
    try:
        nkeys.from_seed(bytearray(text.encode())).wipe()
    except (nkeys.NkeysError, ValueError):
        return False
    return True


def _trusting(authority: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as error:  # also what ssl raises
        raise BrokerUnreachableError(
            f"cannot use the certificate authority {authority} ({error.strerror or error}); see MELL_NATS_TLS_CA"
        ) from error
