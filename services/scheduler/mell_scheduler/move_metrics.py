"""What moves cost, and what they were predicted to: for Prometheus, as the leading scheduler settles them."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from mell_scheduler.core import MigrationSettled

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STOPPED = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_RATIOS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)


class MoveMetrics:
    """Counters and histograms of moves, by mode."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["mode"], buckets=buckets, registry=registry)

        labels = ["mode", "cause", "outcome"]
        self._moves = Counter("mell_moves", "Moves settled, by mode, cause and outcome.", labels, registry=registry)
        self._bytes = Counter("mell_move_copied_bytes", "KV copied by moves.", ["mode"], registry=registry)
        self._tokens = Counter("mell_move_prefilled_tokens", "Tokens prefilled by moves.", ["mode"], registry=registry)
        self._stopped = histogram(
            "mell_move_stopped_seconds", "Downtime: last token at the source to the first at the target.", _STOPPED
        )
        self._took = histogram("mell_move_seconds", "From the order to the news of the move's end.", _SECONDS)
        self._predicted = histogram("mell_move_predicted_seconds", "What the planner expected.", _SECONDS)
        self._ratio = histogram("mell_move_cost_ratio", "What a move took over what was expected.", _RATIOS)

    def settled(self, move: MigrationSettled) -> None:
        """Count a move that is over; costs are those of moves that were made and told of."""
        # An end with as many moves as it may have is no fault: a drain of many meets it, and they go an epoch later.
        busy = move.outcome == "failed" and move.reason.partition(":")[0] == "busy"
        self._moves.labels(move.mode, move.cause, "busy" if busy else move.outcome).inc()
        if move.outcome != "committed":
            return
        self._bytes.labels(move.mode).inc(move.copied_bytes)
        self._tokens.labels(move.mode).inc(move.prefilled_tokens)
        self._took.labels(move.mode).observe(move.took_us / 1e6)
        if move.stopped_us:
            self._stopped.labels(move.mode).observe(move.stopped_us / 1e6)
        if move.predicted_us:
            self._predicted.labels(move.mode).observe(move.predicted_us / 1e6)
            self._ratio.labels(move.mode).observe(move.took_us / move.predicted_us)
