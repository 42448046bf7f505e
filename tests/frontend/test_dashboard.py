"""The dashboard's files: what they may do in a browser, and that they need nothing from elsewhere."""

import re

import httpx
import pytest

from mell_frontend.dashboard_page import PAGES

TEXTS = {path: content.decode() for path, (content, _) in PAGES.items()}
SCRIPTS = {path: text for path, text in TEXTS.items() if path.endswith(".js")}


async def test_the_page_asks_for_no_key_and_shows_nothing_without(connect: httpx.AsyncClient) -> None:
    """The files are open, what fills them is not."""
    client = connect(api_keys=["one"], admin_key="secret")  # type: ignore[operator]
    for path in PAGES:
        assert (await client.get(path)).status_code == 200
    assert (await client.get("/admin/live")).status_code == 401


async def test_nothing_inline_and_nothing_from_elsewhere_may_run(client: httpx.AsyncClient) -> None:
    """Each file comes with the policy that says so, and with its own type."""
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "/dashboard": "text/html"}
    for path in PAGES:
        headers = (await client.get(path)).headers
        rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-type"] == f"{kinds[path.rpartition('.')[2]]}; charset=utf-8"


async def test_a_page_that_has_not_changed_is_not_sent_again(client: httpx.AsyncClient) -> None:
    """But always asked for, so that an update shows at once."""
    first = await client.get("/dashboard")
    assert first.headers["cache-control"] == "no-cache"
    again = await client.get("/dashboard", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.head("/dashboard")).status_code == 200
    assert (await client.post("/dashboard")).status_code == 405
    assert (await client.get("/dashboard/nothing.js")).status_code == 404


def test_the_page_has_nothing_inline() -> None:
    """What its policy forbids would not work."""
    page = TEXTS["/dashboard"]
    assert re.findall(r"<script(?![^>]*\ssrc=)", page) == []
    assert re.findall(r"\s(?:style|on\w+)=", page) == []
    assert "<style" not in page


@pytest.mark.parametrize("path", TEXTS)
def test_no_address_of_another_host(path: str) -> None:
    """It works where there is no other host; the one exception is a name, not an address."""
    found = re.findall(r"(?:https?:)?//[a-z][\w.-]*\.\w+[^\s\"')]*", TEXTS[path])
    assert [address for address in found if address != "http://www.w3.org/2000/svg"] == []


def colours(block: str) -> dict[str, tuple[float, float, float]]:
    """The opaque colours of a block of the stylesheet."""
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6}|[0-9a-f]{3});", block)
    wide = {name: value if len(value) == 6 else "".join(2 * digit for digit in value) for name, value in found}
    return {name: tuple(int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)) for name, value in wide.items()}  # type: ignore[misc]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """The ratio of WCAG 2.2."""

    def luminance(colour: tuple[float, float, float]) -> float:
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_bars_can_be_told_from_what_is_behind_them(scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what is drawn, on every ground that it stands on."""
    light, dark = re.findall(r":root \{(.*?)\}", TEXTS["/dashboard/dashboard.css"], re.DOTALL)
    known = colours(light) if scheme == "light" else colours(light) | colours(dark)
    for name in ("text", "muted", "accent", "good", "warn", "bad"):
        for ground in ("page", "card"):
            assert contrast(known[name], known[ground]) >= 4.5, f"{name} on {ground}"
    assert contrast(known["bad"], known["bad-soft"]) >= 4.5
    for number in range(8):
        for ground in ("card", "track"):
            assert contrast(known[f"model-{number}"], known[ground]) >= 3, f"model {number} on {ground}"


@pytest.mark.parametrize("path", SCRIPTS)
def test_no_text_becomes_markup_or_code(path: str) -> None:
    """Names of workers and requests come from others; and the key stays in this tab."""
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|setHTML"
    assert re.findall(forbidden, SCRIPTS[path]) == []
    assert re.findall(r"\beval\(|new Function|setAttribute\(\"(?:on|style|href|src)", SCRIPTS[path]) == []
    assert re.findall(r"localStorage|document\.cookie|indexedDB", SCRIPTS[path]) == []


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_module_that_is_imported_is_there(path: str) -> None:
    """And every element that is asked for by its id is on the page."""
    for name in re.findall(r'from "\./([\w.]+)"', SCRIPTS[path]):
        assert f"/dashboard/{name}" in PAGES
    ids = set(re.findall(r'\sid="([\w-]+)"', TEXTS["/dashboard"]))
    assert set(re.findall(r'byId\("([\w-]+)"\)', SCRIPTS[path])) <= ids
