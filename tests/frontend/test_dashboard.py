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
