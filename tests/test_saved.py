"""What a notebook keeps of bars, monitors, pickers, warnings and errors: as saved, and as HTML without a kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import IPython
import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

pytestmark = pytest.mark.slow  # each starts a kernel

CELLS = {
    "setup": """
import os, signal, tempfile, threading, time, warnings
import pandas as pd, swarmkit as sk
swarm = sk.local(2, engine="echo", tokens_per_s=50, max_num_seqs=8)
pool = sk.connect(swarm)
df = pd.DataFrame({"t": [f"<b>{i}</b> and more words" for i in range(60)]})
df.loc[3, "t"] = None
many = pd.DataFrame({"t": [f"number {i}" for i in range(600)]})
store = tempfile.mkdtemp()
def interrupt(earlier):
    # Interrupts this kernel once the run after an earlier one has 20 answers.
    def wait():
        while sk.last_run() is earlier or sk.last_run().stats.answered < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=wait).start()
""",
    "bar": """out = df.swarm.scatter("Say {t}", max_tokens=60)""",
    "short bar": """out = df.tail(2).swarm.scatter("Say {t}", max_tokens=60)""",
    "cut": """out = df.tail(2).swarm.scatter("Say {t}", max_tokens=3)""",
    "stored": """
for _ in range(2):
    out = df.tail(2).swarm.scatter("Say {t}", max_tokens=60, store=store)
    top = df.tail(2).swarm.tree_reduce("t", "Merge {responses}", max_tokens=60, store=store)
""",
    "recorded": """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    df.head(5).swarm.scatter("Say {t}", max_tokens=60, progress=False)
print(len(caught), caught[0].category.__name__)
""",
    "filtered": """
with warnings.catch_warnings():
    warnings.simplefilter("ignore", sk.SwarmWarning)
    out = df.head(5).swarm.scatter("Say {t}", max_tokens=60, progress=False)
with warnings.catch_warnings():
    warnings.simplefilter("error", sk.SwarmWarning)
    try:
        df.head(5).swarm.scatter("Say {t}", max_tokens=60, progress=False)
    except sk.SwarmWarning:
        print("raised")
""",
    "frames": """
%%capture shown
known = [pd.DataFrame({"t": [f"{k} {i}" for i in range(1000)]}) for k in range(3)]
with sk.local(1, engine="echo") as fast, sk.connect(fast) as quick:
    parts = list(sk.iter_scatter(known, "{t}", pool=quick, max_tokens=60, store=store, progress=False))
pool = sk.connect(swarm)
more = [pd.concat([frame, frame.head(16) + " and again" * 8]) for frame in known]
began = time.monotonic()
for part in sk.iter_scatter(more, "{t}", pool=pool, max_tokens=60, store=store):
    time.sleep(0.5)
took_s = time.monotonic() - began
""",
    "states": """
print(*(each.data["text/plain"] for each in shown.outputs), took_s, sep="\\n")
""",
    "other warning": """warnings.warn("of somebody else")""",
    "wrong value": """
def ask(frame):
    return frame.swarm.scatter("Say {t}", max_tokens=-1)

ask(df)
""",
    "wrong function": """
def ask(row):
    error = "Say " + row["t"].nothing
    return error

df.swarm.scatter(ask)
""",
    "wrong name": """df.swarm.scatter("Say {t}", max_token=1)""",
    "whole trace": """%tb Plain""",
    "noted": """
try:
    df.swarm.scatter("Say {t}", max_tokens=-1)
except sk.SwarmError as exc:
    exc.add_note("of the second group")
    raise
""",
    "interrupted": """
interrupt(sk.last_run())
many.swarm.scatter("Say again {t}", max_tokens=60)
""",
    "interrupted with a store": """
interrupt(sk.last_run())
many.swarm.scatter("Say once more {t}", max_tokens=60, store=tempfile.mkdtemp())
""",
    "interrupted tree": """
interrupt(sk.last_run())
many.swarm.tree_reduce("t", "Merge {responses}", fanin=2, max_tokens=60)
""",
    "submitted": """
run = df.head(3).swarm.submit("Now say {t}", max_tokens=60)
sk.RunMonitor(run)
""",
    "waiting": """
