"""The documentation as a reader opens it: from the disk, without a network. Pictures go to ``$SWARMKIT_SHOTS``.

Needs the extra ``browser``, ``/usr/bin/chromium``, and ``build/docs``, which the README's command makes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import need

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

SITE = Path(__file__).parent.parent.parent / "build/docs"
PAGES = {
    "home": "docs/index.html",
    "start": "docs/get_started.html",
    "tutorial": "notebooks/01_scatter.html",
    "typed": "notebooks/10_typed_answers.html",
    "reference": "docs/reference.html",
    "verb": "docs/generated/swarmkit.scatter.html",
    "clusters": "docs/clusters.html",
}


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    need((SITE / "index.html").exists(), f"the documentation in {SITE}")
    from lab import CHROMIUM
    from playwright.sync_api import sync_playwright  # not at the top: who collects all tests need not have it

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        yield browser.new_page()
        browser.close()


def test_pages_are_whole_in_both_themes_at_two_widths_and_load_nothing_from_elsewhere(tab: Any) -> None:
    shots = Path(os.environ.get("SWARMKIT_SHOTS") or Path(tempfile.gettempdir()) / "swarmkit-shots")
    shots.mkdir(parents=True, exist_ok=True)
    loads, errors = [], []
    tab.on("request", lambda request: loads.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    backgrounds = set()
    for theme in ("light", "dark"):
        tab.emulate_media(color_scheme=theme)
        for width in (1280, 560, 480):
            tab.set_viewport_size({"width": width, "height": 900})
            for name, page in PAGES.items():
                tab.goto((SITE / page).as_uri())
                assert tab.locator("h1").first.is_visible()
                too_wide = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                assert too_wide <= 0, f"{page} is {too_wide} pixels too wide at {width}"
                tab.screenshot(path=str(shots / f"docs-{name}-{theme}-{width}.png"))
        backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        tab.goto((SITE / PAGES["typed"]).as_uri())
        cell = "getComputedStyle(document.querySelector('.cell_output .text_html')).backgroundColor"
        assert tab.evaluate(cell) == "rgba(0, 0, 0, 0)", "a pool, a bar or a box has the page's own background"
    assert len(backgrounds) == 2
    assert [url for url in loads if not url.startswith(("file:", "data:", "blob:"))] == []
    assert errors == []


def test_the_search_finds_a_verb(tab: Any) -> None:
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.goto((SITE / "index.html").as_uri())
    tab.wait_for_url("**/docs/index.html")
    field = tab.locator("input[type=search]:focus")
    for _ in range(50):  # until the page's script listens to the key
        tab.keyboard.press("Control+k")
        tab.wait_for_timeout(200)
        if field.count():
            break
    field.fill("tree_reduce")
    field.press("Enter")
    found = tab.locator("#search-results a", has_text="swarmkit.tree_reduce").first
    found.wait_for()
    found.click()
    tab.get_by_role("heading", name="swarmkit.tree_reduce").wait_for()
