"""Ordinary incidents: what happens, on how many endpoints, and the seconds that the work takes at best.

One description for the tests (``tests/incidents``) and for ``benchmarks/incidents.py``; ``_incident_server.py`` plays
it. A row takes a second, an endpoint works on 32 at once, and times are seconds since the first row came in.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

SLOTS = 32
ROW_S = 1.0
TEMPLATE = "What is known of row {row} of the table?"
FAULTS = {
    "http_500": "HTTP 500, after half a second at most",
    "http_502": "a proxy's page with HTTP 502, after half a second at most",
    "error_200": "HTTP 200 at once, and an error in the body",
    "empty": 'the answer "" at once',
    "stuck": "nothing, ever; /health is well",
}


@dataclass(frozen=True)
class Role:
    """What one endpoint does; it is well by default.

    Attributes
    ----------
    down : tuple of (begin, end)
        It refuses connections, and resets those it has at the beginning. Down at 0 is down before anything comes in.
    fault : str
        One of ``FAULTS``, for ...
    chance : float
        ... this share of its requests.
    """

    down: tuple[tuple[float, float], ...] = ()
    fault: str = ""
    chance: float = 1.0

    @property
    def useful(self) -> float:
        """The share of its work that is of use."""
        return 1.0 - self.chance if self.fault else 1.0


WELL = Role()


@dataclass(frozen=True)
class Ideal:
    """What an incident costs at best: seconds, and prompts sent."""

    seconds: float
    prompts: float


@dataclass(frozen=True)
class Incident:
    """An incident; ``roles`` is what each endpoint does, and ``resets`` when all connections are reset."""

    name: str
    what: str
    roles: tuple[Role, ...]
    resets: tuple[float, ...] = ()

    def ideal(self, rows: int, lost_s: float = ROW_S) -> Ideal:
        """What so many rows cost at best.

        No endpoint that is up is ever idle, and each break of its connections costs ``lost_s`` seconds of its work: a
        row's, or a whole request's where nothing of it comes before its end.
        """

        def worked(role: Role, until: float) -> float:
            """Rows that an endpoint has worked on, those that were lost included."""
            away = sum(max(0.0, min(end, until) - begin) for begin, end in role.down)
            return (until - away) * SLOTS / ROW_S

        def of_use(role: Role, until: float) -> float:
            breaks = sum(at < until for at in self.resets) + sum(0 < begin < until for begin, _ in role.down)
            return role.useful * max(0.0, worked(role, until) - breaks * lost_s * SLOTS / ROW_S)

        low, high = 0.0, 1e6
        for _ in range(60):
            middle = (low + high) / 2
            done = sum(of_use(role, middle) for role in self.roles)
            low, high = (low, middle) if done >= rows else (middle, high)
        return Ideal(high, sum(worked(role, high) for role in self.roles if role.useful))


def incidents(endpoints: int) -> dict[str, Incident]:
    """The incidents, by name, for so many endpoints that have six to ten seconds of work each."""

    def each(role: Callable[[int], Role]) -> tuple[Role, ...]:
        return tuple(role(i) for i in range(endpoints))

    def every(role: Role) -> tuple[Role, ...]:
        return each(lambda i: role)

    def first(role: Role, of: int = 1) -> tuple[Role, ...]:
        return each(lambda i: role if i < of else WELL)

    def half(role: Role) -> tuple[Role, ...]:
        return each(lambda i: role if i % 2 else WELL)

    def restarting(i: int) -> Role:
        begin = 1.5 + i // at_once
        return Role(down=((begin, begin + 2.0),))

    def everything(i: int) -> Role:
        begin = 2.0 + 8.0 * i / endpoints
        roles = {1: Role(fault="error_200"), 2: Role(fault="stuck"), 3: gone, 4: Role(fault="empty")}
        return roles.get(i % 10) or Role(down=((begin, begin + 3.0),), fault="http_502", chance=0.2)

    at_once, rack, gone = max(1, endpoints // 10), endpoints // 4, Role(down=((0.0, math.inf),))
    flaky = Role(fault="http_502", chance=0.2)
    found = [
        Incident("calm", "nothing", every(WELL)),
        Incident("restart", f"a rolling restart: each second {at_once} of them, for 2 s", each(restarting)),
        Incident("reset", "all connections are reset", every(WELL), (2.5,)),
        Incident("resets_2", "all connections are reset, twice", every(WELL), (2.5, 4.5)),
        Incident("resets_5", "all connections are reset, five times", every(WELL), (1.5, 3.5, 5.5, 7.5, 9.5)),
        Incident("refuse_3", "all refuse for 3 s", every(Role(down=((2.5, 5.5),)))),
        Incident("refuse_6", "all refuse for 6 s", every(Role(down=((2.5, 8.5),)))),
        Incident("refuse_30", "all refuse for 30 s", every(Role(down=((2.5, 32.5),)))),
        Incident("rack", f"{rack} of them are dead for 20 s", first(Role(down=((2.5, 22.5),)), rack)),
        Incident("half_gone", "every second one is unreachable from the start", half(gone)),
        Incident("half_error", "every second one answers 200 with an error", half(Role(fault="error_200"))),
        Incident("one_flaky", "one fails half of its requests (500)", first(Role(fault="http_500", chance=0.5))),
        Incident("one_empty", "one answers with empty texts, at once", first(Role(fault="empty"))),
        Incident("one_stuck", "one never answers; its /health is well", first(Role(fault="stuck"))),
        Incident("all_flaky", "a fifth of all requests fails (502)", every(flaky)),
        Incident(
            "everything",
            "of ten, one answers 200 with an error, one never, one empty; one is gone; the others fail a fifth of "
            "their requests (502) and restart for 3 s; and all connections are reset, twice",
            each(everything),
            (6.5, 8.5),
        ),
    ]  # fmt: skip
    return {incident.name: incident for incident in found}


def prompt_of(row: int) -> str:
    return TEMPLATE.format(row=row)


def answer_of(row: int) -> str:
    """The right answer, which a client cannot guess and another row does not have."""
    return f"row {row} is {zlib.crc32(prompt_of(row).encode()):08x}"