slow = many.swarm.submit("Slowly say {t}", max_tokens=60, progress=False)
interrupt(None)
slow.result()
""",
    "over": """
slow.cancel()
out = run.result()
""",
    "picker": """
picker = sk.EndpointPicker(swarm)
picker.probe().result()
picker
""",
    "used": """chosen = picker.use()""",
    "end": """swarm.stop()""",
}
PLACES = {name: place for place, name in enumerate(CELLS)}


@pytest.fixture(scope="module")
def saved() -> Any:
    """A notebook of these cells, as it is saved once all were run."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code.strip()) for code in CELLS.values()])
    NotebookClient(made, timeout=60, allow_errors=True, kernel_name="python3").execute()
    return nbformat.reads(nbformat.writes(made), as_version=4)


@pytest.fixture(scope="module")
def page(saved: Any) -> str:
    """What is seen of it without a kernel."""
    return re.sub(r"<[^>]*>", "", HTMLExporter().from_notebook_node(saved)[0])


def outputs(saved: Any, name: str) -> list[Any]:
    return list(saved.cells[PLACES[name]].outputs)


def said(saved: Any, name: str) -> list[str]:
    """The text of each output of a cell."""
    found = []
    for output in outputs(saved, name):
        lines = output.get("traceback")
        found.append("\n".join(lines) if lines else output.get("text") or output["data"]["text/plain"])
    return [re.sub(r"\x1b\[[\d;]*m", "", text) for text in found]


def test_no_output_needs_a_kernel(saved: Any, page: str) -> None:
    for cell in saved.cells:
        for output in cell.outputs:
            assert not [kind for kind in output.get("data", {}) if "widget" in kind], cell.source
    assert "Error displaying widget" not in page
    assert "0%|" not in page


def test_a_bar_ends_as_what_became_of_the_rows(saved: Any, page: str) -> None:
    bar, warning = said(saved, "bar")
    assert re.fullmatch(r"scatter: 60 rows, 59 answered, 1 failed \(1 without a prompt\), \d+\.\d s", bar)
    assert bar in page
    assert "background:#0072B2" in outputs(saved, "bar")[0].data["text/html"]
    assert warning.startswith("SwarmWarning: 1 of 60 rows failed:\n  1 row: missing value in column 't'\n      row 3")
    (bar,) = said(saved, "short bar")
    assert bar.startswith("scatter: 2 rows, 2 answered, ")


def test_a_bar_says_that_all_rows_come_from_the_store(saved: Any) -> None:
    _, _, scatter, tree = said(saved, "stored")
    assert re.fullmatch(r"scatter: 2 rows, 0 answered, 2 stored, 0\.\d s", scatter)
    assert re.fullmatch(r"tree_reduce level 1: 1 merge, 0 answered, 1 stored, 0\.\d s", tree)


def test_a_bar_over_frames_says_the_rate_of_the_servers(saved: Any) -> None:
    (states,) = said(saved, "states")
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d.,]+) rows/s", states)]
    assert rates
    assert max(rates) < 300, "48 rows are asked; 3,000 are in the store"


def test_a_bar_over_frames_ends_with_the_time_of_all(saved: Any) -> None:
    *_, last, took_s = said(saved, "states")[0].splitlines()
    shown = re.fullmatch(r"scatter: 3,048 rows, 48 answered, 3,000 stored, (\d+\.\d) s", last)
    assert shown is not None
    assert float(shown[1]) > float(took_s) - 0.3, "also the last 0.5 s, which are the loop's own"


def test_a_warning_is_a_box_without_paths_or_source(saved: Any) -> None:
    box = outputs(saved, "bar")[1]
    assert box.output_type == "display_data"
    assert "<b>1 of 60 rows failed:</b>" in box.data["text/html"]
    for text in box.data.values():
        assert not re.search(r"ipykernel|\.py\b|df\.swarm\.scatter\(\"Say", text)
    assert "<b>" not in outputs(saved, "cut")[1].data["text/html"], "a lone line needs no headline"


def test_warnings_are_recorded_and_filtered_as_ever(saved: Any) -> None:
    assert said(saved, "recorded") == ["1 SwarmWarning\n"]
    assert said(saved, "filtered") == ["raised\n"]
    (other,) = outputs(saved, "other warning")
    assert other.name == "stderr"
    assert "UserWarning: of somebody else" in other.text


