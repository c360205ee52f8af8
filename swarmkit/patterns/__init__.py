"""The verbs on lists: scatter-gather, tree-reduce, broadcast."""
