"""UCX with nothing of ours around it, in ucxx's blocking mode: what the transport is compared with."""

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")

import ucxx._lib.libucxx as ucx
from ucxx._lib.arr import Array
from ucxx.types import Tag

_TAG = Tag(7)
_WAIT_MS = 100


class RawUcx:
    """One endpoint of a context of its own."""

    def __init__(self) -> None:
        settings = {"NET_DEVICES": "lo", "TLS": "tcp", "RNDV_SCHEME": "put_zcopy"}
        self._context = ucx.UCXContext(settings, (ucx.Feature.TAG, ucx.Feature.WAKEUP, ucx.Feature.STREAM))
        self._worker = ucx.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
        self._worker.init_blocking_progress_mode()
        self._endpoint: Any = None

    def __enter__(self) -> "RawUcx":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._endpoint.close_blocking(10**9, 1)

    def listen(self, tell: Callable[[int], None]) -> None:
        """Wait for the peer."""
        accepted: list[Any] = []
        listener = ucx.UCXListener.create(self._worker, 0, accepted.append, deliver_endpoint=True)
        tell(listener.port)
        while not accepted:
            self._worker.progress_worker_event(_WAIT_MS)
        self._endpoint = accepted[0]

    def connect(self, port: int) -> None:
        """Connect to the peer."""
        self._endpoint = ucx.UCXEndpoint.create(self._worker, "127.0.0.1", port, True)

    def send(self, memory: Sequence[Any]) -> None:
        """Send messages, all in flight together."""
        self._wait([self._endpoint.tag_send(Array(each), _TAG) for each in memory])

    def receive(self, memory: Sequence[Any]) -> None:
        """Receive messages, all in flight together."""
        self._wait([self._endpoint.tag_recv(Array(each), _TAG) for each in memory])

    def _wait(self, requests: list[Any]) -> None:
        while not all(request.completed for request in requests):
            self._worker.progress_worker_event(_WAIT_MS)
        for request in requests:
            request.check_error()
