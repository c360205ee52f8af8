"""Interactive notebook widgets: ``EndpointPicker`` and ``RunMonitor``.

Their HTML is made by pure functions (``endpoint_table.py``, ``run_view.py``, ``html.py``). The widgets hold the state,
and redraw on threads of their own (``refresh.py``), so that neither the notebook nor a run waits for them. Knows
nothing of HTTP. Imports ``pool``, ``runs`` and the packages below them.
"""

from .monitor import RunMonitor, show
from .picker import EndpointPicker

__all__ = ["EndpointPicker", "RunMonitor", "show"]
