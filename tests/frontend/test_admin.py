"""The operators' API in-process: who may ask, what is sent to the scheduler, how its answers are told."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import structlog

from mell_frontend.admin_gate import is_local
from mell_frontend.generation import GenerationError
from mell_shared.messages.admin import (
    AdminRefused,
    AdminReply,
    DrainReply,
    DrainRequest,
    DrainRow,
    ExplainRequest,
    Explanation,
    MigrateReply,
    MigrateRequest,
    MoveResult,
    MovingReply,
    MovingRequest,
    StatusRequest,
    Story,
    UndrainRequest,
)
from tests.frontend.scripted_gateway import ScriptedGateway

Connect = Callable[..., httpx.AsyncClient]
MIGRATE = "/admin/requests/chatcmpl-1/migrate"


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"authorization": f"Bearer {key}"}


def moves(*states: str) -> MigrateReply:
    """The scheduler's answer that the moves of a request's choices stand so."""
    results = tuple(
        MoveResult(sequence=f"s.0.{at}", state=state)  # type: ignore[arg-type]
        for at, state in enumerate(states)
    )
    return MigrateReply(target="w2-x", moves=results)


# --- who may ask


async def test_with_an_admin_key_only_that_key_opens_admin(connect: Connect) -> None:
    """No key, an API key and another scheme do not, from this machine neither; the admin key opens nothing else."""
    client = connect(admin_key="secret", api_keys=["one"])
    for headers in ({}, bearer("one"), bearer("secre"), {"authorization": "Basic secret"}, bearer("")):
        for ask in (client.get("/admin/status", headers=headers), client.post("/admin/moves/pause", headers=headers)):
            response = await ask
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_admin_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert (await client.get("/admin/status", headers=bearer("secret"))).status_code == 200
    assert (await client.get("/v1/models", headers=bearer("secret"))).status_code == 401


async def test_without_an_admin_key_this_machine_may_ask(connect: Connect, gateway: ScriptedGateway) -> None:
    """No key is needed, also where users need one: theirs would not do for operators elsewhere."""
    client = connect(api_keys=["one"])
    assert (await client.get("/admin/status")).status_code == 200
    gateway.answers.append(MovingReply(paused=True))
    assert (await client.post("/admin/moves/pause")).json()["paused"] is True


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "1.2.3.4"},
        {"forwarded": "for=1.2.3.4"},
        {"x-real-ip": "1.2.3.4"},
        {"via": "1.1 proxy"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8000"},
        {"host": "[::1"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
    ids=str,
)
async def test_a_proxy_and_a_web_page_are_not_this_machine(
    client: httpx.AsyncClient, gateway: ScriptedGateway, headers: dict[str, str]
) -> None:
    """What may speak for others is refused, and told to set a key; nothing reaches the scheduler."""
    response = await client.post("/admin/workers/w1/drain", headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "admin_key_not_set"
    assert "MELL_ADMIN_KEY" in response.json()["error"]["message"]
    assert gateway.orders == []


@pytest.mark.parametrize(
    ("peer", "host", "local"),
    [
        ("127.0.0.1", b"127.0.0.1:8000", True),
        ("127.9.9.9", b"localhost", True),
        ("::1", b"[::1]:8000", True),
        ("::ffff:127.0.0.1", b"localhost:1", True),
        ("10.0.0.7", b"localhost:8000", False),
        ("::ffff:10.0.0.7", b"localhost:8000", False),
        ("127.0.0.1", b"10.0.0.7:8000", False),
        ("", b"localhost", False),
    ],
)
def test_this_machine_is_known_by_both_addresses(peer: str, host: bytes, local: bool) -> None:
    """The peer's, and the one it asked for."""
    assert is_local({"client": (peer, 1) if peer else None, "headers": [(b"host", host)]}) is local


async def test_the_page_of_this_machine_may_ask(client: httpx.AsyncClient) -> None:
    """A page that this frontend itself serves to a browser here."""
    response = await client.get("/admin/status", headers={"origin": "http://127.0.0.1:8000"})
    assert response.status_code == 200


async def test_the_key_may_be_set_as_its_digest(connect: Connect) -> None:
    """So that nobody who reads the settings can use it."""
    client = connect(admin_key=f"sha256:{hashlib.sha256(b'secret').hexdigest()}")
    assert (await client.get("/admin/status", headers=bearer("secret"))).status_code == 200
    assert (await client.get("/admin/status", headers=bearer("sha256:"))).status_code == 401


