"""Commands that measure, side by side in one run. Ratios count, not seconds: machines differ.

``python -m benchmarks`` runs them all; each also runs by itself, as ``python -m benchmarks.cost``. A module without an
underscore is a command: it takes ``--quick`` and ``--json FILE``, and exits with 1 where a budget is missed.
"""
