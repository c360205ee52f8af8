"""The first ten minutes of somebody who has read the README, in JupyterLab: what they type, and what they see.

The code is that of the README and of docs/get_started.md, so neither can say what does not work. Pictures go to
``$SWARMKIT_SHOTS``. Needs the extra ``browser`` and ``/usr/bin/chromium``; without them it fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import swarmkit as sk

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
ROWS = 300
TONES = ["positive", "neutral", "negative"]
TOKEN = "the-token-of-the-cluster"
STOP = ".jp-NotebookPanel-toolbar [data-command='notebook:interrupt-kernel']"


def code_of(page: str) -> list[str]:
    """The blocks of Python on a page, without the indentation that lists give them."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE).strip() for indent, code in found]


@pytest.fixture(scope="module", autouse=True)  # before JupyterLab, whose kernels have its environment
def _key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWARMKIT_CLUSTER_KEY", TOKEN)
        yield


@pytest.fixture
def cluster(lab: Any) -> Iterator[None]:
    """What the stranger has: servers in a hostfile, which outlive kernels, and a table of papers."""
    folder = lab.folder / "notebooks"
    said = [f"{7 + i % 90} samples of phages from soil {i}; the effect is {TONES[i % 3]}." for i in range(ROWS)]
    papers = pd.DataFrame({"organism": [f"phage {i % 30:02}" for i in range(ROWS)], "abstract": said})
    papers.to_csv(folder / "papers.csv", index=False)
    with sk.local(1, engine="echo", addresses=4, tokens_per_s=150, max_num_seqs=2, token=TOKEN) as swarm:
        lines = [f"{end.host} {end.port} key_env=SWARMKIT_CLUSTER_KEY" for end in swarm.endpoints]
        (folder / "agents.hostfile").write_text("\n".join(lines))
        yield


def test_a_strangers_first_ten_minutes(lab: Any, shots: Path, cluster: None) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=30_000)
    example, own_servers = code_of("README.md")[:2]
    look, ask, typed, plot = code_of("docs/get_started.md")
    lab.write("stranger", [""] * 10)
    with lab.open("stranger") as page:

        def picture(cell: int, name: str) -> None:
            page.tab.locator(".jp-Notebook .jp-Cell").nth(cell).evaluate("cell => cell.scrollIntoView()")
            page.tab.screenshot(path=str(shots / f"stranger-{name}.png"))

        def sees(cell: int, name: str, *texts: str | re.Pattern[str]) -> None:
            for text in texts:
                expect(page.area(cell)).to_contain_text(text)
            picture(cell, name)

        def is_offered(cell: int, code: str, name: str, *names: str) -> None:
            offered = page.complete(cell, code)
            for each in names:
                expect(offered).to_contain_text(each)
            picture(cell, name)

        # The README's first example, pasted.
        page.write(0, example)
        page.run(0)
        sees(0, "01-first-example", "Paris", "Rome", "Tokyo")
        # What else is there? Tab, and a question mark.
        is_offered(1, "sk.", "02-functions", "connect", "last_run", "local", "open_store", "RunMonitor")
        page.write(1, "")
        is_offered(1, "df.swarm.", "03-verbs", "classify", "scatter", "submit", "tree_reduce")
        page.tab.keyboard.type("sc")
        page.tab.keyboard.press("Enter")
        expect(page.editor(1)).to_have_text("df.swarm.scatter")
        page.type(1, "?")
        page.run(1)
        sees(1, "04-help", "temperature: float", "store: str", "schema: Any", "Folder of finished rows: the same call")
        is_offered(2, "df.swarm.scatter('{country}', sto", "05-keywords", "stop=", "store=")
        # Their own servers and their own table.
        page.write(2, look)
        page.run(2)
        sees(2, "06-preview", "Summarise: 7 samples of phages", "what the chat template adds is dimmed")
        # The long run, stopped in the middle, and the same cell again.
        page.write(3, ask)
        page.start(3)
        sees(3, "07-runs", re.compile(rf"scatter: \d\d+ of {ROWS} rows · [\d.]+ rows/s"))
        page.tab.locator(STOP).click()
        sees(3, "08-stopped", "scatter, ended early", "the same call again asks only the others")
        page.wait_idle()
        found = re.search(rf"interrupted: (\d+) of {ROWS} rows answered", page.said(3))
        kept = int(found[1]) if found else 0
        assert 0 < kept < ROWS
        page.run(3)
        sees(3, "09-resumed", f"scatter: {ROWS} rows, {ROWS - kept} answered, {kept} stored, ")
        # The README's other two verbs, on these answers.
        page.write(4, "\n".join([*own_servers.splitlines()[-2:], "top"]))
        page.run(4)
        sees(4, "10-verbs", f"classify: {ROWS} rows, {ROWS} answered", "n_leaves", "phage 00")
        # Types, and pictures.
        page.write(5, typed)
        page.run(5)
        page.write(6, "df.dtypes")
        assert re.search(r"found_tone +category\nfound_samples +Int64", page.run(6))
        page.write(7, plot)
        page.run(7)
        for cell, name in ((5, "11-typed"), (7, "12-plotted")):
            drawn = page.area(cell).locator("img")
            expect(drawn).to_be_visible()
            assert drawn.evaluate("image => image.naturalWidth") > 300
            picture(cell, name)
        # The kernel dies; the answers do not.
        page.restart()
        page.run(2)
        page.run(3)
        sees(3, "13-after-a-restart", f"scatter: {ROWS} rows, 0 answered, {ROWS} stored")
        page.write(8, "sk.last_run().stats.requests")
        assert page.run(8) == "0"
        assert page.strangers == []
