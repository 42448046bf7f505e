"""Which requests can be placed at all: on some worker, some day, as far as is known."""

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import ModelRecord
from mell_scheduler.core.values import CoreSettings
from mell_shared.messages.scheduler import PlaceRequest, Rejected


class Admission:
    """Judges requests by the workers known; patient while more of them may still be heard of."""

    def __init__(self, ledger: Ledger, settings: CoreSettings, started_us: int) -> None:
        self._ledger = ledger
        self._settings = settings
        self._started_us = started_us

    def refusal(self, request: PlaceRequest, now_us: int) -> Rejected | None:
        """Why a request can never be placed, as far as is known; None while that may still change."""
        settings = self._settings
        settled = now_us >= self._started_us + 2 * settings.report_interval_us
        model = self._ledger.models.get(request.model)
        if model is not None and model.workers:
            return _too_large(request, model) if settled else None
        since_us = self._started_us if model is None else max(self._started_us, model.absent_since_us)
        if not settled or now_us < since_us + settings.worker_grace_us:
            return None
        return self._absent(request)

    def _absent(self, request: PlaceRequest) -> Rejected:
        served = [name for name, model in self._ledger.models.items() if model.workers]
        if served:
            known = ", ".join(sorted(served))
            return Rejected(reason="unknown_model", message=f"no worker serves {request.model!r}; served: {known}")
        retry_after_s = max(1.0, self._settings.worker_grace_us / 1_000_000)
        return Rejected(reason="no_worker", message="no worker is up", retry_after_s=retry_after_s)


def _total_tokens(request: PlaceRequest) -> int:
    """What the request needs room for in the end; without an output limit, for one token at least."""
    return request.prompt_tokens + (request.max_output_tokens or 1)


def _too_large(request: PlaceRequest, model: ModelRecord) -> Rejected | None:
    limit = model.limit_tokens
    total = _total_tokens(request)
    if total <= limit:
        return None
    message = f"{total} tokens of prompt and output; no worker of {model.name!r} holds more than {limit}"
    return Rejected(reason="too_large", message=message, limit_tokens=limit)


def unfit_workers(request: PlaceRequest, model: ModelRecord) -> list[str]:
    """Workers that must not get this request: they refused it, or could never hold it."""
    total = _total_tokens(request)
    if total <= model.least_total_tokens:
        return list(request.excluded)
    small = [name for name, worker in model.workers.items() if worker.max_total_tokens < total]
    return [*request.excluded, *small]
