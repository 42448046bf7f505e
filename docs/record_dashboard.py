"""Takes the pictures of the dashboard in these pages: a real stack with invented text, a wave of load, a real Chromium.

    pip install pillow && python docs/record_dashboard.py      (5 minutes; Chromium must be there)

What the feed tells is recorded while the stack runs, and shown to the page again state by state afterwards, under a
clock that waits for each picture: so the film is smooth however busy the machine is.
Writes `dashboard.webp`, a picture, and `dashboard-live.webp`, some seconds of it moving.
"""

import asyncio
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image
from playwright.async_api import Page, async_playwright

HERE = Path(__file__).parent
PORT = 8137
URL = f"http://127.0.0.1:{PORT}"
MODELS = ("model-a", "model-b")
WORKERS = 10
SIZE = (1440, 860)
WAVE = ((48, 2.3), (60, 0.6))
"""Seconds, and requests started in each: many, then fewer, so that GPUs run empty."""
REHEARSE_AT_S = 64.0
BEFORE_S, OPEN_BEFORE_S, THINK_S, CLOSE_AFTER_S, AFTER_S = 4.0, 1.0, 1.5, 1.5, 8.5
"""The film: from so long before the plan of a drain is asked for, to so long after it is ordered."""
FRAMES_PER_S = 8
SHOWN_WIDTH = 1000
STACK = {
    "MELL_FAKE_STEP_US": "70000",
    "MELL_FAKE_KV_BYTES_PER_TOKEN": "65536",
    "MELL_TRANSPORT": "tcp",
    "MELL_LANE_PROBES": "0",
    "MELL_PROFILE_S": "0",
    "MELL_EVENTS": "off",
    "MELL_LIVE_INTERVAL_S": "0.5",
}
# The page gets the recorded feed and answers in the place of the frontend's; all else is the frontend's.
STAND_IN = """
const ask = window.fetch;
window.fetch = (path, options) => {
  if (path === "/admin/live") {
    const start = control => { window.tell = text => control.enqueue(new TextEncoder().encode(text)); };
    return Promise.resolve(new Response(new ReadableStream({ start })));
  }
  if (path.endsWith("/drain")) return Promise.resolve(new Response(window.answer));
  return ask(path, options);
};
"""


@dataclass
class Tape:
    """What the feed told, each event with its time, and what the scheduler answered to a drain."""

    events: list[tuple[float, str]] = field(default_factory=list)
    rehearsal: str = ""
    rehearsed_s: float = 0.0
    drained: str = ""
    drained_s: float = 0.0


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


async def listen(client: httpx.AsyncClient, tape: Tape, begun_s: float) -> None:
    """Record the feed."""
    kind = ""
    async with client.stream("GET", "/admin/live") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                kind = line
            elif line.startswith("data: "):
                tape.events.append((time.monotonic() - begun_s, f"{kind}\n{line}\n\n"))


async def rehearse(client: httpx.AsyncClient) -> tuple[str, str]:
    """Return where to order the drain that moves most, of those that leave nothing behind, and its plan."""
    plans = []
    for worker in (await client.get("/admin/status")).json()["workers"]:
        path = f"/admin/workers/{worker['worker']}/drain"
        plan = (await client.post(path, json={"dry_run": True})).text
        rows = json.loads(plan)["sequences"]
        plans.append((all(row["target"] for row in rows), len(rows), path, plan))
    return max(plans)[2:]


async def record(client: httpx.AsyncClient) -> Tape:
    """Load the stack, drain a worker in the middle of it, and return what was told."""
    tape, begun_s = Tape(), time.monotonic()
    working = [asyncio.create_task(load(client)), asyncio.create_task(listen(client, tape, begun_s))]
    await asyncio.sleep(REHEARSE_AT_S)
    path, tape.rehearsal = await rehearse(client)
    tape.rehearsed_s = time.monotonic() - begun_s
    await asyncio.sleep(THINK_S)
    tape.drained_s = time.monotonic() - begun_s
    tape.drained = (await client.post(path, json={})).text
    await asyncio.sleep(AFTER_S + 1)
    for task in working:
        task.cancel()
    await asyncio.wait(working)
    return tape


