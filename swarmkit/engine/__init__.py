"""Which rows go where, and when: a state machine, and what it keeps books of.

Events go in, messages come out. Knows nothing of I/O, clocks, randomness, pandas or HTTP: times and random numbers
are passed in, so that a run can be simulated event by event. Imports only ``errors``, ``records`` and ``text``.
"""
