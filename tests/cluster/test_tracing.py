"""One trace through real processes: client, frontend, scheduler, workers, and a move between them."""

from collections.abc import Iterator
from typing import Any

import pytest

from mell_shared.tracing import trace_of
from tests.cluster.stack import QUICK, Stack, StreamedChat, eventually
from tests.shared.test_tracing import CLIENTS, Collector, collecting

pytestmark = pytest.mark.connected


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """A collector."""
    with collecting() as server:
        yield server


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Stack]:
    """A scheduler and two workers, all of which send spans."""
    sending = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
    settings = {**QUICK, "MELL_OTLP_ENDPOINT": collector.url, **sending}
    with Stack(tmp_path_factory.mktemp("tracing"), settings) as stack:
        for service in [
            stack.start_scheduler(),
            *(stack.start_worker(name, step_us=20_000) for name in ("one", "two")),
        ]:
            service.ready()
        yield stack


def attributes(span: Any) -> dict[str, Any]:
    """A span's attributes, by their plain values."""
    return {
        attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value")) for attribute in span.attributes
    }


def spans_of(collector: Collector, traceparent: str) -> dict[str, list[tuple[str, Any]]]:
    """The spans of a trace, by their names."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for service, span in collector.spans():
        if span.trace_id.hex() == trace_of(traceparent):
            found.setdefault(span.name, []).append((service, span))
    return found


def test_a_request_that_moves_is_one_trace(stack: Stack, collector: Collector) -> None:
    """Every span belongs to the client's trace and has its parent in it; a move is told by all who take part."""
    frontend = stack.start_frontend()
    with stack.client(frontend) as client:
        client.headers.update({"traceparent": CLIENTS, "x-request-id": "traced"})
        stream = StreamedChat(client, 600)
        stream.read(20)
        del client.headers["traceparent"]
        status = eventually(
            lambda: (
                (seen := client.get("/admin/status?sequences=true").json())
                and (len(seen["workers"]), len(seen["sequences"])) == (2, 1)
                and seen
            ),
            "both workers and the request are known",
        )
        (here,) = {row["worker"] for row in status["sequences"]}
        there = next(worker["worker"] for worker in status["workers"] if worker["worker"] != here)
        moved = client.post("/admin/requests/traced/migrate", json={"to": there}).json()["moves"]
        assert moved[0]["state"] == "committed"
        stream.read()
    route = "POST /v1/chat/completions"
    placing = {route: 1, "ask for a place": 1, "place": 1, "submit": 1}
    expected = {**placing, "generate": 2, "migrate": 1, "move out": 1, "move in": 1}
    eventually(
        lambda: sum(map(len, spans_of(collector, CLIENTS).values())) >= sum(expected.values()),
        lambda: f"the spans of a request and its move: {sorted(spans_of(collector, CLIENTS))}",
    )
    found = spans_of(collector, CLIENTS)
    assert {name: len(spans) for name, spans in found.items()} == expected
    services = {name: {service for service, _ in spans} for name, spans in found.items()}
    assert services[route] == services["submit"] == {"mell-frontend"}
    assert services["place"] == services["migrate"] == {"mell-scheduler"}
    assert services["generate"] == services["move out"] == services["move in"] == {"mell-gpu-worker"}
    ids = {span.span_id for spans in found.values() for _, span in spans}
    root = found[route][0][1]
    assert root.parent_span_id.hex() == CLIENTS.split("-")[2]
    assert all(span.parent_span_id in ids for spans in found.values() for _, span in spans if span is not root)
    told = attributes(root)
    assert (told["gen_ai.usage.output_tokens"], told["http.response.status_code"]) == (600, 200)
    assert [event.name for event in root.events] == ["first token"]
    outgoing, incoming = found["move out"][0][1], found["move in"][0][1]
    assert attributes(outgoing)["mell.worker"] == here
    assert attributes(incoming)["mell.worker"] == there
    assert incoming.parent_span_id == outgoing.span_id
    assert outgoing.parent_span_id == found["migrate"][0][1].span_id
    assert {attributes(span)["mell.worker"] for _, span in found["generate"]} == {here, there}
    assert "story" not in str(collector.requests)
    expected_ids = {trace_of(CLIENTS), None}
    eventually(
        lambda: {event.get("trace_id") for event in frontend.events("request")} == expected_ids, "requests are logged"
    )


def test_a_refused_request_is_an_error_in_its_trace(stack: Stack, collector: Collector) -> None:
    """With the code that its client saw."""
    clients = CLIENTS.replace("0af7", "1bf7")
    with stack.client(stack.start_frontend()) as client:
        body = {"model": "fake", "prompt": "x" * 5_000, "max_tokens": 1}
        answer = client.post("/v1/completions", json=body, headers={"traceparent": clients})
        assert answer.is_error
    spans = eventually(lambda: spans_of(collector, clients).get("POST /v1/completions"), "the request's span")
    assert spans[0][1].status.message == answer.json()["error"]["code"]
