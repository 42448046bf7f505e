"""What clients get, under the names that vLLM's users know; the buckets are vLLM's too, so that panels fit."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from mell_frontend.record import RequestRecord

_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1)
_TTFT = (*_SHORT, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_REASONS = {"tool_calls": "stop"}
"""Ours, that vLLM's engine knows by another name."""


class VllmMetrics:
    """Histograms and counters by model."""

    def __init__(self, registry: CollectorRegistry, models: Sequence[str]) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", text, ["model_name", *labels], registry=registry)

        self._ttft = histogram("time_to_first_token_seconds", "From request to first token.", _TTFT)
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens, as they reach the frontend.", _TOKEN)
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean of a request after its first.", _TOKEN)
        self._e2e = histogram("e2e_request_latency_seconds", "From request to the end of its answer.", _REQUEST)
        self._request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._request_output = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._prompt = counter("prompt_tokens", "Prompt tokens of requests that got an answer.")
        self._output = counter("generation_tokens", "Tokens generated for clients, as they come.")
        self._success = counter("request_success", "Choices ended, by reason.", "finished_reason")
        self._meters = {model: TokenMeter(self._gap.labels(model), self._output.labels(model)) for model in models}

    def meter(self, model: str) -> "TokenMeter":
        """Return what counts a model's tokens as they come."""
        return self._meters[model]

    def observe(self, record: RequestRecord, now_us: int) -> None:
        """Count a request that is over; one without a token counts nowhere here."""
        first_us, model = record.first_token_us, record.model
        if first_us is None:
            return
        self._ttft.labels(model).observe((first_us - record.started_us) / 1e6)
        self._e2e.labels(model).observe((now_us - record.started_us) / 1e6)
        self._prompt.labels(model).inc(record.prompt_tokens)
        self._request_prompt.labels(model).observe(record.prompt_tokens)
        self._request_output.labels(model).observe(record.completion_tokens)
        later_tokens = record.completion_tokens / record.choices - 1
        if later_tokens > 0:
            self._tpot.labels(model).observe((now_us - first_us) / 1e6 / later_tokens)
        ended = 0
        for reason, count in record.finish_reasons.items():
            ended += count
            self._success.labels(model, _REASONS.get(reason, reason)).inc(count)
        if ended < record.choices:
            self._success.labels(model, "abort" if record.disconnected else "error").inc(record.choices - ended)


class TokenMeter:
    """Counts the tokens of one model."""

    def __init__(self, gap: Histogram, output: Counter) -> None:
        self._gap = gap
        self._output = output

    def took(self, tokens: int, passed_us: int | None) -> None:
        """Count tokens that came together, `passed_us` after the last of their choice; None: they are its first."""
        self._output.inc(tokens)
        if passed_us is not None:
            self._gap.observe(passed_us / 1e6 / tokens)