async def press(page: Page, selector: str) -> None:
    """Press a button; as its page does it, for the clock stands still."""
    await page.eval_on_selector(selector, "button => button.click()")


async def act(page: Page, tape: Tape, at_s: float, until_s: float) -> None:
    """Do what somebody at the page did between two pictures."""
    worker = json.loads(tape.drained)["name"]
    card = f'.gpu[aria-label^="{worker}:"]'
    acts = {
        tape.rehearsed_s - OPEN_BEFORE_S: (card, ""),
        tape.rehearsed_s: ("#drain", tape.rehearsal),
        tape.drained_s: ("#drain-now", tape.drained),
        tape.drained_s + CLOSE_AFTER_S: ("#panel-close", ""),
    }
    for when_s, (selector, answer) in acts.items():
        if at_s <= when_s < until_s:
            await page.evaluate("text => { window.answer = text; }", answer)
            await press(page, selector)


async def picture(page: Page) -> Image.Image:
    """Return the page as it is."""
    return Image.open(io.BytesIO(await page.screenshot(type="jpeg", quality=95))).convert("RGB")


async def moving(page: Page) -> int:
    """Return how many moves are to be seen, with nothing before them."""
    if await page.locator("#panel").is_visible():
        return 0
    return await page.locator('#moves [data-outcome="moving"]').count()


async def film(page: Page, tape: Tape) -> list[tuple[int, Image.Image]]:
    """Play the tape to the page, and take a picture of each step, with the moves that it shows."""
    step_s = 1 / FRAMES_PER_S
    frames: list[tuple[int, Image.Image]] = []
    left = list(tape.events)
    at_s = left[0][0]
    while at_s < tape.drained_s + AFTER_S:
        filming = at_s >= tape.rehearsed_s - BEFORE_S
        until_s = at_s + (step_s if filming else 0.5)
        while left and left[0][0] < until_s:
            await page.evaluate("text => window.tell(text)", left.pop(0)[1])
        await act(page, tape, at_s, until_s)
        await page.clock.run_for(round(1_000 * (until_s - at_s)))
        if filming:
            frames.append((await moving(page), await picture(page)))
        at_s = until_s
    return frames


async def show(tape: Tape) -> list[tuple[int, Image.Image]]:
    """Open the page before the stand-in, and return the film."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        await page.add_init_script(STAND_IN)
        await page.clock.install()
        await page.goto(f"{URL}/dashboard")
        await page.wait_for_function("() => window.tell !== undefined")
        frames = await film(page, tape)
        await browser.close()
    return frames


def write(frames: list[tuple[int, Image.Image]]) -> None:
    """Write the film small enough for a page, and the picture with the most moves."""
    _, best = max(frames, key=lambda frame: frame[0])
    best.save(HERE / "dashboard.webp", quality=88, method=6)
    size = (SHOWN_WIDTH, round(SIZE[1] * SHOWN_WIDTH / SIZE[0]))
    small = [frame.resize(size, Image.Resampling.LANCZOS) for _, frame in frames]
    film = {
        "save_all": True,
        "append_images": small[1:],
        "duration": 1_000 // FRAMES_PER_S,
        "loop": 0,
        "kmax": 2 * FRAMES_PER_S,
    }
    small[0].save(HERE / "dashboard-live.webp", quality=45, method=4, **film)


async def main() -> None:
    """Start everything, record, show, write; stop everything."""
    stack = start_stack()
    try:
        async with httpx.AsyncClient(base_url=URL, timeout=600, trust_env=False) as client:
            await ready(client)
            tape = await record(client)
        write(await show(tape))
    finally:
        stack.send_signal(signal.SIGTERM)
        stack.wait(60)


if __name__ == "__main__":
    asyncio.run(main())
