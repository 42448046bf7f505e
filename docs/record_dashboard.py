"""Takes the pictures of the dashboard in these pages: a real stack with invented text, a wave of load, a real Chromium.

    pip install pillow && python docs/record_dashboard.py      (3 minutes; Chromium must be there)

Writes `dashboard.webp`, a picture, and `dashboard-live.webp`, some seconds of it moving.
"""

import asyncio
import base64
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.async_api import Page, async_playwright
from playwright.async_api import TimeoutError as PlaywrightTimeoutError

HERE = Path(__file__).parent
PORT = 8137
URL = f"http://127.0.0.1:{PORT}"
MODELS = ("model-a", "model-b")
WORKERS = 10
SIZE = (1440, 860)
WAVE = ((55, 2.4), (25, 0.8), (90, 1.5))
"""Seconds, and requests started in each: many, fewer, so that GPUs run empty, and more again."""
RECORD_AT_S, RECORD_S, DRAIN_AT_S = 52, 15.0, 3.0
DRAINED = "worker-3"
PICTURE_WAIT_S = 45
FRAMES_PER_S = 6
SHOWN_WIDTH = 1000
STACK = {
    "MELL_FAKE_STEP_US": "70000",
    "MELL_FAKE_KV_BYTES_PER_TOKEN": "65536",
    "MELL_TRANSPORT": "tcp",
    "MELL_LANE_PROBES": "0",
    "MELL_PROFILE_S": "0",
    "MELL_LIVE_INTERVAL_S": "0.5",
}


def start_stack() -> subprocess.Popen[bytes]:
    """Start `mell up`, with nothing on the terminal."""
    flags = ["--engine", "fake", "--workers", str(WORKERS), "--kv-blocks", "320", "--max-model-len", "4096"]
    flags += [
        "--port",
        str(PORT),
        *(part for name in MODELS for part in ("--model", "fake", "--served-model-name", name)),
    ]
    command = [sys.executable, "-m", "mell_console", "up", *flags]
    return subprocess.Popen(command, env=os.environ | STACK, stdout=subprocess.DEVNULL)  # noqa: S603 - ours


async def ready(client: httpx.AsyncClient) -> None:
    """Wait until requests are taken and every worker is known."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        try:
            if len((await client.get("/admin/status")).json()["workers"]) == WORKERS:
                return
        except (httpx.HTTPError, KeyError, ValueError):
            pass
        await asyncio.sleep(0.5)
    raise SystemExit("the stack was not ready within two minutes")


async def ask(client: httpx.AsyncClient, draw: random.Random) -> None:
    """One request, of a length that nobody could have known."""
    words = " ".join(["moon"] * int(min(900, draw.lognormvariate(4.8, 0.7))))
    body = {
        "model": draw.choice(MODELS),
        "messages": [{"role": "user", "content": words}],
        "max_tokens": int(min(2_000, draw.lognormvariate(5.9, 0.8))) + 1,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_raw():
            pass


async def load(client: httpx.AsyncClient) -> None:
    """Start requests as `WAVE` says; those that still run at the end are given up."""
    draw = random.Random(3)  # noqa: S311 - the same load each time
    running: set[asyncio.Task[None]] = set()
    try:
        for seconds, rate in WAVE:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                task = asyncio.create_task(ask(client, draw))
                running.add(task)
                task.add_done_callback(running.discard)
                await asyncio.sleep(draw.expovariate(rate))
    finally:
        for task in running:
            task.cancel()


async def drain(page: Page) -> None:
    """Empty a worker by the page's own buttons."""
    await asyncio.sleep(DRAIN_AT_S)
    await page.locator(".gpu", has_text=DRAINED).click()
    await asyncio.sleep(1.5)
    await page.get_by_role("button", name="Drain…").click()
    await asyncio.sleep(1.5)
    await page.get_by_role("button", name="Drain now").click()


async def record(page: Page) -> list[tuple[float, Image.Image]]:
    """Return what the browser shows while a worker is drained, each picture with its time."""
    session = await page.context.new_cdp_session(page)
    shots: list[tuple[float, bytes]] = []
    begun_s = time.monotonic()
    draining = asyncio.create_task(drain(page))
    while (at_s := time.monotonic() - begun_s) < RECORD_S:
        wanted = {"format": "jpeg", "quality": 92, "optimizeForSpeed": True}
        shots.append((at_s, base64.b64decode((await session.send("Page.captureScreenshot", wanted))["data"])))
    await draining
    return [(at_s, Image.open(io.BytesIO(data)).convert("RGB")) for at_s, data in shots]


def write_film(shots: list[tuple[float, Image.Image]]) -> None:
    """Write an even number of pictures a second, small enough for a page."""
    height = round(SIZE[1] * SHOWN_WIDTH / SIZE[0])
    times = [step / FRAMES_PER_S for step in range(int(RECORD_S * FRAMES_PER_S))]
    frames = [
        max((shot for shot in shots if shot[0] <= max(at_s, shots[0][0])), key=lambda shot: shot[0])[1]
        for at_s in times
    ]
    small = [frame.resize((SHOWN_WIDTH, height), Image.Resampling.LANCZOS) for frame in frames]
    small[0].save(
        HERE / "dashboard-live.webp",
        save_all=True,
        append_images=small[1:],
        duration=1_000 // FRAMES_PER_S,
        loop=0,
        quality=45,
        method=4,
    )


async def watch() -> None:
    """Open the page and take both."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        await page.goto(f"{URL}/dashboard")
        await asyncio.sleep(RECORD_AT_S)
        shots = await record(page)
        await page.get_by_role("button", name="Undrain").click()
        await page.keyboard.press("Escape")
        await asyncio.sleep(12)
        with contextlib.suppress(PlaywrightTimeoutError):  # a picture without a move is a picture too
            await page.locator('#moves [data-outcome="moving"]').first.wait_for(timeout=1_000 * PICTURE_WAIT_S)
        picture = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
        picture.save(HERE / "dashboard.webp", quality=88, method=6)
        await browser.close()
    write_film(shots)


async def main() -> None:
    """Start everything, take the pictures, stop everything."""
    stack = start_stack()
    try:
        async with httpx.AsyncClient(base_url=URL, timeout=600, trust_env=False) as client:
            await ready(client)
            loading = asyncio.create_task(load(client))
            await watch()
            loading.cancel()
            await asyncio.wait([loading])
    finally:
        stack.send_signal(signal.SIGTERM)
        stack.wait(60)


if __name__ == "__main__":
    asyncio.run(main())