async def test_the_key_is_not_kept_in_the_clear_by_the_guard(build_app: Callable[..., Any]) -> None:
    """Its settings' text form hides it, and the guard has a digest."""
    from mell_frontend.settings import FrontendSettings

    assert "secret" not in repr(FrontendSettings(_env_file=None, admin_key="secret"))
    app = build_app(admin_key="secret")
    assert "secret" not in repr(vars(app._app))


# --- what is asked


async def test_orders_reach_the_scheduler_as_they_were_given(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    """Each path and body becomes one message."""
    drained = DrainReply(worker="w1-x", name="w1", draining=True, sequences=(DrainRow(sequence="s", blocks=3),))
    story = Explanation(stories=(Story(sequence="a/b.0.0", state="over"),))
    gateway.answers += [drained, drained, drained, MovingReply(paused=False), story]
    response = await client.post("/admin/workers/w1/drain", json={"deadline_s": 30, "dry_run": True})
    assert response.json()["sequences"][0]["blocks"] == 3
    await client.post("/admin/workers/w1/drain")
    await client.post("/admin/workers/w1-x/undrain")
    await client.post("/admin/moves/resume", json={})
    response = await client.get("/admin/requests/a%2Fb")
    assert response.json()["stories"][0]["sequence"] == "a/b.0.0"
    await client.get("/admin/status?sequences=true")
    assert gateway.orders == [
        DrainRequest(worker="w1", deadline_s=30, dry_run=True),
        DrainRequest(worker="w1"),
        UndrainRequest(worker="w1-x"),
        MovingRequest(paused=False),
        ExplainRequest(request="a/b"),
        StatusRequest(sequences=True),
    ]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/admin/workers/w1/drain", {"deadline": 30}, "deadline"),
        ("/admin/workers/w1/drain", {"deadline_s": -1}, "deadline_s"),
        ("/admin/workers/w1/drain", {"dry_run": "yes"}, "dry_run"),
        (MIGRATE, {}, "to"),
        (MIGRATE, {"to": "w2", "mode": "magic"}, "mode"),
        (MIGRATE, {"to": "", "mode": "kv"}, "to"),
        (f"/admin/workers/{'w' * 201}/undrain", {}, "worker"),
    ],
)
async def test_a_wrong_order_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, body: dict[str, Any], param: str
) -> None:
    """Also a field that does not exist: a deadline with a slip of the pen must not be none."""
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert gateway.orders == []


async def test_what_is_no_json_or_no_bool_is_a_400(client: httpx.AsyncClient) -> None:
    """Like everywhere."""
    assert (await client.post("/admin/workers/w1/drain", content=b"{")).status_code == 400
    assert (await client.get("/admin/status?sequences=maybe")).status_code == 400


# --- what is answered


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("unknown_worker", 404),
        ("unknown_request", 404),
        ("over", 410),
        ("wrong_model", 400),
        ("no_room", 409),
        ("already_moving", 409),
        ("not_leader", 503),
        ("unreachable", 503),
    ],
)
async def test_refusals_are_errors_with_the_scheduler_s_words(
    client: httpx.AsyncClient, gateway: ScriptedGateway, reason: str, status: int
) -> None:
    """The reason is the error's code; what may be possible in a moment says when to ask again."""
    gateway.answers.append(AdminRefused.model_validate({"reason": reason, "message": "because"}))
    response = await client.post(MIGRATE, json={"to": "w2"})
    assert response.status_code == status
    assert response.json()["error"]["code"] == reason
    assert response.json()["error"]["message"] == "because"
    assert ("retry-after" in response.headers) == (status == 503)


