"""What the frontend counts, for Prometheus; labels come from fixed sets, never from clients."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mell_frontend.record import RequestRecord
from mell_frontend.vllm_metrics import VllmMetrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_OTHER = "other"


class FrontendMetrics:
    """Counters and histograms of the HTTP side, written once per request."""

    def __init__(self, registry: CollectorRegistry, paths: frozenset[str], as_vllm: VllmMetrics) -> None:
        self._paths = paths
        self._as_vllm = as_vllm
        self._requests = Counter("mell_http_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.in_flight = Gauge("mell_http_requests_in_flight", "Requests being answered.", registry=registry)
        self._duration = Histogram(
            "mell_http_request_seconds", "Time to the end of the answer.", ["path"], buckets=_SECONDS, registry=registry
        )
        self._ttft = Histogram(
            "mell_time_to_first_token_seconds", "From request to first token.", buckets=_SECONDS, registry=registry
        )
        self._prompt = Counter("mell_prompt_tokens", "Prompt tokens of served requests.", registry=registry)
        self._cached = Counter("mell_cached_prompt_tokens", "Prompt tokens without prefill.", registry=registry)
        self._completion = Counter("mell_completion_tokens", "Tokens generated for clients.", registry=registry)
        self._finishes = Counter("mell_choices", "Choices ended, by reason.", ["reason"], registry=registry)
        self._unknown = Counter("mell_unknown_request_fields", "Fields ignored in requests.", registry=registry)
        self._gone = Counter("mell_clients_gone", "Clients that left before their answer ended.", registry=registry)

    def observe(self, record: RequestRecord, now_us: int) -> None:
        """Count one answered request."""
        path = record.path if record.path in self._paths else _OTHER
        self._requests.labels(path, str(record.status)).inc()
        self._duration.labels(path).observe((now_us - record.started_us) / 1e6)
        self._unknown.inc(record.unknown_count)
        self._gone.inc(record.disconnected)
        if not record.choices:
            return
        self._as_vllm.observe(record, now_us)
        if record.first_token_us is not None:
            self._ttft.observe((record.first_token_us - record.started_us) / 1e6)
        self._prompt.inc(record.prompt_tokens)
        self._cached.inc(record.cached_tokens)
        self._completion.inc(record.completion_tokens)
        for reason, count in record.finish_reasons.items():
            self._finishes.labels(reason).inc(count)
