"""How many sockets this process may have open."""

from __future__ import annotations

import contextlib

__all__ = ["sockets"]

_SPARE_FILES = 256  # for all else that a process opens
_WANTED = 1 << 16


def sockets() -> int:
    """Sockets that this process may open: its limit on open files, but for some files that are kept free.

    The soft limit is raised to the hard one first. Half of a small limit is kept free.
    """
    limit = _open_files()
    return max(1, limit - min(_SPARE_FILES, limit // 2))


def _open_files() -> int:
    try:
        import resource
    except ImportError:  # Windows, where sockets do not count as files
        return 8192
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _WANTED) if hard != resource.RLIM_INFINITY else _WANTED
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses values below its own hard limit, too
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else soft