async def test_an_order_waits_for_a_leader_that_does_not_know_everybody_yet(
    client: httpx.AsyncClient, gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of leaders costs an operator a moment; a leader that never gets to know is told of in the end."""
    early = AdminRefused(reason="not_ready", message="just begun")
    gateway.answers += [early, early, moves("committed")]
    assert (await client.post(MIGRATE, json={"to": "w2"})).status_code == 200
    assert len(set(gateway.orders)) == 1
    monkeypatch.setattr("mell_frontend.admin._NEW_LEADER_S", 0.0)
    gateway.answers.append(early)
    response = await client.post(MIGRATE, json={"to": "w2"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert "retry-after" in response.headers


async def test_a_move_is_followed_to_its_end(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """The same ask is repeated until every sequence's move has come out; a scheduler that is away costs time only."""
    away = GenerationError("unavailable", "no scheduler answers")
    gateway.answers += [moves("moving", "committed"), away, moves("moving", "committed"), moves("failed", "committed")]
    response = await client.post(MIGRATE, json={"to": "w2", "mode": "hybrid"})
    assert response.status_code == 200
    assert [move["state"] for move in response.json()["moves"]] == ["failed", "committed"]
    (first, *others) = gateway.orders
    assert isinstance(first, MigrateRequest)
    assert (first.request, first.target, first.mode) == ("chatcmpl-1", "w2", "hybrid")
    assert others == [first] * 3


async def test_a_wait_outlasts_a_change_of_leaders(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """What a new leader cannot say yet is no answer about a move under way; what it will not say ever is."""
    changing = [AdminRefused(reason="not_leader", message="no"), AdminRefused(reason="not_ready", message="no")]
    gateway.answers += [moves("moving"), *changing, moves("there")]
    response = await client.post(MIGRATE, json={"to": "w2"})
    assert (response.status_code, response.json()["moves"][0]["state"]) == (200, "there")
    gateway.answers += [moves("moving"), AdminRefused(reason="over", message="it has ended")]
    assert (await client.post(MIGRATE, json={"to": "w2"})).status_code == 410


async def test_a_leader_that_goes_before_it_answers_may_have_begun_the_move(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    """So the next is asked the same; where surely nobody has heard it, that is said at once."""
    silent = GenerationError("unavailable", "no scheduler answers (timeout)", in_doubt=True)
    absent = GenerationError("unavailable", "no scheduler answers (no responder)")
    gateway.answers += [silent, absent, AdminRefused(reason="not_ready", message="no"), moves("committed")]
    response = await client.post(MIGRATE, json={"to": "w2"})
    assert (response.status_code, response.json()["moves"][0]["state"]) == (200, "committed")
    assert len(set(gateway.orders)) == 1
    gateway.answers.append(silent)
    assert (await client.post(MIGRATE, json={"to": "w2", "wait_s": 0})).status_code == 503
    gateway.answers.append(absent)
    assert (await client.post(MIGRATE, json={"to": "w2"})).status_code == 503
    assert not gateway.answers


async def test_who_waits_no_longer_gets_it_as_it_stands(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """202: begun, not over."""
    gateway.answers.append(moves("moving"))
    response = await client.post(MIGRATE, json={"to": "w2", "wait_s": 0})
    assert response.status_code == 202
    assert len(gateway.orders) == 1


async def test_two_orders_are_two_asks(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Only a repeat of one and the same is taken for a repeat."""
    answers: list[AdminReply | GenerationError] = [moves("committed"), moves("there")]
    gateway.answers += answers
    for _ in range(2):
        await client.post(MIGRATE, json={"to": "w2"})
    first, second = gateway.orders
    assert isinstance(first, MigrateRequest)
    assert isinstance(second, MigrateRequest)
    assert first.ask != second.ask


async def test_every_operation_is_described(client: httpx.AsyncClient) -> None:
    """The OpenAPI document has paths, parameters, bodies and answers; `/docs` shows them."""
    text = (await client.get("/openapi.json")).text
    document = json.loads(text)
    drain = document["paths"]["/admin/workers/{worker}/drain"]["post"]
    assert [parameter["name"] for parameter in drain["parameters"]] == ["worker"]
    assert drain["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/DrainBody")
    assert drain["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/DrainReply")
    assert set(document["paths"]["/admin/requests/{request}"]) == {"get"}
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= set(document["components"]["schemas"])
    page = (await client.get("/docs")).text
    assert "/admin/requests/{request}/migrate" in page
    assert "<code>wait_s</code>" in page


async def test_the_log_has_every_name_of_a_request(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """Its answer's id, which its sequences carry, beside the `x-request-id`; the scheduler learns both."""
    ask = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "n": 2}
    with structlog.testing.capture_logs() as lines:
        response = await client.post("/v1/chat/completions", json=ask, headers={"x-request-id": "mine"})
    answer = response.json()["id"]
    (line,) = lines
    assert (line["request_id"], line["answer_id"]) == ("mine", answer)
    asked = [(request.sequence, request.request_id) for request in gateway.requests]
    assert asked == [(f"{answer}.0.0", "mine"), (f"{answer}.0.1", "mine")]
