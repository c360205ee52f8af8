"""The endpoints of a run, by index."""

from __future__ import annotations

from ..client.hostfile import AgentEndpoint

__all__ = ["Roster"]


class Roster:
    """Gives each endpoint of a run an index. It keeps that while it is out of the pool, and through the levels of a
    tree.

    Attributes
    ----------
    names : list of str
        Names of the endpoints, by index. It only grows.

    Examples
    --------
    >>> roster = Roster()
    >>> [roster.place(AgentEndpoint(host, 8000)) for host in ("node1", "node2", "node1")], roster.names
    ([0, 1, 0], ['node1:8000', 'node2:8000'])
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._urls: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, endpoint: AgentEndpoint) -> int:
        """The index of an endpoint; a new one gets the next."""
        return self._place(endpoint.url, endpoint.name)

    def place_of(self, other: Roster, index: int) -> int:
        """The index of an endpoint that has this one in another run."""
        return self._place(other._urls[index], other.names[index])

    def _place(self, url: str, name: str) -> int:
        index = self._places.setdefault(url, len(self.names))
        if index == len(self.names):
            self.names.append(name)
            self._urls.append(url)
        return index
