"""A real browser for the tests of the pages: Debian's Chromium, driven by playwright; axe-core looks for barriers.

with tab(chromium, path.as_uri()) as page: ...     a page without a network that has to be silent

Where one of these is not installed the tests are skipped, and say so; with SG_LOCAL_REQUIRE_BROWSER=1, which .ci/run
sets, that is a failure.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

REQUIRED = "SG_LOCAL_REQUIRE_BROWSER"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1280, 720, 390)  # a desk, a tablet, a telephone: pixels


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser. Of a module: while it runs, no other test could have an event loop of its own."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    missing = [] if program else ["chromium"]
    missing += [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
    if missing:
        told = f"browser tests are left out: {', '.join(missing)} not installed"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{told}, and {REQUIRED} is set")
        pytest.skip(told)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@contextmanager
def tab(browser: Any, url: str, may_say: str = "", **options: Any) -> Iterator[Any]:
    """A page, open. One from the file system has no network; it and all others may say nothing on the console.

    page.asked_for: the addresses of all requests. page.said: what the console said, to be emptied where it may; what
    the browser may say itself, also after the last look at the page, matches may_say.
    """
    context = browser.new_context(offline=url.startswith("file:"), **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.asked_for, page.said = [], []
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: (page.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(url)
    yield page
    context.close()
    assert [text for text in page.said if not (may_say and re.search(may_say, text))] == []


def assert_no_barrier(page: Any) -> None:
    """Nothing that axe-core finds wrong with a page."""
    from axe_playwright_python.sync_playwright import Axe

    lines = [
        f"{rule['id']}: {node['html'][:200]} {[item['message'] for item in node['any']]}"
        for rule in Axe().run(page).response["violations"]
        for node in rule["nodes"]
    ]
    assert not lines, "\n".join(lines[:10])


def assert_open_to_all(page: Any) -> None:
    """No barrier in light and in dark, on a desk and on a telephone; at no width more than the page's own width."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels at a width of {width}"
    for width, scheme in ((WIDTHS[0], "light"), (WIDTHS[-1], "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert_no_barrier(page)


def reached_by_tab(page: Any) -> tuple[list[str], list[str]]:
    """What can be worked on a page, and what of it the Tab key comes to, in its order."""
    page.evaluate(
        """() => {
          const all = "a[href], button, input, select, textarea, summary, [tabindex='0']";
          const shown = [...document.querySelectorAll(all)].filter((one) => one.checkVisibility() && !one.disabled);
          shown.forEach((one, place) => { one.dataset.place = `${place} ${one.outerHTML.slice(0, 80)}`; });
          document.activeElement.blur();
          window.scrollTo(0, 0);
        }"""
    )
    wanted = page.evaluate("[...document.querySelectorAll('[data-place]')].map((one) => one.dataset.place)")
    found = []
    for _ in range(2 * len(wanted) + 5):
        page.keyboard.press("Tab")
        found.append(page.evaluate("document.activeElement.dataset.place || ''"))
        if found[-1] == (wanted or [""])[-1]:
            break
    return wanted, [name for name in found if name]
