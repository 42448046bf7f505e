"""Prometheus' configuration, its alerts and the dashboard: valid, and every query asks for what is exported."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from deploy.grafana import generate_dashboard

from docs import generate_metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"
OF_EVERY_TARGET = {"up", "process_resident_memory_bytes"}
"""What Prometheus and its client library add."""


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of every sample that is exported, by its name."""
    found: dict[str, set[str]] = {}
    for metrics in generate_metrics.exported().values():
        for metric in metrics:
            for sample in metric.samples:
                found.setdefault(sample, {"job", "instance"}).update(metric.labels)
                if sample.endswith("_bucket"):
                    found[sample].add("le")
    return found


def alerts() -> list[dict[str, Any]]:
    """Every alert."""
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def dashboard_queries() -> list[tuple[str, str]]:
    """Every query of the dashboard, with its panel's title."""
    panels = json.loads(generate_dashboard.DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


def selectors(expression: Any) -> Iterator[Any]:
    """The vector selectors in a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs", "param"):
        inner = getattr(expression, name, None)
        if inner is not None and not isinstance(inner, str | float):
            yield from selectors(inner)
    for argument in getattr(expression, "args", None) or []:
        yield from selectors(argument)


def asked_for(query: str) -> list[Any]:
    """The selectors of a query; raises if it is no PromQL."""
    found = list(selectors(promql_parser.parse(query.replace("$__rate_interval", "1m"))))
    assert len(found) >= len(set(re.findall(r"\b(?:mell_|vllm:)\w+", query))), f"not all was found in {query}"
    return found


def unknown(query: str, labels: dict[str, set[str]]) -> list[str]:
    """What a query asks for that nobody exports."""
    problems = []
    for selector in asked_for(query):
        if selector.name not in labels.keys() | OF_EVERY_TARGET:
            problems.append(selector.name)
            continue
        known = labels.get(selector.name, {"job", "instance"})
        problems += [matcher.name for matcher in selector.matchers.matchers if matcher.name not in known]
        grouped = [name for names in re.findall(r"\bby \(([^)]*)\)", query) for name in names.split(", ")]
        problems += [f"{selector.name} by {name}" for name in grouped if name not in known]
    return problems


def test_the_parser_sees_what_it_is_for(labels: dict[str, set[str]]) -> None:
    """A name, a label or a grouping that nobody exports is found; no PromQL is an error."""
    assert unknown("sum(rate(mell_nothing_total[5m]))", labels) == ["mell_nothing_total"]
    assert unknown('mell_moves_total{why="x"}', labels) == ["why"]
    assert unknown("sum by (mood) (mell_moves_total)", labels) == ["mell_moves_total by mood"]
    assert unknown("a / (2 * histogram_quantile(0.9, b))", labels) == ["a", "b"]
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        asked_for("sum(mell_moves_total")


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_asks_for_what_is_exported(alert: dict[str, Any], labels: dict[str, set[str]]) -> None:
    """And says how urgent it is and what is wrong, naming labels that its query leaves."""
    assert unknown(alert["expr"], labels) == []
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert alert["annotations"]["summary"]


@pytest.mark.parametrize(("title", "query"), dashboard_queries())
def test_a_panel_asks_for_what_is_exported(title: str, query: str, labels: dict[str, set[str]]) -> None:
    """Every query of the dashboard."""
    assert unknown(query, labels) == [], title


def test_a_legend_names_what_the_query_leaves() -> None:
    """A label in a legend is one that the query groups by, or one of each target."""
    panels = generate_dashboard.dashboard()["panels"]
    for panel in panels:
        for target in panel.get("targets", []):
            left = {name for names in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for name in names.split(", ")}
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= left | ({"job", "instance"} if " by " not in target["expr"] else set()), panel["title"]


def test_the_dashboard_is_what_its_program_writes() -> None:
    """`make docs` writes it anew; no two panels lie on each other or beside the grid."""
    assert generate_dashboard.DASHBOARD.read_text() == generate_dashboard.text()
    taken: set[tuple[int, int]] = set()
    for panel in generate_dashboard.dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells


def test_the_metrics_page_is_what_is_exported() -> None:
    """`make docs` writes it anew."""
    assert generate_metrics.PAGE.read_text(encoding="utf-8") == generate_metrics.page()


def test_prometheus_scrapes_every_service_of_the_compose_file_where_it_answers() -> None:
    """Names and ports are those of the services; alerts and dashboard go by the jobs' names."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    targets: dict[str, int] = {}
    for scrape in config["scrape_configs"]:
        assert scrape["job_name"].startswith("mell-")
        for found in scrape["dns_sd_configs"]:
            targets |= dict.fromkeys(found["names"], found["port"])
    assert targets.keys() == {name for name in services if name.startswith(("frontend", "scheduler", "gpu_worker"))}
    for name, port in targets.items():
        folder = "gpu_worker" if name.startswith("gpu_worker") else name
        dockerfile = (ROOT / "services" / folder / "Dockerfile").read_text()
        assert port == 8000 if folder == "frontend" else f"MELL_METRICS_PORT={port}" in dockerfile
    assert config["rule_files"] == ["alerts.yml"]


def test_grafana_is_provisioned_from_what_is_mounted() -> None:
    """The data source is the compose file's Prometheus; the dashboards lie where they are looked for."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/mell.yml").read_text())["providers"]
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert all((ROOT / path).is_dir() for path in mounted)
    for name in ("prometheus", "grafana"):
        assert compose[name]["profiles"] == ["observability"]
        assert compose[name]["image"].startswith(f"${{MELL_{name.upper()}_IMAGE:-")


@pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool comes with Prometheus, on no package index of Python's: apt-get install prometheus",
)
def test_promtool_accepts_the_configuration_and_the_alerts_fire() -> None:
    """Where Prometheus' own tool is installed (Debian: the package prometheus)."""
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
