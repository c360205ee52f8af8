"""JupyterLab in a real browser: a notebook of cells that a test runs, looks at and presses.

Needs the extra ``browser`` and Debian's chromium. Everything stays on loopback; what a page asks of any other host is
kept in ``Page.strangers``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = "/usr/bin/chromium"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/themes": {"theme": "JupyterLab Light", "theme-scrollbars": True},
    "completer-extension/manager": {"providerTimeout": 30_000},  # it waits for a second; this machine may be busy
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are there, also those out of sight
}
_OPEN = """async () => {
  const app = window.jupyterapp; await app.restored;
  const panel = app.shell.currentWidget; await panel.context.ready;
  await panel.sessionContext.ready; await panel.sessionContext.session.kernel.info;
  app.shell.collapseLeft(); window.panel = panel;
}"""
_READ = """async (path) => {
  const app = window.jupyterapp; await app.restored;
  const kernelPreference = {shouldStart: false, canStart: false};
  window.panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook', kernelPreference});
  await window.panel.context.ready; app.shell.collapseLeft();
}"""
_RUN = """async (index) => {
  const app = window.jupyterapp; window.panel.content.activeCellIndex = index;
  await app.commands.execute('notebook:run-cell');
}"""
_START = """(index) => {
  const app = window.jupyterapp; window.panel.content.activeCellIndex = index;
  app.commands.execute('notebook:run-cell'); return Date.now() / 1000;
}"""
_RESTART = """() => { window.restarted = window.jupyterapp.commands.execute('notebook:restart-kernel'); }"""
_RESTARTED = """async () => {
  await window.restarted; await window.panel.sessionContext.session.kernel.requestKernelInfo();
}"""
_SOURCE = "([index, code]) => window.panel.content.model.cells.get(index).sharedModel.setSource(code)"
_OUTPUTS = "(index) => window.panel.content.model.cells.get(index).outputs.toJSON()"


class Lab:
    """JupyterLab on a port and in folders of its own, and a browser before it.

    Parameters
    ----------
    folder : path
        Its notebooks and settings.
    browser : playwright's Browser
        What opens the pages.
    """

    def __init__(self, folder: Path, browser: Browser) -> None:
        self.folder = folder
        self._browser = browser
        self._token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{free.getsockname()[1]}"
        dirs = {f"JUPYTERLAB_{n.upper()}_DIR": str(folder / n) for n in ("settings", "workspaces")}
        for name, values in SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        (folder / "notebooks").mkdir()
        roots = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]  # this swarmkit, and tests/scripted.py
        self._log = (folder / "lab.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--allow-root",
             f"--port={urlsplit(self._url).port}", "--ServerApp.port_retries=0",
             f"--IdentityProvider.token={self._token}", "--LabApp.expose_app_in_browser=True"],
            cwd=folder / "notebooks",
            env={**os.environ, **dirs, "JUPYTER_CONFIG_DIR": str(folder / "config"), "PYTHONPATH": ":".join(roots)},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        self._wait(60.0)

    def _wait(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                urllib.request.urlopen(f"{self._url}/api/status?token={self._token}", timeout=5).close()
                return
            except OSError as exc:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self.folder / "lab.log").read_text()[-2000:]
                    raise RuntimeError(f"JupyterLab did not start. It said:\n{said}") from exc
                time.sleep(0.2)

    def write(self, name: str, cells: Sequence[str]) -> Path:
        """Write a notebook of code cells."""
        path = self.folder / "notebooks" / f"{name}.ipynb"
        code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
        parts = [{**code, "id": f"cell{i}", "source": source} for i, source in enumerate(cells)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        path.write_text(json.dumps({"cells": parts, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
        return path

    @contextlib.contextmanager
    def page(self, path: str = "", width: int = 1280, height: int = 900, scale: float = 1.0) -> Iterator[Page]:
        """JupyterLab in a browser of its own."""
        context = self._browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
        try:
            page = Page(context.new_page())
            page.tab.goto(f"{self._url}/lab{path}?token={self._token}&reset")
            page.tab.wait_for_function("window.jupyterapp")
            yield page
        finally:
            context.close()

    @contextlib.contextmanager
    def open(self, name: str, **how: Any) -> Iterator[Page]:
        """Open a notebook in a browser of its own, and wait for its kernel."""
        with self.page(f"/tree/{name}.ipynb", **how) as page:
            page.tab.wait_for_function("document.querySelector('.jp-Notebook .jp-Cell')")
            page.tab.evaluate(_OPEN)
            yield page

    def close(self) -> None:
        """End it, kernels and all."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


