"""Bounds on what lasts: as many as there are seats, also when several come at the same moment."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from mell_frontend.app import create_app
from mell_frontend.errors import ApiError
from mell_frontend.event_feed import EventFeed
from mell_frontend.seats import Seats
from mell_frontend.settings import FrontendSettings
from mell_shared.events.memory import MemoryEventStore
from tests.frontend.scripted_gateway import ScriptedGateway


def test_a_seat_is_free_again_when_its_holder_has_left() -> None:
    """However it left."""
    seats = Seats(1, "all taken")
    with suppress(KeyError), seats.taken():
        with pytest.raises(ApiError, match="all taken") as refused, seats.taken():
            pytest.fail("two on one seat")
        assert (refused.value.status, refused.value.code) == (503, "overloaded")
        raise KeyError
    with seats.taken():
        pass


class SlowStore(MemoryEventStore):
    """A broker that answers late: whoever asks meanwhile comes at the same moment."""

    async def last_position(self) -> int:
        """After everybody has asked."""
        for _ in range(20):
            await asyncio.sleep(0)
        return await super().last_position()


async def test_readers_who_come_together_are_counted_before_they_are_let_in(
    gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at once, two seats: one is told so, and there is room again afterwards."""
    feed = EventFeed(SlowStore(), 60.0)
    monkeypatch.setattr(feed, "seats", Seats(2, "full"))
    settings = FrontendSettings(_env_file=None, models=["fake"], model_dir=tmp_path)
    app = create_app(settings, gateway, [], CollectorRegistry(), feed=feed)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
        asks = [asyncio.create_task(client.get("/admin/events?follow=true")) for _ in range(3)]
        (refused,), _ = await asyncio.wait(asks, return_when=asyncio.FIRST_COMPLETED)
        told: dict[str, Any] = refused.result().json()
        assert (refused.result().status_code, told["error"]["code"]) == (503, "overloaded")
        feed.stop()
        served = await asyncio.gather(*(ask for ask in asks if ask is not refused))
        assert [answer.status_code for answer in served] == [200, 200]
        assert (await client.get("/admin/events")).status_code == 200
