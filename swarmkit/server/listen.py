"""Loopback sockets, one for each address that serves as an endpoint."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import resource
import socket
from collections.abc import Sequence

from ..errors import SettingError

__all__ = ["BACKLOG", "bind", "loopback_addresses"]

BACKLOG = 4096


def loopback_addresses(addresses: int | Sequence[str]) -> list[str]:
    """Addresses to listen on: the given ones, or as many as asked for from 127.0.0.1 on.

    Raises
    ------
    SettingError
        An address that is not a loopback address: local servers are for this machine only.

    Examples
    --------
    >>> loopback_addresses(3)
    ['127.0.0.1', '127.0.0.2', '127.0.0.3']
    """
    if isinstance(addresses, int):
        if not 1 <= addresses < 2**24 - 1:
            raise SettingError(f"addresses must be 1 or more, or a list of loopback addresses: {addresses}")
        return [str(ipaddress.IPv4Address("127.0.0.0") + i) for i in range(1, addresses + 1)]
    for address in addresses:
        try:
            allowed = ipaddress.ip_address(address).is_loopback
        except ValueError as error:
            raise SettingError(f"{address!r} is not an IP address; give 127.x.y.z or ::1") from error
        if not allowed:
            raise SettingError(f"local servers listen on loopback addresses only (127.x.y.z or ::1), not on {address}")
    if not addresses:
        raise SettingError("at least one address to listen on is needed")
    return list(addresses)


def bind(addresses: Sequence[str], port: int = 0) -> list[socket.socket]:
    """One listening socket for each address, all with the same port where that port is free on all.

    Parameters
    ----------
    addresses : sequence of str
        Checked by `loopback_addresses`.
    port : int, default 0
        0 takes a free one.

    Raises
    ------
    OSError
        The port is in use, or the system does not have the address (only Linux has all of 127.0.0.0/8).
    """
    _raise_file_limit(len(addresses) + 1024)
    sockets: list[socket.socket] = []
    try:
        for address in addresses:
            wanted = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                sockets.append(_socket(address, wanted))
            except OSError as error:
                if port or error.errno != errno.EADDRINUSE:
                    hint = "; only Linux has all of 127.0.0.0/8" if error.errno == errno.EADDRNOTAVAIL else ""
                    message = f"cannot listen on {address} port {wanted}: {error.strerror}{hint}"
                    raise OSError(error.errno, message) from error
                sockets.append(_socket(address, 0))
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _socket(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets made with an explicit protocol; without it each reply waits 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _raise_file_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # bind() reports the problem then
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
