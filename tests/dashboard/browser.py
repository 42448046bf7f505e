"""A real headless Chromium of this machine; playwright drives it and brings none of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Where it is; None: there is none."""
NO_CHROMIUM = "there is no Chromium on this machine: apt-get install chromium"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser; `CHROMIUM` must not be None."""
    with sync_playwright() as playwright:
        # Tests and containers run as root, under whom its sandbox does not.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
