"""What a notebook shows and a hand can press: ``EndpointPicker`` and ``RunMonitor``.

What they show is made by plain functions of values (``table.py``, ``scene.py``); the widgets hold the state, and
draw it on a thread of their own, so that neither the notebook nor the run waits for them.
"""

from .monitor import RunMonitor, show
from .picker import EndpointPicker

__all__ = ["EndpointPicker", "RunMonitor", "show"]
