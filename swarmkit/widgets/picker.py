"""Choose endpoints by hand."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets
import traitlets

from .. import bridge
from ..connect import Target, default_pool, resolve, set_default_pool
from ..errors import EndpointError, SettingError
from ..hostfile import AgentEndpoint
from ..markup import plural
from ..probe import PROBE_S, ServerInfo, judged, probe_all
from ..vllm_pool import VLLMPool
from .follow import follow
from .table import SIZE, Load, header_html, load_of, matching, page_of, row_html, status_html, tag_options

__all__ = ["EndpointPicker"]

_LOAD_S = 5.0
# The columns of the table begin at the same place in every line, header included.
_NARROW = {"flex": "0 0 24px", "width": "24px", "margin": "3px 4px 0 2px"}
_WIDE = {"flex": "1 1 0", "min_width": "0", "margin": "0"}


class EndpointPicker(ipywidgets.VBox):
    """A table of endpoints to tick, with their health.

    Buttons act on the endpoints that the filters let through: *Probe* asks them what they are, *All* adds them to the
    selection, *None* takes them off it, *Healthy* selects those of them that are up and no others of them.

    Parameters
    ----------
    target : pool, or what ``connect`` takes
        Whose endpoints; those of the default pool, if not given. Nothing is asked of them until *Probe* is pressed,
        unless a pool knows them already.
    **settings
        What ``VLLMPool`` takes (``model``, ``api_key``, ...), where the target is not a pool.

    Attributes
    ----------
    selected : tuple of AgentEndpoint
        What is ticked, in the order of the table; all to begin with. Assign endpoints or their names to change it;
        ``observe`` it to hear of changes.

    Raises
    ------
    HostfileError, SettingError
        The target is not understood; names that are not in the table were selected.

    Notes
    -----
    Thousands of endpoints are shown page by page. Requests go out on swarmkit's own loop, many at once but not all;
    ``/metrics`` is asked only of what is on the page. The notebook stays free meanwhile.

    Examples
    --------
    >>> picker = EndpointPicker(["http://node1:8000", "http://node2:8000"])
    >>> picker.selected = ["node2:8000"]
    >>> picker, picker.pool.size
    (<EndpointPicker: 1 of 2 endpoints selected>, 1)
    """

    selected: Any = traitlets.Tuple()

    def __init__(self, target: Target = None, **settings: Any) -> None:
        target = default_pool() if target is None else target
        given = {"chat": "auto", **settings}
        self._source = target if isinstance(target, VLLMPool) else VLLMPool(resolve(target), **given)
        self._endpoints = self._source.endpoints
        self._index = {key: i for i, e in enumerate(self._endpoints) for key in (e, e.name)}
        self._infos = self._source._core.infos
        self._load: dict[str, Load] = {}
        self._page: Sequence[int] = ()
        self._probe: bridge.Job[None] | None = None
        self._look: bridge.Job[None] | None = None
        self._asked = self._said = 0
        self._lock = threading.RLock()  # callbacks come on the kernel's threads, pictures on ours

        self._text = ipywidgets.Text(placeholder="filter: address, tag or model", layout={"width": "240px"})
        self._tag = ipywidgets.Dropdown(options=tag_options(self._endpoints), layout={"width": "180px"})
        self._number = ipywidgets.BoundedIntText(value=1, min=1, max=1, layout={"width": "80px"})
        self._pages = ipywidgets.HTML()
        self._status = ipywidgets.HTML()
        rows = [_Row(self._ticked) for _ in range(min(SIZE, len(self._endpoints)))]
        self._rows = rows
        self._table = ipywidgets.VBox(rows)
        header = ipywidgets.HBox([ipywidgets.Box(layout=_NARROW), ipywidgets.HTML(header_html(), layout=_WIDE)])
        self._pager = ipywidgets.HBox(
            [
                _button("", "chevron-left", "Previous page", lambda: self._turn(-1)),
                self._number,
                self._pages,
                _button("", "chevron-right", "Next page", lambda: self._turn(+1)),
            ],
            layout={"align_items": "center"},
        )
        self._probe_button = _button("Probe", "heartbeat", "Ask those on show what they are", lambda: self.probe())
        buttons = [
            self._probe_button,
            _button("All", "check-square-o", "Select those on show", lambda: self._choose(lambda on: True)),
            _button("None", "square-o", "Select none of those on show", lambda: self._choose(lambda on: False)),
            _button("Healthy", "heart", "Of those on show, select what is up", lambda: self._choose(self._is_up)),
        ]
        tools = ipywidgets.HBox([*buttons, self._text, self._tag], layout={"flex_flow": "row wrap"})
        # A narrow cell scrolls the table rather than squeezing it.
        table = ipywidgets.VBox([header, self._table], layout={"min_width": "560px"})
        scroll = ipywidgets.Box([table], layout={"overflow": "auto hidden", "display": "block", "width": "100%"})
        super().__init__([tools, self._status, scroll, self._pager])

        self.selected = self._endpoints
        self.observe(lambda _: self._draw(), "selected")
        for control in (self._text, self._tag):
            control.observe(lambda _: self._filter(), "value")
        self._number.observe(lambda _: self._show_page(), "value")
        self._show_page()

    # ---- what is chosen ------------------------------

    @traitlets.validate("selected")
    def _known(self, proposal: Any) -> tuple[AgentEndpoint, ...]:
        unknown = [choice for choice in proposal["value"] if choice not in self._index]
        if unknown:
            raise SettingError(f"{unknown[0]!r} is none of these {plural(len(self._endpoints), 'endpoint')}")
        return tuple(self._endpoints[i] for i in sorted({self._index[choice] for choice in proposal["value"]}))

    @property
    def pool(self) -> VLLMPool:
        """The sub-pool of what is selected; it shares the connections of the whole.

        Raises
        ------
        SettingError
            Nothing is selected.
        """
        return self._source.select([self._index[endpoint] for endpoint in self.selected])

    def use(self) -> VLLMPool:
        """Make the sub-pool the default one for ``df.swarm``, and return it."""
        pool = self.pool
        set_default_pool(pool)
        return pool

    def probe(self) -> concurrent.futures.Future[None]:
        """Ask the endpoints on show what they are, as the button does; returns at once.

        Returns
        -------
        concurrent.futures.Future
            Over when all have answered or their time is up: ``picker.probe().result()`` waits for that.
        """
        with self._lock:
            if self._probe is None or self._probe.done():
                asked = [self._endpoints[i] for i in self._matches()]
                self._asked, self._said = len(asked), 0
                self._probe = bridge.start(self._ask(asked))
                self._probe_button.disabled = True
                follow(self._probe, self._draw)
            return self._probe

    async def _ask(self, endpoints: Sequence[AgentEndpoint]) -> None:
        def heard(info: ServerInfo) -> None:
            self._infos[info.endpoint.url] = judged(info, self._source.model)
            self._said += 1

        await probe_all(self._source._core.transport(), endpoints, PROBE_S, heard)
        await self._ask_load(self._page)

    async def _ask_load(self, page: Iterable[int]) -> None:
        async def one(endpoint: AgentEndpoint) -> None:
            with contextlib.suppress(EndpointError):  # many servers have no /metrics: then the columns stay empty
                metrics = await self._source._core.transport().get(endpoint, "/metrics", timeout=_LOAD_S)
                if load := load_of(metrics):
                    self._load[endpoint.url] = load

        await asyncio.gather(*(one(self._endpoints[i]) for i in page if self._is_up(i)))

    def _is_up(self, index: int) -> bool:
        info = self._infos.get(self._endpoints[index].url)
        return info is not None and info.status == "up"

    # ---- what is pressed ------------------------------

    def _matches(self) -> list[int]:
        return matching(self._endpoints, self._infos, self._text.value, self._tag.value)

    def _ticked(self, row: _Row) -> None:
        """A box has changed: by hand, or because another endpoint has come to stand in its line."""
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

    # ---- what is shown ------------------------------

    def _show_page(self) -> None:
        """Draw the page, and ask those who stand on it for their load."""
        self._draw()
        with self._lock:
            if self._look is not None:
                self._look.stop()
            if any(self._is_up(i) for i in self._page):
                self._look = bridge.start(self._ask_load(self._page))
                follow(self._look, self._draw)

    def _draw(self) -> None:
        with self._lock:
            selected = set(self.selected)
            matches = self._matches()
            self._page, number, pages = page_of(matches, self._number.value)
            self._number.max, self._number.value = pages, number
            self._pages.value = f"of {pages:,}"
            self._pager.layout.display = "flex" if pages > 1 else "none"
            rows = self._rows[: len(self._page)]
            for row, index in zip(rows, self._page, strict=True):
                endpoint = self._endpoints[index]
                row.box.value = endpoint in selected
                row.text.value = row_html(endpoint, self._infos.get(endpoint.url), self._load.get(endpoint.url))
            self._table.children = rows
            probing = self._probe is not None and not self._probe.done()
            self._probe_button.disabled = probing
            asked = self._asked if probing else 0
            problem = None if probing or self._probe is None else self._probe.exception()
            self._status.value = status_html(
                self._endpoints, self._infos, len(selected), len(matches), asked, self._said, str(problem or "")
            )

    def __repr__(self) -> str:
        return f"<EndpointPicker: {len(self.selected):,} of {plural(len(self._endpoints), 'endpoint')} selected>"


class _Row(ipywidgets.HBox):
    """A line of the table: a box, and what stands beside it."""

    def __init__(self, ticked: Callable[[_Row], None]) -> None:
        self.box = ipywidgets.Checkbox(indent=False, layout=_NARROW)
        self.text = ipywidgets.HTML(layout=_WIDE)
        super().__init__([self.box, self.text], layout={"align_items": "center"})
        self.box.observe(lambda _: ticked(self), "value")


def _button(label: str, icon: str, tooltip: str, press: Callable[[], object]) -> ipywidgets.Button:
    button = ipywidgets.Button(description=label, icon=icon, tooltip=tooltip, layout={"width": "auto"})
    button.on_click(lambda _: press())
    return button
