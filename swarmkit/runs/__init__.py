"""A run as seen from outside: its events and who is notified of them, statistics, progress bar, log, story, failure
summary, and the handle ``Run``.

Knows nothing of HTTP: events are passed in, and so is the coroutine that does the work. Imports the wings ``engine``
and ``client`` (the I/O thread), and what is below them.
"""
