"""Fixtures for the HTTP side: a scripted gateway, the app around it, and clients of it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from mell_frontend.app import create_app
from mell_frontend.asgi import App
from mell_frontend.served import load_models
from mell_frontend.settings import FrontendSettings
from tests.frontend.scripted_gateway import ScriptedGateway


@pytest.fixture
def gateway() -> ScriptedGateway:
    """A gateway that says `Hello, world!` until a test gives it another script."""
    return ScriptedGateway()


@pytest.fixture
def build_app(gateway: ScriptedGateway, tmp_path: Path) -> Callable[..., App]:
    """Make an app with some settings changed; it serves the `fake` model."""

    def build(**changed: object) -> App:
        settings = FrontendSettings(_env_file=None, **{"models": ["fake"], "model_dir": tmp_path, **changed})
        models = load_models(settings.models, settings.model_dir, settings.max_model_len)
        return create_app(settings, gateway, models, CollectorRegistry())

    return build


@pytest_asyncio.fixture
async def connect(build_app: Callable[..., App]) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    """Make in-process clients of apps with some settings changed; they are closed at the end."""
    clients: list[httpx.AsyncClient] = []

    def make(**changed: object) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=build_app(**changed))
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://localhost"))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


@pytest_asyncio.fixture
async def client(connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """An in-process client of the app with default settings."""
    return connect()
