"""The dashboard in a real browser, on real processes: it loads, updates, gives orders, and comes back after trouble."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.cluster.stack import Service, Stack, StreamedChat, eventually
from tests.dashboard.browser import CHROMIUM, NO_CHROMIUM, chromium
from tests.ports import free_port

pytestmark = [
    pytest.mark.connected,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM),
]

FLAGS = ("--fake-kv-bytes-per-token", "4096", "--lane-probes", "0", "--transport", "tcp")
PATIENCE_MS = 60_000
"""Only ends a test that has failed."""
KEY = "a secret of operators"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker, and two workers that can move sequences."""
    with Stack(tmp_path_factory.mktemp("dashboard")) as stack:
        workers = [stack.start_worker(name, *FLAGS, step_us=40_000) for name in ("one", "two")]
        for worker in workers:
            worker.ready()
        yield stack


@pytest.fixture(scope="module")
def schedulers(stack: Stack) -> list[Service]:
    """The schedulers so far; the last one runs."""
    started = [stack.start_scheduler()]
    started[0].ready()
    return started


@pytest.fixture(scope="module")
def frontend(stack: Stack, schedulers: list[Service]) -> Service:
    """The frontend, which asks operators for a key, and tells its watchers more often than usual."""
    flags = ("--admin-key", KEY, "--live-interval-s", "0.3")
    service = stack.start("mell_frontend", "--models", "fake", "--port", "0", *flags)
    service.ready()
    return service


@pytest.fixture(scope="module")
def client(stack: Stack, frontend: Service) -> Iterator[httpx.Client]:
    """A client of the frontend."""
    with stack.client(frontend) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser, frontend: Service) -> Iterator[BrowserContext]:
    """A fresh profile."""
    context = browser.new_context(base_url=frontend.ready()["url"], viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield context
    context.close()


@pytest.fixture
def faults() -> list[str]:
    """What a page complained of."""
    return []


@pytest.fixture
def page(context: BrowserContext, faults: list[str]) -> Page:
    """The dashboard, with the key given."""
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    page.goto("/dashboard")
    page.get_by_label("Key", exact=True).fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#link-text")).to_have_text("live")
    return page


@pytest.fixture
def answer(page: Page, client: httpx.Client) -> Iterator[StreamedChat]:
    """A request that runs for as long as the test does, alone: the last test's has left the page too."""
    expect(page.locator("#used")).to_have_text("0")
    answer = StreamedChat(client, 3_000)
    answer.read(5)
    yield answer
    answer.leave()


def running(page: Page) -> Locator:
    """The names of the workers whose cards say that a request runs there: for a moment both, when it has moved."""
    return page.locator(".gpu", has_text="1 running").locator(".name")


def runs_on(page: Page) -> tuple[str, str]:
    """The worker that runs the request, and the other one."""
    expect(running(page)).to_have_count(1)
    name = running(page).inner_text()
    return name, "two" if name == "one" else "one"


def test_it_shows_the_cluster_and_follows_it(page: Page, client: httpx.Client, faults: list[str]) -> None:
    """Both workers, empty at first; a request that begins, and ends, without anybody touching the page."""
    expect(page.locator(".gpu .name")).to_have_text(["one", "two"])
    expect(page.locator("#used")).to_have_text("0")
    answer = StreamedChat(client, 3_000)
    answer.read(5)
    expect(running(page)).to_have_count(1)
    expect(page.locator("#used")).to_have_text("1")
    expect(page.locator("#shadow-name")).to_have_text("worst-fit: 1")
    expect(page.locator("#rate")).not_to_have_text("0")
    expect(page.locator("#ttft-note")).to_contain_text("median")
    page.wait_for_function(
        "document.getElementById('canvas').getContext('2d').getImageData(0, 0, 900, 200).data.some(x => x)"
    )
    answer.leave()
    expect(page.locator("#used")).to_have_text("0")
    assert faults == []


def test_it_drains_by_its_buttons(page: Page, answer: StreamedChat, faults: list[str]) -> None:
    """The plan first; then the request moves while it runs, the worker is empty, and comes back when it may."""
    name, other = runs_on(page)
    page.locator(".gpu", has_text=name).click()
    panel = page.get_by_role("complementary")
    expect(panel.get_by_role("heading", name=name)).to_be_focused()
    panel.get_by_role("button", name="Drain…").click()
    expect(panel.locator("#plan-text")).to_contain_text("1 request would move while running")
    expect(page.locator('.gpu[data-state="active"] .name')).to_have_text([name])
    panel.get_by_role("button", name="Drain now").click()
    expect(page.locator('.gpu[data-state="drained"] .name')).to_have_text([name])
    expect(running(page)).to_have_text([other])
    row = page.locator("#moves tr").first
    expect(row).to_contain_text("committed")
    expect(row).to_contain_text("drain")
    answer.read(len(answer.text) + 20)
    panel.get_by_role("button", name="Undrain").click()
    expect(page.locator('.gpu[data-state="standby"] .name')).to_have_text([name])
    assert faults == []


def test_it_moves_a_request(page: Page, answer: StreamedChat) -> None:
    """Picked in its GPU's panel, which also tells why it is there."""
    name, other = runs_on(page)
    page.locator(".gpu", has_text=name).click()
    page.locator("#panel-rows .pick").click()
    page.get_by_role("button", name="Why here?").click()
    expect(page.locator("#story li").first).to_contain_text("placed")
    page.locator("#mover-mode").select_option("tokens")
    page.get_by_role("button", name="Move", exact=True).click()
    expect(page.locator("#toasts")).to_contain_text("has moved")
    expect(page.locator("#moves tr").first).to_contain_text("manual")
    expect(running(page)).to_have_text([other])
    answer.read(len(answer.text) + 20)


def test_it_pauses_moving(page: Page) -> None:
    """And says so, here and to everybody who watches."""
    page.get_by_role("button", name="Pause moving").click()
    resume = page.get_by_role("button", name="Resume moving")
    expect(resume).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#moves-note")).to_contain_text("paused")
    resume.click()
    expect(page.get_by_role("button", name="Pause moving")).to_have_attribute("aria-pressed", "false")


def test_it_can_be_used_without_a_mouse(page: Page) -> None:
    """Tab to a GPU, Enter opens it, Escape closes it, and one is where one was."""
    first = page.locator(".gpu").first
    first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#panel-title")).to_be_focused()
    expect(first).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    expect(first).to_be_focused()


def test_the_key_is_asked_for_and_stays_in_its_tab(context: BrowserContext, frontend: Service) -> None:
    """Not taken if it is wrong; kept where no other tab has it, and in no address."""
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto("/dashboard")
    field = page.get_by_label("Key", exact=True)
    field.fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("alert")).to_contain_text("Incorrect or missing admin key")
    field.fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#link-text")).to_have_text("live")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("localStorage.length") == 0
    assert context.cookies() == []
    origin = frontend.ready()["url"]
    assert [url for url in asked if not url.startswith(origin) or "secret" in url] == []
    page.get_by_role("button", name="Admin key").click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator("#link-text")).to_have_text("no access")
    assert page.evaluate("sessionStorage.length") == 0


