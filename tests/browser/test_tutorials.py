"""The saved tutorials as those see them who have no kernel: in JupyterLab, and as HTML. Pictures go to
``$SWARMKIT_SHOTS``.

Needs the extra ``browser`` and ``/usr/bin/chromium``; without them it fails.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

FOLDER = Path(__file__).parents[2] / "notebooks"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
# What outputs show, of those parts that have a size: pictures, tables, and the coloured parts of bars.
SEEN = """(inside) => {
  const blue = ['rgb(0, 114, 178)', 'rgb(86, 180, 233)'], found = {picture: 0, table: 0, bar: 0};
  for (const part of document.querySelectorAll(`${inside} .jp-OutputArea-output *`)) {
    const {width, height} = part.getBoundingClientRect();
    if (!width || !height) continue;
    if (part.tagName === 'IMG' && part.naturalWidth) found.picture += 1;
    if (part.tagName === 'TABLE') found.table += 1;
    if (part.tagName === 'DIV' && blue.includes(getComputedStyle(part).backgroundColor)) found.bar += 1;
  }
  return found;
}"""
TEXT = (
    "(inside) => [...document.querySelectorAll(`${inside} .jp-OutputArea-output`)].map(o => o.textContent).join('\\n')"
)


def saved(path: Path) -> tuple[dict[str, int], list[str]]:
    """What a notebook has stored: the number of each of these, and the lines that bars and monitors ended with."""
    counts, lines = Counter(picture=0, table=0, bar=0), []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            html = data.get("text/html", "")
            counts["picture"] += ("image/png" in data and not html) + html.count("<img")
            counts["table"] += html.count("<table")
            counts["bar"] += len(re.findall(r"background:#(?:0072B2|56B4E9)", html))
            if re.match(r"\w+(?:, [\w ]+)?: [\d,]+ \w+, [\d,]+ answered", text := data.get("text/plain", "")):
                lines.append(text)
    return dict(counts), lines


def sees(tab: Any, path: Path, inside: str) -> None:
    counts, lines = saved(path)
    assert tab.evaluate(SEEN, inside) == counts, f"{path.name} does not show all that is saved"
    text = tab.evaluate(TEXT, inside)
    for line in lines:
        assert line in text
    for wrong in ("Error displaying widget", "Loading widget", "0%|"):
        assert wrong not in text


def test_in_jupyterlab_they_show_how_they_ended(lab: Any, shots: Path) -> None:
    with lab.page() as page:
        for path in TUTORIALS:
            shutil.copy(path, lab.folder / "notebooks")
            page.read(path.stem)
            page.tab.wait_for_timeout(1000)  # what is looked for must have had its time to come
            assert page.tab.evaluate("window.panel.sessionContext.session") is None, "there is no kernel"
            sees(page.tab, path, f"#{page.tab.evaluate('window.panel.id')}")
            page.tab.screenshot(path=str(shots / f"saved-{path.stem}.png"))
            page.tab.evaluate("window.panel.close()")


def test_as_html_they_show_how_they_ended(lab: Any, shots: Path, tmp_path: Path) -> None:
    from nbconvert import HTMLExporter

    with lab.page() as page:
        page.tab.route(re.compile("^https?:"), lambda route: route.abort())  # as without a network
        for number, path in enumerate(TUTORIALS):
            theme, width = [("light", 1280), ("dark", 560)][number % 2]
            html = tmp_path / f"{path.stem}.html"
            html.write_text(HTMLExporter(theme=theme).from_filename(str(path))[0], encoding="utf-8")
            page.tab.set_viewport_size({"width": width, "height": 900})
            page.tab.goto(html.as_uri(), wait_until="load")
            sees(page.tab, path, "body")
            page.tab.screenshot(path=str(shots / f"html-{path.stem}-{theme}.png"), full_page=True)
