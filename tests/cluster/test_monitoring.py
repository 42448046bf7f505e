"""Real processes export what the metrics page says, and nothing else; the figures are those of what happened."""

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from docs import generate_metrics
from tests.cluster.stack import Stack, eventually, whole_text
from tests.ports import free_port

pytestmark = pytest.mark.connected


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """A stack that has answered one request of 20 tokens; where each service is scraped."""
    found = {"scheduler": free_port(), "gpu_worker": free_port()}
    with Stack(tmp_path_factory.mktemp("monitoring")) as stack:
        stack.start_scheduler("--metrics-port", str(found["scheduler"])).ready()
        stack.start_worker("one", "--metrics-port", str(found["gpu_worker"])).ready()
        frontend = stack.start_frontend()
        with stack.client(frontend) as client:
            whole_text(client, 20)
            found["frontend"] = client.base_url.port or 0
        yield found


def page(port: int) -> str:
    """What a service answers to a scrape."""
    return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=60).text


def scraped(port: int) -> dict[tuple[str, str], float]:
    """Every sample of a service, by its name and labels."""
    text = page(port)
    return {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("service", ["frontend", "scheduler", "gpu_worker"])
def test_a_service_exports_what_the_page_says(ports: dict[str, int], service: str) -> None:
    """By name and type."""
    text = page(ports[service])
    of_the_process = ("process_", "python_")
    families = {
        (family.name, family.type)
        for family in text_string_to_metric_families(text)
        if not family.name.startswith(of_the_process) and not family.name.endswith("_created")
    }
    assert families == {(metric.name, metric.kind) for metric in generate_metrics.exported()[service]}
    assert "process_resident_memory_bytes" in text


def test_the_figures_are_those_of_the_request(ports: dict[str, int]) -> None:
    """Tokens at the frontend, time of GPUs at the scheduler, the cache at the worker."""
    model = "[('model_name', 'fake')]"
    tokens = ("vllm:generation_tokens_total", model)
    eventually(lambda: scraped(ports["frontend"])[tokens] == 20, "the answer is counted")
    frontend, worker = scraped(ports["frontend"]), scraped(ports["gpu_worker"])
    assert worker["vllm:prefix_cache_queries_total", model] == frontend["vllm:prompt_tokens_total", model]
    seconds = ("mell_gpu_seconds_total", "[('model', 'fake')]")
    eventually(lambda: seconds in scraped(ports["scheduler"]), "an epoch has passed")
    eventually(lambda: scraped(ports["frontend"])["mell_events_written_total", "[]"] >= 3, "events are written")
