"""The gateway's counts for Prometheus; read when asked for, so that the token path carries no metrics."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mell_frontend.gateway import BusGateway

_HELP = {
    "sequences_opened": "Sequences begun.",
    "sequences_finished": "Sequences that came to their end.",
    "sequences_failed": "Sequences that could not be run or finished.",
    "sequences_closed": "Sequences whose reader left before their end.",
    "tokens_accepted": "Tokens taken from their owners.",
    "tokens_repeated": "Tokens dropped because they had been accepted before.",
    "rows_stale": "Token rows dropped because their sender did not own the sequence.",
    "gaps": "Token rows that came too early: some before them were missing.",
    "resends": "Requests to workers to send tokens again.",
    "submissions": "Submissions to workers.",
    "resubmissions": "Sequences placed again after their owner was lost or gave them up.",
    "claims_granted": "Moves granted.",
    "claims_refused": "Moves refused.",
    "evictions": "Sequences that workers gave up.",
    "asks_failed": "Requests to the scheduler or a worker without an answer.",
    "replies_invalid": "Replies that could not be read.",
    "replies_unsent": "Replies lost because the connection was down.",
    "messages_invalid": "Messages dropped because they could not be read.",
}


class GatewayCollector(Collector):
    """All counts of a gateway and its core."""

    def __init__(self, gateway: BusGateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        yield GaugeMetricFamily("mell_streams_open", "Sequences being streamed.", self._gateway.open_streams)
        yield GaugeMetricFamily("mell_frontend_ready", "1 while requests can be served.", int(self._gateway.ready))
        for name, count in self._gateway.counts.items():
            yield CounterMetricFamily(f"mell_stream_{name}", _HELP[name], count)
