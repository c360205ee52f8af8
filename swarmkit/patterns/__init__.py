"""The verbs on lists of prompts, under the names of the batch-prompting design: scatter-gather, tree-reduce, broadcast,
stages, blackboard.

Knows nothing of pandas and of HTTP. Imports ``pool``, ``records`` and ``errors``.
"""