def test_names_are_text_whatever_they_hold(context: BrowserContext, client: httpx.Client) -> None:
    """A worker, a model and a request that would be markup stay what they are called."""
    evil = "<img src=x onerror=\"document.title='taken'\">"
    state = live_state(client)
    for worker in state["status"]["workers"]:
        worker.update(name=evil, model=evil, host=evil, state="active")
    state["rows"] = {
        "sequence": [evil], "worker": [0], "target": [-1], "tokens": [9], "blocks": [9], "state": [0],
    }  # fmt: skip
    state["status"]["recent_moves"] = [
        {"migration": "m", "sequence": evil, "source": evil, "target": evil, "mode": "kv", "reason": evil,
         "blocks": 1, "outcome": "failed", "why": evil, "predicted_s": 0, "took_s": 0, "ago_s": 0, "stopped_s": 0,
         "copied_bytes": 0, "copy_s": 0, "prefilled_tokens": 0, "prefill_s": 0}
    ]  # fmt: skip
    page = shown(context, state)
    expect(page.locator(".gpu .name").first).to_have_text(evil)
    page.locator(".gpu").first.click()
    expect(page.locator("#moves")).to_contain_text(evil)
    expect(page.locator("#main img, #panel img")).to_have_count(0)
    assert "taken" not in page.title()


def test_requests_have_the_tone_of_their_class(context: BrowserContext, client: httpx.Client) -> None:
    """By the share of their GPU, in the hue of its model: up to a quarter, a third, a half, more; with a legend."""
    state = live_state(client)
    state["status"]["workers"][0].update(kv_blocks=1_200, used_blocks=1_081)
    blocks = [100, 400, 581]
    state["rows"] = {
        "sequence": ["t", "s", "m"], "worker": [0] * 3, "target": [-1] * 3, "tokens": [9] * 3, "blocks": blocks,
        "state": [0] * 3,
    }  # fmt: skip
    worker = state["status"]["workers"][0]["name"]
    page = shown(context, state)
    expect(page.locator("#keys [data-size]")).to_have_count(4)
    tones = page.locator("#keys [data-size]").evaluate_all("all => all.map(one => one.style.background)")
    assert len(set(tones)) == 4
    for end, size, tone, name in zip((100, 500, 1_081), blocks, tones, "TSM", strict=False):
        share = (end - size / 2) / 1_200
        eventually(lambda: f"class {name}" in pointed_at(page, worker, share), "a tip that tells the class")  # noqa: B023 - now
        eventually(lambda: page.evaluate(HAS_COLOUR, [*place(page, worker, share), tone]), "its tone")  # noqa: B023 - now


