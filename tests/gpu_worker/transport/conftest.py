"""The stage that every test of the transport contract runs on, once for each transport."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.gpu_worker.transport.stage import Stage


@pytest_asyncio.fixture(params=["memory", "tcp", "ucx"])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    """A stage of each kind; leaving it checks for leaks."""
    made = Stage(request.param)
    yield made
    await made.close()
