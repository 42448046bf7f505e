"""Writes `dashboards/mell.json`, the Grafana dashboard: `make docs`; a test holds every query to what is exported."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).with_name("dashboards") / "mell.json"

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_HEIGHT = 8


class Panel(NamedTuple):
    """A graph, or the latest value where it is a `stat`; each query with its legend."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 8


def quantiles(metric: str, by: str = "") -> list[tuple[str, str]]:
    """Return the queries of a histogram's median, 95th and 99th percentile."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return [
        (f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))", f"{name}{legend}")
        for q, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    ]


def rate(metric: str, by: str = "") -> list[tuple[str, str]]:
    """Return the query of a counter's sum per second."""
    labels, legend = (f" by ({by})", " ".join(f"{{{{{name}}}}}" for name in by.split(", "))) if by else ("", "")
    return [(f"sum{labels} (rate({metric}[$__rate_interval]))", legend or "all")]


def mean(metric: str, name: str, by: str) -> tuple[str, str]:
    """Return the query of a histogram's mean."""
    parts = [f"sum by ({by}) (rate({metric}_{end}[$__rate_interval]))" for end in ("sum", "count")]
    return f"{parts[0]} / {parts[1]}", f"{name} {{{{{by}}}}}"


def share(part: str, whole: str, by: str = "", window: str = "$__rate_interval") -> str:
    """Return the query of one counter's rate over another's."""
    labels = f" by ({by})" if by else ""
    return f"sum{labels} (rate({part}[{window}])) / sum{labels} (rate({whole}[{window}]))"


def ratio(window: str) -> str:
    """Return the query of GPU-time over the volume bound."""
    return share("mell_gpu_seconds_total", "mell_gpu_volume_bound_seconds_total", "model", window)


KV = "sum by (model) (mell_scheduler_kv_blocks_used) / sum by (model) (mell_scheduler_kv_blocks)"
HITS = share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
STEP = share("mell_worker_step_seconds_total", "mell_worker_steps_total", "instance")

ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("GPUs active", "none", [("sum(mell_gpus_active)", "")], "stat", 3),
        Panel("GPUs wanted", "none", [("sum(mell_scheduler_gpus_wanted)", "")], "stat", 3),
        Panel("GPUs up", "none", [("sum(mell_gpus_joined)", "")], "stat", 3),
        Panel("Volume bound", "none", [("sum(mell_gpus_volume_bound)", "")], "stat", 3),
        Panel("Packing ratio, 1 h", "none", [(ratio("1h"), "{{model}}")], "stat", 3),
        Panel("KV in use", "percentunit", [(KV, "{{model}}")], "stat", 3),
        Panel("Running", "none", [("sum(vllm:num_requests_running)", "")], "stat", 3),
        Panel("Waiting", "none", [("sum(vllm:num_requests_waiting)", "")], "stat", 3),
    ],
    "What clients get": [
        Panel("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds")),
        Panel("Between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
        Panel("Whole request", "s", quantiles("vllm:e2e_request_latency_seconds")),
        Panel("Tokens generated", "short", rate("vllm:generation_tokens_total", "model_name")),
        Panel("Ends, by reason", "reqps", rate("vllm:request_success_total", "finished_reason")),
        Panel("Answers, by status", "reqps", rate("mell_http_requests_total", "status")),
    ],
    "Packing": [
        Panel(
            "GPUs",
            "none",
            [
                ("sum(mell_gpus_active)", "active"),
                ("sum(mell_gpus_volume_bound)", "volume bound"),
                ("sum(mell_scheduler_gpus_wanted)", "wanted"),
                ("sum(mell_gpus_joined)", "up"),
            ],
        ),
        Panel("GPU-time over the volume bound, 5 min", "none", [(ratio("5m"), "{{model}}")]),
        Panel("KV in use, by worker", "percentunit", [("vllm:kv_cache_usage_perc", "{{instance}}")]),
    ],
    "Moves": [
        Panel("Moves", "ops", rate("mell_moves_total", "mode, outcome")),
        Panel("KV copied", "Bps", rate("mell_move_copied_bytes_total", "mode")),
        Panel("Downtime", "s", quantiles("mell_move_stopped_seconds", "mode")),
        Panel(
            "Predicted and real",
            "s",
            [mean("mell_move_predicted_seconds", "predicted", "mode"), mean("mell_move_seconds", "took", "mode")],
        ),
        Panel("Took over predicted", "none", quantiles("mell_move_cost_ratio", "mode")),
        Panel("Failures, by reason", "ops", rate("mell_scheduler_migration_failures_total", "reason")),
    ],
    "Scheduler": [
        Panel("Planning an epoch", "s", quantiles("mell_epoch_seconds")),
        Panel("Rejections, by reason", "reqps", rate("mell_scheduler_rejected_total", "reason")),
        Panel("Queue and moves under way", "none", [
            ("sum(mell_scheduler_queue_length)", "queue"),
            ("sum(mell_scheduler_migrating)", "moving"),
        ]),
    ],
    "Workers": [
        Panel("Preemptions", "ops", rate("vllm:num_preemptions_total")),
        Panel("Prefix cache, tokens found", "percentunit", [(HITS, "found")]),
        Panel("Engine step", "s", [(STEP, "{{instance}}")]),
    ],
    "Health": [
        Panel("Broker connections", "none", [("sum by (job) (mell_bus_connected)", "{{job}}")]),
        Panel("Events queued and lost", "none", [
            ("sum by (job) (mell_events_queued)", "queued {{job}}"),
            ("sum by (job) (rate(mell_events_dropped_total[$__rate_interval]))", "lost/s {{job}}"),
        ]),
        Panel("Memory", "bytes", [('process_resident_memory_bytes{job=~"mell-.*"}', "{{job}} {{instance}}")]),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "gridPos": _place(0, top, _COLUMNS, 1), "panels": []})
        panels += _row(row, top + 1)
        top = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    return {
        "uid": "mell",
        "title": "Mell",
        "tags": ["mell"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [panel | {"id": number} for number, panel in enumerate(panels, start=1)],
    }


def _row(row: Sequence[Panel], top: int) -> list[dict[str, Any]]:
    panels, left = [], 0
    for panel in row:
        height = _HEIGHT if panel.kind == "timeseries" else _HEIGHT // 2
        if left + panel.width > _COLUMNS:
            left, top = 0, top + height
        panels.append(_panel(panel, _place(left, top, panel.width, height)))
        left += panel.width
    return panels


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
        for number, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def text() -> str:
    """Return the dashboard as it is kept."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text(), encoding="utf-8")
