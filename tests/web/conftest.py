"""A real browser, and a page in it that is watched."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from .stage import Stage, serving

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# A refused API call is what some tests are about; the browser notes each as an error.
REFUSAL = r"Failed to load resource: .*/v1/"


# Not for the session: while Playwright is on, its event loop runs in the tests' thread, and no test
# elsewhere could start one of its own.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = os.environ.get("TOKENWORKS_CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), ""
    )
    if not found:
        pytest.skip("no Chromium found; TOKENWORKS_CHROMIUM can name one")
    # How long to look before giving up: it says nothing about speed, and busy machines need it.
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with serving(Stage()) as playing:
        yield playing


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address; in the end, hold that the page never complained and never went elsewhere."""
    complaints: list[str] = []
    elsewhere: list[str] = []
    contexts = []

    def open_page(url: str, script: str = "", wanted: str = REFUSAL, **options: Any) -> Page:
        def heard(message: ConsoleMessage) -> None:
            text = f"{message.text} {message.location['url']}"
            if message.type in {"error", "warning"} and not re.match(wanted, text):
                complaints.append(text)

        def asked(request: Request) -> None:
            if not request.url.startswith(f"{url}/"):
                elsewhere.append(request.url)

        context = chromium.new_context(**options)
        contexts.append(context)
        context.on("request", asked)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert elsewhere == []
