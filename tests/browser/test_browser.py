"""The widgets as people meet them: JupyterLab, a browser, clicks. Pictures go to ``$SWARMKIT_SHOTS``, to be looked at.

Needs the extra ``browser`` and ``/usr/bin/chromium``; without them it fails.
"""

from __future__ import annotations

import bisect
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

HOSTILE = """<img src="http://stranger.invalid/x" onerror="window.harmed=1"><script>window.harmed=2</script>"""
SETUP = """
import json, threading, time, urllib.request, warnings
import pandas as pd, swarmkit as sk
fault = "http_401:address=127.0.0.7"
swarm = sk.local(1, engine="echo", addresses=45, tokens_per_s=12, max_num_seqs=8, faults=[fault])
racks = [{"rack": "abc"[i % 3]} for i in range(45)]
ends = [sk.AgentEndpoint(e.host, e.port, tags, api_key=e.api_key) for e, tags in zip(swarm.endpoints, racks)]
"""
# Notes when the picture under a cell says how many rows: seconds, and the number.
WATCH = """(index) => {
  const area = document.querySelectorAll('.jp-Notebook .jp-Cell')[index].querySelector('.jp-Cell-outputArea');
  window.seen = []; let last = -1;
  new MutationObserver(() => {
    const found = /([\\d,]+) of [\\d,]+ row/.exec(area.textContent);
    const over = /scatter: (cancelled|done)/.exec(area.textContent);
    const count = found ? Number(found[1].replace(/,/g, '')) : -1;
    if (count !== last || over) { window.seen.push([Date.now() / 1000, count, over ? over[1] : '']); last = count; }
  }).observe(area, {childList: true, subtree: true, characterData: true});
  document.addEventListener('click', () => { window.clicked = Date.now() / 1000; }, true);
}"""

# Presses what the toolbar's square does, and gives the seconds until the cell has ended with our exception.
INTERRUPT = """async (index) => {
  const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[index], began = Date.now();
  window.jupyterapp.commands.execute('notebook:interrupt-kernel');
  while (!cell.textContent.includes('ScatterInterrupted')) await new Promise(done => setTimeout(done, 5));
  return (Date.now() - began) / 1000;
}"""


def shoot(page: Any, folder: Path, name: str, cell: int) -> None:
    """A cell and what is below it, at two widths and in both themes."""
    for theme in ("light", "dark"):
        page.theme(theme)
        for width in (1280, 560):
            page.tab.set_viewport_size({"width": width, "height": 900})
            page.tab.locator(".jp-Notebook .jp-Cell").nth(cell).evaluate("cell => cell.scrollIntoView()")
            page.tab.wait_for_timeout(200)
            page.tab.screenshot(path=str(folder / f"{name}-{theme}-{width}.png"))
    page.theme("light")
    page.tab.set_viewport_size({"width": 1280, "height": 900})


def test_pick_probe_filter_tick(lab: Any, shots: Path) -> None:
    from playwright.sync_api import expect

    lab.write(
        "picker",
        [
            SETUP,
            "picker = sk.EndpointPicker([('127.0.0.1', 9), *ends], model='echo')\npicker",
            "print(json.dumps([e.host for e in picker.selected]))",
            "picker.selected = picker.selected[1:3]",
            "print(picker.use())",
        ],
    )
    with lab.open("picker") as page:
        page.run(0)
        page.run(1)
        area = page.area(1)

        def press(name: str) -> None:
            area.locator("button", has_text=re.compile(f"^{name}$")).click()

        expect(area).to_contain_text("46 not probed")
        press("Probe")
        expect(area).to_contain_text("45 up")
        expect(area).to_contain_text("cannot connect: connection refused")
        shoot(page, shots, "picker", 1)
        area.get_by_placeholder("filter").fill("rack=b")
        expect(area).to_contain_text("15 shown")
        press("None")
        area.locator("input[type=checkbox]").nth(1).click()
        expect(area).to_contain_text("31 of 46 endpoints selected")  # the one that is down was unticked
        area.get_by_placeholder("filter").fill("")
        chosen = json.loads(page.run(2))
        assert chosen == [*(f"127.0.0.{i + 1}" for i in range(45) if i % 3 != 1 or i == 4)]
        page.run(3)  # in code
        expect(area).to_contain_text("2 of 46 endpoints selected")
        assert [box.is_checked() for box in area.locator("input[type=checkbox]").all()][:4] == [
            False,
            False,
            False,
            True,
        ]
        press("Healthy")
        expect(area).to_contain_text("45 of 46 endpoints selected")
        assert "<VLLMPool: 45 endpoints" in page.run(4)
        assert page.strangers == []


