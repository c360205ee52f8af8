"""The cost of runs, measured and predicted: ``compare``, ``simulate``, and plots.

Knows nothing of widgets. Imports ``frames`` and the packages below it; only ``plots`` imports matplotlib, and the
others import it when they draw.
"""
