"""The command line: what it prints and writes, and that errors are sentences."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mell_scheduler.sim.command import simulate_command

KEYS = {
    "gpu_mean",
    "gpu_peak",
    "gpu_seconds",
    "volume_bound_gpu_seconds",
    "ratio",
    "memory_use",
    "moves",
    "moves_per_s",
    "moved_tokens_per_s",
    "preemptions",
    "rejected",
    "decision_p50_us",
    "decision_p99_us",
}
SHORT = ("paper:1.1", "--until-s", "120", "--policy", "repack,worst-fit")


@pytest.fixture
def app() -> typer.Typer:
    """The command alone."""
    app = typer.Typer()
    app.command()(simulate_command)
    return app


def figures(app: typer.Typer, tmp_path: Path, *flags: str) -> dict[str, object]:
    """Run and read the JSON back."""
    file = tmp_path / "out.json"
    result = CliRunner().invoke(app, [*SHORT, "--json", str(file), *flags])
    assert result.exit_code == 0, result.output
    report: dict[str, object] = json.loads(file.read_text())
    return report


def test_json_has_exactly_the_agreed_keys(app: typer.Typer, tmp_path: Path) -> None:
    """The JSON's shape is an interface."""
    report = figures(app, tmp_path)
    assert list(report) == ["trace", "settings", "policies"]
    policies = report["policies"]
    assert isinstance(policies, dict)
    assert list(policies) == ["repack", "worst-fit"]
    assert all(set(row) == KEYS for row in policies.values())


def test_json_can_go_to_standard_output(app: typer.Typer) -> None:
    """A dash prints the figures alone, for the next program in a pipe; the table goes beside them."""
    result = CliRunner().invoke(app, [*SHORT, "--json", "-"])
    assert set(json.loads(result.stdout)["policies"]) == {"repack", "worst-fit"}
    assert "volume bound" in " ".join(result.stderr.split())


def test_a_seed_fixes_a_run(app: typer.Typer, tmp_path: Path) -> None:
    """Equal flags give equal figures and decisions, times taken to decide excepted; another seed others."""
    logs = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    reports = [
        figures(app, tmp_path, "--seed", seed, "--save-decisions", str(log))
        for log, seed in zip(logs, ("1", "1", "2"), strict=True)
    ]
    for report in reports:
        for row in report["policies"].values():  # type: ignore[attr-defined]
            del row["decision_p50_us"], row["decision_p99_us"]
    assert reports[0] == reports[1]
    assert logs[0].read_text() == logs[1].read_text()
    assert reports[0]["policies"] != reports[2]["policies"]
    first = json.loads(logs[0].read_text().splitlines()[0])
    assert first["policy"] == "repack"
    assert first["kind"] == "place"


def test_the_table_shows_the_saving(app: typer.Typer) -> None:
    """Each policy has a row, and the figures fit into 80 columns."""
    result = CliRunner().invoke(app, SHORT)
    assert result.exit_code == 0
    rows = [line for line in result.output.splitlines() if line.startswith(("repack", "worst-fit"))]
    assert len(rows) == 2
    assert all("…" not in row and "%" in row for row in rows)


def test_the_page_is_self_contained(app: typer.Typer, tmp_path: Path) -> None:
    """The HTML draws its plots itself and fetches nothing."""
    file = tmp_path / "page.html"
    assert CliRunner().invoke(app, [*SHORT, "--html", str(file)]).exit_code == 0
    page = file.read_text()
    assert page.count("<svg") == 5
    assert page.count("<polyline") == 10
    assert "http" not in page
    assert "moved tokens per request" in page
    assert "copied bytes per s" in page
    assert "<script" not in page