def test_rows_of_a_running_batch_show_within_a_second(lab: Any) -> None:
    lab.write(
        "rows",
        [
            SETUP,
            """
one = ends[0]
df = pd.DataFrame({"t": ["word " * (1 + 7 * i % 40) for i in range(60)]})  # rows of one batch, of many lengths
truth, job = [], None

def ask():
    '''Rows that the server has finished, as it says itself.'''
    key, began = {"Authorization": f"Bearer {one.key()}"}, False
    while not truth or truth[-1][1] < 60:
        text = urllib.request.urlopen(urllib.request.Request(one.url + "/metrics", headers=key)).read().decode()
        held = sum(int(float(l.split()[-1])) for l in text.splitlines() if l.startswith("vllm:num_requests_"))
        began = began or held > 30  # it is asked a few questions first
        truth.append((time.time(), 60 - held if began else 0))
        time.sleep(0.02)
""",
            "job = df.swarm.submit('{t}', pool=[one], progress=False, max_tokens=400)\n"
            "asking = threading.Thread(target=ask)\nasking.start()\nsk.RunMonitor(job)",
            "job.result(); asking.join(); print(job.stats.requests, json.dumps(truth))",
        ],
    )
    with lab.open("rows") as page:
        page.run(0)
        page.run(1)
        page.tab.evaluate(WATCH, 2)
        page.run(2)
        requests, truth = page.run(3).split(" ", 1)
        page.tab.wait_for_function("window.seen.some(([at, count]) => count === 60)")
        seen = page.tab.evaluate("window.seen")
    assert requests == "1"
    finished = [next(at for at, n in json.loads(truth) if n >= row) for row in range(1, 61)]
    showed = [next(at for at, n, _ in seen if n >= row) for row in range(1, 61)]
    lags = sorted(there - here for here, there in zip(finished, showed, strict=True))
    spread = finished[-1] - finished[0]
    shown = f"shown after {lags[30]:.2f} s (median), {lags[-1]:.2f} s at most"
    print(f"\n60 rows of one batch finished over {spread:.1f} s; {shown}")
    assert spread > 3
    assert bisect.bisect(lags, -0.1) == 0
    assert lags[-1] < 1.0


