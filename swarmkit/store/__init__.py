"""Finished rows on disk, and runs that skip rows which are stored or have a duplicate prompt.

Knows nothing of pandas and of HTTP. Imports ``pool`` and the packages below it.
"""
