"""A widget for choosing endpoints."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets
import traitlets

from ..client import io_thread
from ..client.capabilities import PROBE_S, ServerInfo, probe_all, require_model
from ..client.hostfile import AgentEndpoint
from ..client.keys import hidden
from ..client.metrics import Load, ask_load
from ..errors import EndpointError, SettingError
from ..pool.capabilities import known_words
from ..pool.connect import default_pool, new_pool, set_default_pool
from ..pool.targets import Target, resolve
from ..pool.vllm_pool import VLLMPool
from ..runs.notebook import Slot
from ..text import plural
from .endpoint_table import (
    SIZE,
    SORTED_BY,
    header_html,
    in_order,
    matching,
    page_of,
    row_html,
    status_html,
    table_html,
    tag_options,
)
from .refresh import follow

__all__ = ["EndpointPicker"]

_LOAD_S = 5.0
# The columns of the table are aligned in all rows, the header included.
_NARROW = {"flex": "0 0 24px", "width": "24px", "margin": "3px 4px 0 2px"}
_WIDE = {"flex": "1 1 0", "min_width": "0", "margin": "0"}


class EndpointPicker(ipywidgets.VBox):
    """A table of endpoints with checkboxes and their health.

    Buttons act on the endpoints that match the filters: *Probe* probes them and deselects those that are down, *All*
    adds them to the selection, *None* removes them from it, *Healthy* selects those of them that are up and deselects
    the others. *Use these* does what ``use`` does. A static table takes the widget's place then, which a saved notebook
    keeps; show the picker again to change the selection.

    Parameters
    ----------
    target : pool, or what ``connect`` takes
        The endpoints; those of the default pool by default. No request is sent until *Probe* is pressed; what a pool
        knows of its endpoints is shown at once.
    **settings
        Parameters of ``VLLMPool`` (``model``, ``api_key``, ...), if the target is not a pool.

    Attributes
    ----------
    selected : tuple of AgentEndpoint
        The selection, in the order of the table; at first all endpoints. Assign endpoints or their names to change
        it; ``observe`` it to be notified of changes.

    Raises
    ------
    HostfileError, SettingError
        The target is not valid; names that are not in the table were selected.

    Notes
    -----
    Thousands of endpoints are shown page by page. Requests are sent on swarmkit's own event loop with bounded
    concurrency, so the notebook is not blocked; ``/metrics`` is requested only for endpoints on the page.

    Examples
    --------
    >>> picker = EndpointPicker(["http://node1:8000", "http://node2:8000"])
    >>> picker.selected = ["node2:8000"]
    >>> picker, picker.pool.size
    (<EndpointPicker: 1 of 2 endpoints selected>, 1)
    >>> picker = EndpointPicker(pool)
    >>> picker.probe().result()  # what is down is unticked
    >>> picker.use().size
    4
    """

    selected: Any = traitlets.Tuple()

    def __init__(self, target: Target = None, **settings: Any) -> None:
        target = default_pool() if target is None else target
        settings = hidden(settings)
        own_key = settings.get("api_key") is not None
        self._source = target if isinstance(target, VLLMPool) else new_pool(resolve(target, own_key), settings)
        self._endpoints = self._source.endpoints
        self._index = {key: i for i, e in enumerate(self._endpoints) for key in (e, e.name)}
        self._infos = self._source._core.infos
        self._load: dict[str, Load] = {}
        self._page: Sequence[int] = ()
        self._probe: io_thread.Job[None] | None = None
        self._load_job: io_thread.Job[None] | None = None
        self._n_asked = self._n_answered = 0
        self._lock = threading.RLock()  # callbacks run on the kernel's threads, redraws on ours
        self._slot = Slot()
        self._problem = ""  # why the selection cannot be used

        self._text = ipywidgets.Text(placeholder="filter: address, tag or model", layout={"width": "240px"})
        self._tag = ipywidgets.Dropdown(options=tag_options(self._endpoints), layout={"width": "180px"})
        orders = [("in the given order", ""), *((f"sorted by {name}", name) for name in SORTED_BY)]
        self._by = ipywidgets.Dropdown(options=orders, layout={"width": "150px"})
        self._number = ipywidgets.BoundedIntText(value=1, min=1, max=1, layout={"width": "80px"})
        self._pages = ipywidgets.HTML()
        self._status = ipywidgets.HTML()
        rows = [_Row(self._ticked) for _ in range(min(SIZE, len(self._endpoints)))]
        self._rows = rows
        self._table = ipywidgets.VBox(rows)
        self._header = ipywidgets.HTML(header_html(), layout=_WIDE)
        header = ipywidgets.HBox([ipywidgets.Box(layout=_NARROW), self._header])
        self._pager = ipywidgets.HBox(
            [
                _button("", "chevron-left", "Previous page", lambda: self._turn(-1)),
                self._number,
                self._pages,
                _button("", "chevron-right", "Next page", lambda: self._turn(+1)),
            ],
            layout={"align_items": "center"},
        )
        self._probe_button = _button(
            "Probe", "heartbeat", "Probe the endpoints that match the filters", lambda: self.probe()
        )
        buttons = [
            self._probe_button,
            _button(
                "All", "check-square-o", "Select all that match the filters", lambda: self._choose(lambda on: True)
            ),
            _button("None", "square-o", "Deselect all that match the filters", lambda: self._choose(lambda on: False)),
            _button(
                "Healthy",
                "heart",
                "Of all that match the filters, select those that are up",
                lambda: self._choose(self._is_up),
            ),
        ]
        self._use_button = _button(
            "Use these",
            "check",
            "Make the selected endpoints the default pool, and keep this table as it is",
            self._use,
        )
        self._use_button.button_style = "primary"
        has_tags = len(self._tag.options) > 1
        filters = [self._text, *([self._tag] if has_tags else []), self._by, self._use_button]
        tools = ipywidgets.HBox([*buttons, *filters], layout={"flex_flow": "row wrap"})
        # A narrow cell scrolls the table instead of shrinking it.
        table = ipywidgets.VBox([header, self._table], layout={"min_width": "560px"})
        scroll = ipywidgets.Box([table], layout={"overflow": "auto hidden", "display": "block", "width": "100%"})
        super().__init__([tools, self._status, scroll, self._pager])

        self.selected = self._endpoints
        self.observe(lambda _: self._draw(), "selected")
        for control in (self._text, self._tag, self._by):
            control.observe(lambda _: self._filter(), "value")
        self._number.observe(lambda _: self._show_page(), "value")
        self._show_page()

    # ---- selection ------------------------------

    @traitlets.validate("selected")
    def _known(self, proposal: Any) -> tuple[AgentEndpoint, ...]:
        unknown = [choice for choice in proposal["value"] if choice not in self._index]
        if unknown:
            raise SettingError(f"{unknown[0]!r} is not one of the {plural(len(self._endpoints), 'endpoint')}")
        return tuple(self._endpoints[i] for i in sorted({self._index[choice] for choice in proposal["value"]}))

    @property
    def pool(self) -> VLLMPool:
        """The sub-pool of the selected endpoints; it shares the connections of the whole pool.

        Raises
        ------
        SettingError
            Nothing is selected.
        """
        return self._source.select([self._index[endpoint] for endpoint in self.selected])

    def use(self) -> VLLMPool:
        """Make the sub-pool the default pool, and return it. Where the picker is shown, a static table takes its place.

        Raises
        ------
        SettingError
            Nothing is selected.
        """
        pool = self.pool
        set_default_pool(pool)
        with self._lock:
            used = f"{self._chosen()} in use as the default pool"
            self._slot.replace({"text/plain": used, "text/html": self._static(used)})
            self._slot = Slot()  # shown again, it is a widget again
        return pool

    def _use(self) -> None:
        try:
            self._problem = ""
            self.use()
        except SettingError as exc:
            self._problem = str(exc)
        self._draw()

    def probe(self) -> concurrent.futures.Future[None]:
        """Probe the endpoints that match the filters, as the button does; returns at once.

        Returns
        -------
        concurrent.futures.Future
            Done when all have answered or timed out: ``picker.probe().result()`` waits for that.
        """
        with self._lock:
            if self._probe is None or self._probe.done():
                asked = [self._endpoints[i] for i in self._matches()]
                self._n_asked, self._n_answered = len(asked), 0
                self._probe = io_thread.start(self._ask(asked))
                self._probe_button.disabled = True
                follow(self._probe, self._draw)
            return self._probe

    async def _ask(self, endpoints: Sequence[AgentEndpoint]) -> None:
        def record(info: ServerInfo) -> None:
            self._infos[info.endpoint.url] = require_model(info, self._source.model)
            self._n_answered += 1

        await probe_all(self._source._core.transport(), endpoints, PROBE_S, record)
        await asyncio.to_thread(self._deselect_down, endpoints)  # which redraws, and observers may take their time
        await self._ask_load(self._page)

    async def _ask_load(self, page: Iterable[int]) -> None:
        async def one(endpoint: AgentEndpoint) -> None:
            with contextlib.suppress(EndpointError):  # many servers have no /metrics: the columns stay empty
                if load := await ask_load(self._source._core.transport(), endpoint, _LOAD_S):
                    self._load[endpoint.url] = load

        await asyncio.gather(*(one(self._endpoints[i]) for i in page if self._is_up(i)))

    def _deselect_down(self, probed: Iterable[AgentEndpoint]) -> None:
        down = {e for e in probed if self._infos[e.url].status == "down"}
        if down.intersection(self.selected):
            self.selected = [e for e in self.selected if e not in down]

    def _is_up(self, index: int) -> bool:
        info = self._infos.get(self._endpoints[index].url)
        return info is not None and info.status == "up"

    # ---- events ------------------------------

    def _matches(self) -> list[int]:
        found = matching(self._endpoints, self._infos, self._text.value, self._tag.value or "")
        return in_order(found, self._endpoints, self._infos, self._by.value)

    def _ticked(self, row: _Row) -> None:
        """A checkbox has changed, by a click or because its row now shows another endpoint."""
        with self._lock:
            endpoint = self._endpoints[self._page[self._rows.index(row)]]
            if row.box.value != (endpoint in self.selected):
                others = [e for e in self.selected if e != endpoint]
                self.selected = [*others, endpoint] if row.box.value else others

    def _choose(self, rule: Callable[[int], bool]) -> None:
        matches = self._matches()
        shown = {self._endpoints[i] for i in matches}
        kept = [e for e in self.selected if e not in shown]
        self.selected = [*kept, *(self._endpoints[i] for i in matches if rule(i))]

    def _filter(self) -> None:
        if self._number.value == 1:
            self._show_page()
        else:
            self._number.value = 1

    def _turn(self, by: int) -> None:
        self._number.value += by

    # ---- display ------------------------------

    def _show_page(self) -> None:
        """Draw the page, and request the load of its endpoints."""
        self._draw()
        with self._lock:
            if self._load_job is not None:
                self._load_job.stop()
            if any(self._is_up(i) for i in self._page):
                self._load_job = io_thread.start(self._ask_load(self._page))
                follow(self._load_job, self._draw)

    def _draw(self) -> None:
        with self._lock:
            selected = set(self.selected)
            matches = self._matches()
            self._page, number, pages = page_of(matches, self._number.value)
            self._number.max, self._number.value = pages, number
            self._pages.value = f"of {pages:,}"
            self._pager.layout.display = "flex" if pages > 1 else "none"
            self._header.value = header_html(self._by.value)
            rows = self._rows[: len(self._page)]
            for row, index in zip(rows, self._page, strict=True):
                row.box.value = self._endpoints[index] in selected
                row.text.value = self._row_html(index)
            self._table.children = rows
            probing = self._probe is not None and not self._probe.done()
            self._probe_button.disabled = probing
            self._use_button.disabled = not selected
            asked = self._n_asked if probing else 0
            problem = None if probing or self._probe is None else self._probe.exception()
            said = str(problem or self._problem)
            self._status.value = status_html(
                self._endpoints, self._infos, len(selected), len(matches), asked, self._n_answered, said
            )

    def _row_html(self, index: int) -> str:
        endpoint = self._endpoints[index]
        info, load = self._infos.get(endpoint.url), self._load.get(endpoint.url)
        does = known_words(self._source._core.memo, info, self._source.model) if info else ""
        return row_html(endpoint, info, load, does)

    def _static(self, note: str = "") -> str:
        """The page as it is now. Without widgets it is what shows."""
        with self._lock:
            selected = set(self.selected)
            rows = [(self._endpoints[i] in selected, self._row_html(i)) for i in self._page]
            others = len(self._endpoints) - len(rows)
            said = [note, f"{plural(others, 'other endpoint')} not shown" if others else ""]
            return table_html(self._status.value, self._by.value, rows, "; ".join(filter(None, said)))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        shown: dict[str, Any] = super()._repr_mimebundle_(**kwargs)
        return {**shown, "text/plain": repr(self), "text/html": self._static()}

    def _ipython_display_(self) -> None:
        self._slot.show(self._repr_mimebundle_())

    def _chosen(self) -> str:
        return f"{len(self.selected):,} of {plural(len(self._endpoints), 'endpoint')}"

    def __repr__(self) -> str:
        return f"<EndpointPicker: {self._chosen()} selected>"


class _Row(ipywidgets.HBox):
    """A row of the table: a checkbox and its text."""

    def __init__(self, ticked: Callable[[_Row], None]) -> None:
        self.box = ipywidgets.Checkbox(indent=False, layout=_NARROW)
        self.text = ipywidgets.HTML(layout=_WIDE)
        super().__init__([self.box, self.text], layout={"align_items": "center"})
        self.box.observe(lambda _: ticked(self), "value")


def _button(label: str, icon: str, tooltip: str, press: Callable[[], object]) -> ipywidgets.Button:
    button = ipywidgets.Button(description=label, icon=icon, tooltip=tooltip, layout={"width": "auto"})
    button.on_click(lambda _: press())
    return button
