"""What runs cost, measured and predicted (``compare``, ``simulate``, plots), and what their answers say together:
``vote``, ``semantic_entropy``, ``similar``.

Knows nothing of widgets. Imports ``frames``, ``uq`` and the packages below them; only ``plots`` imports matplotlib, and
the others import it when they draw.
"""