def test_stop_ends_a_submitted_run_within_a_second(lab: Any, shots: Path) -> None:
    from playwright.sync_api import expect

    lab.write(
        "stop",
        [
            SETUP,
            "df = pd.DataFrame({'gene': [f'gene{i:05}' for i in range(20_000)]})\npool = sk.connect(ends)\nended = []",
            "run = df.swarm.submit('What does {gene} do in the cell?', max_tokens=64, progress=False)\n"
            "run._job.add_done_callback(lambda _: ended.append(time.time()))\nsk.RunMonitor(run)",
            "print(json.dumps([ended, run.state, run.stats.answered, int(run.partial()['response'].notna().sum())]))",
            "run.partial().head(3)",
            "from swarmkit import plots\nplots.timeline(run.stats.timeline()).figure",
        ],
    )
    with lab.open("stop") as page:
        page.run(0)
        page.run(1)
        page.tab.evaluate(WATCH, 2)
        page.run(2)
        page.tab.wait_for_function("window.seen.some(([at, count]) => count > 500)")
        expect(page.area(2)).to_contain_text("Invalid API key")
        shoot(page, shots, "monitor", 2)
        page.area(2).get_by_role("button", name="Stop").click()
        page.tab.wait_for_function("window.seen.some(([at, count, over]) => over)")
        clicked, seen = page.tab.evaluate("[window.clicked, window.seen]")
        ended, state, answered, there = json.loads(page.run(3))
        shown = next(at for at, _, over in seen if over) - clicked
        print(f"\nStop: over after {ended[0] - clicked:.3f} s, shown after {shown:.3f} s, {there:,} rows kept")
        assert state == "cancelled"
        assert 500 < there == answered < 20_000
        assert ended[0] - clicked < 1.0
        assert shown < 1.0
        assert "gene00000" in page.run(4)
        page.run(5)
        picture = page.area(5).locator("img")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") > 300
        shoot(page, shots, "stopped", 2)
        page.save()
        assert page.strangers == []
    # What was saved shows the run's end to who opens it without its kernel.
    saved = lab.folder / "notebooks" / "stop.ipynb"
    html = "".join(
        "".join(o["data"].get("text/html", "")) for o in json.loads(saved.read_text())["cells"][2]["outputs"]
    )
    assert f"{answered:,} of 20,000 rows" in html
    saved.rename(saved.with_name("reopened.ipynb"))
    with lab.open("reopened") as page:
        expect(page.area(2)).to_contain_text("scatter: cancelled")
        expect(page.area(2)).to_contain_text(f"{answered:,} of 20,000 rows")
        shoot(page, shots, "reopened", 2)


def test_an_interrupt_ends_a_waiting_cell_within_a_second(lab: Any, shots: Path) -> None:
    from playwright.sync_api import expect

    lab.write(
        "interrupt",
        [
            SETUP,
            "df = pd.DataFrame({'gene': [f'gene{i:05}' for i in range(20_000)]})\npool = sk.connect(ends)",
            "df.swarm.scatter('What does {gene} do in the cell?', max_tokens=64, monitor=True)",
            "run = sk.last_run()\nprint(run.state, run.stats.answered, run.partial()['response'].notna().sum())",
        ],
    )
    with lab.open("interrupt") as page:
        page.run(0)
        page.run(1)
        page.tab.evaluate(WATCH, 2)
        page.start(2)
        page.tab.wait_for_function("window.seen.some(([at, count]) => count > 500)")
        expect(page.area(2)).to_contain_text("interrupt the kernel")
        expect(page.area(2).get_by_role("button", name="Stop")).to_be_hidden()
        shoot(page, shots, "waiting", 2)
        took = page.tab.evaluate(INTERRUPT, 2)
        page.wait_idle()
        state, answered, there = page.run(3).split()
        print(f"\ninterrupt: the cell ended after {took:.3f} s, {int(there):,} rows kept")
        assert took < 1.0
        assert (state, there) == ("cancelled", answered)
        expect(page.area(2)).to_contain_text(f"{int(answered):,} of 20,000 rows")
        shoot(page, shots, "interrupted", 2)


