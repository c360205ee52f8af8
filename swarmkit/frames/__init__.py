"""DataFrames in and out: prompts from columns, the keywords of the verbs, and the verbs.

Knows nothing of HTTP and of widgets. Imports ``patterns``, ``store``, ``pool`` and what is below them.
"""