WRONG = {
    ("nowhere.csv",): "cannot read nowhere.csv",
    ("paper:fast",): "expected paper:RATE",
    ("paper:-1",): "expected paper:RATE",
    ("paper:1", "--policy", "best"): "unknown policy 'best': choose one of repack",
    ("paper:1", "--policy", ","): "unknown policy",
    ("paper:1", "--model", "gpt-9"): "unknown model 'gpt-9': known are",
    ("paper:1", "--gpu", "abacus"): "unknown GPU 'abacus': known are",
    ("paper:1", "--model", "llama-3.1-70b"): "does not fit on 1 x a100-40",
    ("paper:1", "--capacity-tokens", "5"): "every request is over the capacity of 5 tokens",
    ("paper:1", "--until-s", "10", "--warmup-s", "20"): "leaves nothing of 10 s",
    ("paper:1", "--until-s", "10", "--json", "no/such/folder.json"): "cannot write no/such/folder.json: No such file",
    ("paper:1", "--until-s", "10", "--html", "/"): "cannot write /: Is a directory",
    ("paper:1", "--until-s", "10", "--equal-slo"): "give --mode timed too",
    ("paper:1", "--until-s", "10", "--gpus", "4"): "give --mode timed too",
    ("paper:1", "--move-s", "inf"): "Invalid value for '--move-s'",
    ("paper:1", "--length-scale", "inf"): "Invalid value for '--length-scale'",
}


@pytest.mark.parametrize("flags", WRONG, ids=" ".join)
def test_errors_are_sentences(app: typer.Typer, flags: tuple[str, ...]) -> None:
    """What the user got wrong is said in one line, with exit code 2 and no traceback."""
    result = CliRunner().invoke(app, list(flags))
    assert result.exit_code == 2
    assert WRONG[flags] in result.stderr
    assert "Traceback" not in result.output + result.stderr


def test_capacity_follows_from_names(app: typer.Typer, tmp_path: Path) -> None:
    """LLaMA-2-13B on 40 GB holds about 12,170 tokens; two cards per instance hold more."""
    one = figures(app, tmp_path)["settings"]
    two = figures(app, tmp_path, "--gpus-per-instance", "2")["settings"]
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    assert abs(one["capacity_tokens"] - 12_170) < 10
    assert two["capacity_tokens"] > 50_000


def test_timed_mode_shows_latency(app: typer.Typer, tmp_path: Path) -> None:
    """Timed mode prints the share of requests within the objectives and adds latency to the JSON."""
    file = tmp_path / "timed.json"
    flags = ["paper:0.5", "--mode", "timed", "--until-s", "30", "--policy", "repack", "--json", str(file)]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert "TTFT" in result.output
    assert set(json.loads(file.read_text())["timed"]["repack"]) >= {
        "attainment",
        "ttft_p99_s",
        "gpu_hours",
        "moves_per_request",
        "copied_bytes_per_s",
        "prefilled_tokens_per_request",
    }


def test_timed_mode_tells_its_decisions(app: typer.Typer, tmp_path: Path) -> None:
    """Times taken to decide are in the JSON, each decision in the file, and latency on the page."""
    report, log, page = tmp_path / "t.json", tmp_path / "t.jsonl", tmp_path / "t.html"
    files = ["--json", str(report), "--save-decisions", str(log), "--html", str(page)]
    flags = ["paper:0.5", "--mode", "timed", "--until-s", "30", "--policy", "repack,best-fit", *files]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["policies"]["repack"]["decision_p99_us"] > 0
    first = json.loads(log.read_text().splitlines()[0])
    assert (first["policy"], first["kind"], first["item"]) == ("repack", "place", "r0")
    assert page.read_text().count("Time to first token") == 2 * 2


def test_the_highest_rate_on_a_number_of_gpus(app: typer.Typer, tmp_path: Path) -> None:
    """With GPUs that are one's own the question is the rate; without objectives to hold there is none."""
    file = tmp_path / "dual.json"
    flags = ["paper:0.3", "--mode", "timed", "--until-s", "20", "--policy", "repack", "--gpus", "6", "--slo", "50,2,9"]
    result = CliRunner().invoke(app, [*flags, "--equal-slo", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "times the rate" in " ".join(result.output.split())
    assert json.loads(file.read_text())["timed"]["repack"]["highest_rate"]["rate_multiple"] > 0
    refused = CliRunner().invoke(app, flags)
    assert refused.exit_code == 2
    assert "--equal-slo" in refused.stderr


@pytest.mark.parametrize("slo", ["5", "a,b,c", "0.5,1,1"])
def test_objectives_are_checked(app: typer.Typer, slo: str) -> None:
    """Wrong objectives are named."""
    result = CliRunner().invoke(app, ["paper:0.5", "--mode", "timed", "--slo", slo])
    assert result.exit_code == 2
    assert "expected three multiples" in result.stderr
