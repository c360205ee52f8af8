"""Whether every link of a built site leads somewhere, without a network: ``python tests/check_site.py build/docs``.

A link to a page or a file of the site must be there, and its anchor, too. What a page loads (scripts, styles, pictures)
must come from the site, so that it works on a machine that reaches nothing else. The reference has methods, too: Sphinx
makes pages without them where it does not find our template, and says nothing.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links, the loads and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {v for k in ("id", "name") if (v := found.get(k))}
        if tag == "a" and found.get("href"):
            self.links.add(found["href"] or "")
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.add(found.get("href") or "")
        elif tag in ("script", "img", "iframe") and found.get("src"):
            self.loads.add(found["src"] or "")


def faults(folder: Path) -> list[str]:
    """One line for each link that leads nowhere, and each load from elsewhere."""
    found_pages = (path for path in folder.rglob("*.html") if "_static" not in path.parts)  # files of the theme
    pages = {path.resolve(): Page(path.read_text()) for path in found_pages}
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        for target in sorted(page.links | page.loads):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads and parts.scheme != "data":
                    found.append(f"{where} loads {target}")
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file():
                found.append(f"{where} links to {target}, which is not there")
            elif there in pages and unquote(parts.fragment) not in pages[there].anchors:
                found.append(f"{where} links to {target}, which has no such anchor")
    if not pages:
        found.append(f"{folder} has no page")
    elif not any("swarmkit.Run.story" in page.anchors for page in pages.values()):
        found.append("the pages of classes do not describe their methods")
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links, {len(found)} faults")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(faults(Path(sys.argv[1]))) or None)
