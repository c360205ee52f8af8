"""What a distribution requires on this machine: run by ``serve.py`` inside the environment it sets up.

``requirements_of.py DISTRIBUTION [LEFT_OUT ...]`` prints the requirements of an installed distribution whose
markers hold here, without the ones named, as lines for ``pip install -r``.
"""

from __future__ import annotations

import importlib.metadata
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements_of(distribution: str, left_out: frozenset[str]) -> list[str]:
    """The requirements that hold here, without markers, in the order of the metadata."""
    lines = []
    for text in importlib.metadata.requires(distribution) or ():
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(requirement.name) not in left_out:
            requirement.marker = None
            lines.append(str(requirement))
    return lines


if __name__ == "__main__":
    print("\n".join(requirements_of(sys.argv[1], frozenset(sys.argv[2:]))))