class Page:
    """An open notebook.

    Attributes
    ----------
    tab : playwright's Page
        For what is not here.
    strangers : list of str
        Requests to anything but loopback.
    """

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.strangers: list[str] = []
        tab.set_default_timeout(30_000)
        for event in ("request", "websocket"):
            tab.on(event, self._seen)

    def _seen(self, asked: Any) -> None:
        parts = urlsplit(asked.url)
        if parts.hostname != "127.0.0.1" and parts.scheme not in ("data", "blob"):
            self.strangers.append(asked.url)

    def read(self, name: str) -> None:
        """Open a notebook without a kernel."""
        self.tab.evaluate(_READ, f"{name}.ipynb")
        self.tab.wait_for_function("window.panel.content.widgets.length === window.panel.content.model.cells.length")

    def write(self, cell: int, code: str) -> None:
        """Write code into a cell, in place of what is there."""
        self.tab.evaluate(_SOURCE, [cell, code])

    def type(self, cell: int, code: str) -> None:
        """Go to the end of a cell and type, key by key."""
        self.editor(cell).click()
        self.tab.keyboard.press("Control+End")
        self.tab.keyboard.type(code)

    def editor(self, cell: int) -> Any:
        """Where a cell's code stands."""
        return self.tab.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".cm-content")

    def complete(self, cell: int, code: str) -> Any:
        """Type code and press Tab; what is offered then."""
        self.type(cell, code)
        self.tab.keyboard.press("Tab")
        offered = self.tab.locator(".jp-Completer:not(.lm-mod-hidden)")
        offered.locator(".jp-Completer-item").first.wait_for()
        return offered

    def run(self, cell: int) -> str:
        """Run a cell, wait for its end, and return what it printed or said.

        Raises
        ------
        RuntimeError
            It ended with an error.
        """
        self.tab.evaluate(_RUN, cell)
        if any(output["output_type"] == "error" for output in self.outputs(cell)):
            raise RuntimeError(self.said(cell))
        return self.said(cell)

    def start(self, cell: int) -> float:
        """Run a cell without waiting; the time it was started, in seconds."""
        return float(self.tab.evaluate(_START, cell))

    def wait_idle(self) -> None:
        """Wait for the kernel; what is sent to it before a cell that failed is wholly over is aborted, and it says that
        it is idle a moment before that."""
        self.tab.wait_for_function("window.panel.sessionContext.session.kernel.status === 'idle'")
        self.tab.wait_for_timeout(500)

    def restart(self) -> None:
        """Restart the kernel as the menu does, and wait for it."""
        self.tab.evaluate(_RESTART)
        self.tab.locator(".jp-Dialog .jp-mod-accept.jp-mod-warn").click()
        self.tab.evaluate(_RESTARTED)
        self.wait_idle()

    def outputs(self, cell: int) -> list[dict[str, Any]]:
        """What stands under a cell, as it would be saved."""
        found: list[dict[str, Any]] = self.tab.evaluate(_OUTPUTS, cell)
        return found

    def said(self, cell: int) -> str:
        """The plain text of that."""
        parts = []
        for output in self.outputs(cell):
            text = output.get("text") or output.get("data", {}).get("text/plain") or output.get("traceback", "")
            parts.append("".join(text))
        return "\n".join(parts)

    def area(self, cell: int) -> Any:
        """Where a cell's output stands."""
        return self.tab.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-Cell-outputArea")

    def theme(self, name: str) -> None:
        """Change to the light or the dark theme."""
        full = f"JupyterLab {name.title()}"
        self.tab.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", full)
        self.tab.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(name == 'light').lower()}'")

    def save(self) -> None:
        """Write the notebook to disk."""
        self.tab.evaluate("() => window.panel.context.save()")


@contextlib.contextmanager
def laboratory(folder: Path) -> Iterator[Lab]:
    """A JupyterLab and a browser, for a while."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        lab = Lab(folder, browser)
        try:
            yield lab
        finally:
            lab.close()
            browser.close()