def test_an_error_shows_its_message_and_the_callers_lines(saved: Any) -> None:
    (shown,) = said(saved, "wrong value")
    assert shown.startswith("SettingError: max_tokens=-1: must be ")
    assert re.search(
        r"\n\nCell In\[\d+\], line 4\n    ask\(df\)\nCell In\[\d+\], line 2\n    return frame\.swarm", shown
    )
    assert "swarmkit/" not in shown
    assert shown.splitlines()[-1] == "%tb Plain shows the whole trace."
    (shown,) = said(saved, "wrong function")
    assert re.search(
        r"\nCell In\[\d+\], line 5\n    df\.swarm\.scatter\(ask\)\n\ncaused by AttributeError:\n"
        r"Cell In\[\d+\], line 2\n    error = \"Say \" \+ row\[\"t\"\]\.nothing\n\n%tb",
        shown,
    )
    assert "swarmkit/" not in shown
    (shown,) = said(saved, "noted")
    assert shown.startswith("SettingError: max_tokens=-1: must be ")
    assert "\nof the second group\n\nCell In" in shown
    (shown,) = said(saved, "wrong name")
    assert shown.startswith("TypeError: ")
    assert len(shown.splitlines()) == 6
    (whole,) = said(saved, "whole trace")
    assert "swarmkit/frames/call.py" in whole


def test_an_interrupt_shows_what_is_kept(saved: Any) -> None:
    bar, shown = said(saved, "interrupted")
    kept = int(re.match(r"scatter, ended early: 600 rows, (\d+) answered, \d+ left", bar)[1])  # type: ignore[index]
    assert shown.startswith(f"ScatterInterrupted: interrupted: {kept} of 600 rows answered. They are in ")
    assert "\n    many.swarm.scatter(" in shown
    assert "swarmkit/" not in shown
    assert "; only_missing=True sends only the others" in shown
    assert " and in the store: the same call again asks only" in said(saved, "interrupted with a store")[-1]
    shown = said(saved, "interrupted tree")[-1]
    assert "; with store= the same call asks only the others" in shown
    assert "only_missing" not in shown, "which tree_reduce does not take"
    (shown,) = said(saved, "waiting")
    assert shown.startswith("KeyboardInterrupt: the waiting has ended, and the run goes on")
    assert "\n    slow.result()" in shown


def test_a_run_has_one_display(saved: Any, page: str) -> None:
    (shown,) = said(saved, "submitted")
    assert re.fullmatch(r"scatter: 3 rows, 3 answered, \d+\.\d s", shown)
    assert "scatter: done" in page
    assert said(saved, "over") == []


def test_a_picker_ends_as_a_table(saved: Any, page: str) -> None:
    assert said(saved, "picker") == ["2 of 2 endpoints in use as the default pool"]
    assert said(saved, "used") == []
    assert page.count("☑") == 2
    assert "2 up" in page


ELSEWHERE = """
import io, logging
log = io.StringIO()
logging.basicConfig(stream=log)
logging.captureWarnings(True)
import IPython, pandas as pd, swarmkit as sk
swarm = sk.local(1, engine="echo")
pool = sk.connect(swarm)
df = pd.DataFrame({"t": ["a", None]})
#---
out = df.swarm.scatter("Say {t}", progress=False)
#---
swarm.stop()
print(IPython.__file__, "missing value" in log.getvalue())
#---
df.swarm.scatter("Say {t}", max_tokens=-1)
"""


def test_a_kernel_that_logs_warnings_and_has_ipython_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "IPython").symlink_to(Path(IPython.__file__).parent)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in ELSEWHERE.split("#---")])
    client = NotebookClient(made, timeout=60, allow_errors=True, kernel_name="python3")
    client.execute(env={**os.environ, "PYTHONPATH": path})
    _, quiet, logged, wrong = (cell.outputs for cell in made.cells)
    assert quiet == [], "whoever logs warnings has them all"
    assert logged[0].text == f"{tmp_path}/IPython/__init__.py True\n"
    first = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(wrong[0].traceback)).split("\n\n")[1]
    assert re.fullmatch(r"Cell In\[4\], line 1\n    df\.swarm\.scatter\(.*", first)
