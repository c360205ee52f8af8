"""The command ``swarmkit``: its arguments, table files as input and output, and what it prints.

The top of the package: may import all of it, ``server`` included, and nothing imports it but ``__main__``.
"""