def place(page: Page, worker: str, share: float) -> tuple[float, float]:
    """Where in the window a share of a worker's bar is, now: an alert that comes or goes moves it."""
    box = page.locator(".gpu", has=page.get_by_text(worker, exact=True)).locator(".bar").bounding_box()
    assert box is not None
    return box["x"] + box["width"] * share, box["y"] + box["height"] / 2


def pointed_at(page: Page, worker: str, share: float) -> str:
    """What the page says of that place, just come upon by the mouse."""
    x, y = place(page, worker, share)
    page.mouse.move(0, 0)
    page.mouse.move(x, y)
    return page.locator("#tip").text_content() or ""


HAS_COLOUR = """([x, y, wanted]) => {
  const canvas = document.getElementById("canvas"), box = canvas.getBoundingClientRect();
  const ratio = canvas.width / box.width, pen = canvas.getContext("2d");
  const [red, green, blue] = pen.getImageData((x - box.x) * ratio, (y - box.y) * ratio, 1, 1).data;
  return `rgb(${red}, ${green}, ${blue})` === wanted;
}"""
"""Whether that is what is drawn at a place of the window."""


def test_more_than_the_other_policy_would_use_is_not_called_saved(
    context: BrowserContext, client: httpx.Client
) -> None:
    """The share is negative, and not in the colour of good news."""
    state = live_state(client)
    state["status"]["gpu_use"].update(used_gpu_s=127, shadow_gpu_s=100, shadow_policy="worst-fit")
    page = shown(context, state)
    expect(page.locator("#saved")).to_have_text("\N{MINUS SIGN}27%")
    expect(page.locator(".value", has=page.locator("#saved"))).not_to_have_class(re.compile("good"))
    state["status"]["gpu_use"].update(used_gpu_s=75)
    expect(shown(context, state).locator(".value.good #saved")).to_have_text("25%")


def shown(context: BrowserContext, state: dict[str, Any]) -> Page:
    """A page that has been told this state, and in which nothing slides."""
    page = context.new_page()
    page.emulate_media(reduced_motion="reduce")
    body = f"event: state\ndata: {json.dumps(state)}\n\n"
    page.route("**/admin/live", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.goto("/dashboard")
    return page


def live_state(client: httpx.Client) -> dict[str, Any]:
    """The first state of the feed."""
    with client.stream("GET", "/admin/live", headers={"authorization": f"Bearer {KEY}"}) as response:
        named = ""
        for line in response.iter_lines():
            if line.startswith("data: ") and named == "state":
                state: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return state
            named = line.removeprefix("event: ") if line.startswith("event: ") else named
    raise AssertionError("the feed ended without a state")


def test_it_says_so_when_the_scheduler_is_gone_and_comes_back_with_it(
    page: Page, stack: Stack, schedulers: list[Service]
) -> None:
    """What is shown is marked as old; orders wait; the next scheduler's state replaces it, without a reload.

    Not its first, which may lack those that it has not heard yet: whoever looks at a GPU goes on looking at it.
    """
    page.locator(".gpu", has_text="one").click()
    panel = page.get_by_role("complementary").get_by_role("heading", name="one")
    expect(panel).to_be_focused()
    schedulers[-1].kill()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(re.compile(r"no scheduler answers .*What you see is .* old"))
    expect(page.locator("#main")).to_have_class("stale")
    expect(page.get_by_role("button", name="Pause moving")).to_be_disabled()
    expect(page.locator(".gpu .name")).to_have_text(["one", "two"])
    schedulers.append(stack.start_scheduler())
    expect(page.locator("#link-text")).to_have_text("live")
    expect(alert).to_be_hidden()
    expect(page.locator(".gpu .name")).to_have_text(["one", "two"])
    expect(page.get_by_role("button", name="Pause moving")).to_be_enabled()
    expect(panel).to_be_visible()


def test_it_says_so_when_the_frontend_is_gone(context: BrowserContext, stack: Stack) -> None:
    """And tries again until one is there."""
    flags = ("--models", "fake", "--port", str(free_port()))
    service = stack.start("mell_frontend", *flags)
    url = service.ready()["url"]
    page = context.new_page()
    page.goto(f"{url}/dashboard")
    expect(page.locator("#link-text")).to_have_text("live")
    service.kill()
    expect(page.get_by_role("alert")).to_contain_text("Not connected")
    stack.start("mell_frontend", *flags).ready()
    expect(page.locator("#link-text")).to_have_text("live")