def test_a_saved_notebook_shows_how_it_ended_to_who_has_no_kernel(lab: Any, shots: Path) -> None:
    from playwright.sync_api import expect

    lab.write(
        "ended",
        [
            SETUP,
            "df = pd.DataFrame({'gene': [f'gene{i:05}' for i in range(2_000)]})\ndf.loc[3, 'gene'] = None\n"
            "picker = sk.EndpointPicker([('127.0.0.1', 9), *ends], model='echo')\npicker.probe().result()\npicker",
            "df.swarm.scatter('What does {gene} do in the cell?', max_tokens=64).head(3)",
            "df.swarm.scatter('What does {genes} do in the cell?')",
            "run = df.head(300).swarm.submit('Where is {gene} in the cell?', max_tokens=64)\nsk.RunMonitor(run)",
            "done = run.result()",
        ],
    )
    with lab.open("ended") as page:
        page.run(0)
        page.run(1)
        expect(page.area(1)).to_contain_text("45 of 46 endpoints selected")
        shoot(page, shots, "picker-probed", 1)
        page.area(1).get_by_role("button", name="Use these").click()
        expect(page.area(1)).to_contain_text("45 of 46 endpoints in use as the default pool")
        page.start(2)
        expect(page.area(2)).to_contain_text(" of 2,000 rows · ")
        shoot(page, shots, "bar", 2)
        page.tab.wait_for_function("window.panel.sessionContext.session.kernel.status === 'idle'")
        page.start(3)
        page.wait_idle()
        page.run(4)
        page.run(5)
        expect(page.area(4)).to_contain_text("scatter: done")
        shoot(page, shots, "ended", 1)
        shoot(page, shots, "ended-below", 3)
        page.save()
        assert page.strangers == []
    saved = lab.folder / "notebooks" / "ended.ipynb"
    saved.rename(saved.with_name("ended-reopened.ipynb"))
    with lab.open("ended-reopened") as page:
        page.tab.wait_for_timeout(2000)  # what is looked for must have had its time to come
        everything = page.tab.locator(".jp-Notebook")
        expect(everything).not_to_contain_text("Error displaying widget")
        expect(page.area(1)).to_contain_text("45 of 46 endpoints in use as the default pool")
        expect(page.area(2)).to_contain_text("scatter: 2,000 rows, 1,999 answered, 1 failed (1 without a prompt), ")
        expect(page.area(2)).to_contain_text("1 of 2,000 rows failed:")
        expect(page.area(3)).to_contain_text("%tb Plain shows the whole trace.")
        expect(page.area(3)).not_to_contain_text("swarmkit/frames")
        expect(page.area(4)).to_contain_text("scatter: done")
        assert page.area(4).locator(".jp-OutputArea-child").count() == 1
        shoot(page, shots, "ended-reopened", 1)
        shoot(page, shots, "ended-reopened-below", 3)


def test_hostile_text_shows_as_text_and_runs_nothing(lab: Any, shots: Path) -> None:
    from playwright.sync_api import expect

    lab.write(
        "hostile",
        [
            SETUP
            + f"""hostile = {HOSTILE!r}
bad = sk.local(1, engine="echo", model=hostile, tokens_per_s=30).endpoints[0]
end = sk.AgentEndpoint(bad.host, bad.port, {{"tag": hostile}}, api_key=bad.api_key)
df = pd.DataFrame({{"t": [hostile + " more" * 3 * i for i in range(40)]}}, index=[hostile] * 40)""",
            "picker = sk.EndpointPicker([end])\npicker.probe().result()\npicker",
            "wrong = sk.EndpointPicker([end], model=hostile * 2)\nwrong.probe().result()\nwrong",
            "pool = sk.connect(end)\nrun = df.swarm.submit('{t}', progress=False, pool=pool)\nsk.RunMonitor(run)",
            "answers = run.result()\nrun",
            "none = df.swarm.submit('{t}', progress=False, pool=sk.VLLMPool([end], model=hostile * 2))\n"
            "sk.RunMonitor(none)",
            "answers.head(2)",
            "display(pool, end, run.stats, df.head(8).swarm.compare('{t}', repeats=1, pool=pool))",
        ],
    )
    with lab.open("hostile") as page:
        page.run(0)
        for cell in (1, 2):
            page.run(cell)
            expect(page.area(cell)).to_contain_text(HOSTILE)
        page.run(3)
        expect(page.area(3)).to_contain_text(f"echo: {HOSTILE}")  # the newest answers
        shoot(page, shots, "hostile", 1)
        for cell in (4, 5, 6, 7):
            page.run(cell)
        expect(page.area(5)).to_contain_text(f"The model `{HOSTILE}")  # a server's words, in a monitor
        expect(page.area(6)).to_contain_text("<img src=")
        expect(page.area(7)).to_contain_text(HOSTILE)
        shoot(page, shots, "hostile-tables", 6)
        assert page.tab.evaluate("window.harmed") is None
        alive = ".jp-Cell-outputArea img[src*=stranger], .jp-Cell-outputArea script"
        assert page.tab.locator(alive).count() == 0
        assert page.strangers == []
