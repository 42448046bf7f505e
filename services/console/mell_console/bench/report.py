"""A bench report for people: two tables and, where a figure must be doubted, a line that says so."""

from typing import Any

from rich.console import Console
from rich.table import Table

_LATENCIES = {
    "ttft_ms": "time to first token",
    "inter_token_ms": "between pieces",
    "per_token_ms": "per output token",
    "end_to_end_ms": "end to end",
    "late_ms": "sent late by",
}
_COLUMNS = ("mean", "p50", "p90", "p99", "max")
_BUSY_SHARE = 0.8
_LATE_MS = 50.0


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the figures of `report`."""
    console.print(_totals(report))
    console.print(_latencies(report))
    for warning in warnings(report):
        console.print(f"note: {warning}", style="yellow", highlight=False, soft_wrap=True)


def warnings(report: dict[str, Any]) -> list[str]:
    """Return what the reader should know before believing the figures."""
    found = [f"{count} x {kind}" for kind, count in report["errors"].items()]
    if report["client_cpu_share"] > _BUSY_SHARE:
        found.append(
            f"this client used {report['client_cpu_share']:.0%} of a core: it may be the limit, not the server"
        )
    if report["late_ms"].get("p99", 0.0) > _LATE_MS:
        found.append("requests were sent late: the client could not keep up with the planned rate")
    if report["tokens_counted_by"] != "usage":
        found.append(f"the server gives no usage for every answer: tokens are counted by {report['tokens_counted_by']}")
    return found


def _totals(report: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_row("requests", f"{report['whole']} whole of {report['requests']} in {report['duration_s']:.1f} s")
    prompt = f"{report['prompt_tokens']:,} prompt ({report['cached_tokens']:,} cached)"
    table.add_row("tokens", f"{prompt}, {report['output_tokens']:,} output")
    rates = f"{report['output_tokens_per_s']:,.1f} output tokens/s, {report['total_tokens_per_s']:,.1f} with prompts"
    table.add_row("rate", f"{rates}, {report['requests_per_s']:,.2f} requests/s")
    table.add_row("client", f"{report['client_cpu_share']:.0%} of a core")
    return table


def _latencies(report: dict[str, Any]) -> Table:
    table = Table("milliseconds", *_COLUMNS, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, label in _LATENCIES.items():
        values = report[name]
        if values and (name != "late_ms" or values["max"] > 0):
            table.add_row(label, *(f"{values[column]:,.1f}" for column in _COLUMNS))
    return table
