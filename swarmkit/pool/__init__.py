"""Many servers as one: pools, the route to each server, the executor of a run, connecting and waiting.

Knows nothing of pandas. Imports ``runs``, ``client``, ``engine`` and what is below them.
"""
