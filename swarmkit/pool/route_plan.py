"""How requests to one family of servers are made in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..client.ask import ask
from ..client.capabilities import left_out, refused_in
from ..client.chat_template import TEMPLATE_FIELDS, ChatTemplate
from ..client.constraints import Dialect, fields_of
from ..client.hostfile import AgentEndpoint
from ..client.thinking import opens, without_thoughts
from ..client.transport import Transport
from ..client.vectors import length_of
from ..client.wire import OPTIONAL, PRIORITY, TOKEN_LIMIT
from ..errors import EndpointError
from ..records import Failure, FailureKind, Reply, RequestSpec, Route
from ..schema import Schema

__all__ = ["OUR_SALT", "RoutePlan", "fields_of_caller", "joined"]

OUR_SALT = "swarmkit-"
"""How a ``cache_salt`` begins that swarmkit sets itself: it is left out where a server refuses it."""

_WITHOUT_THOUGHTS = (Route.COMPLETIONS, Route.EMBEDDINGS)


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """How requests to one family of servers are made in a run.

    Attributes
    ----------
    route : Route
        The route that requests are posted to.
    template : ChatTemplate or callable or None
        What is wrapped around prompts; None sends them as they are.
    lists : bool
        Whether one request may carry many prompts.
    rows : bool
        Whether rows are streamed as they finish.
    either : bool
        Whether rows that would be streamed may come as a whole reply, where that takes no time to speak of.
    note : str
        Why this route, in words.
    first_tokens : bool
        Whether wrapped prompts begin with the model's first tokens, so that the server must not add them. Templates
        made by hand may or may not; llama-server's never do.
    omit : frozenset of str
        Optional fields that the servers refuse.
    proven : bool
        A stream of several rows has been seen to hold each of them once, so rows are handed on as they come.
    dialect : Dialect or None
        How the server is told what an answer must be, where that was seen to act.
    marked : bool
        Whether the model marks the thoughts in its answers, so that they can be taken out.
    health : {"unknown", "well", "never"}
        What ``/health`` is worth: it was seen to be well, so a failing one means something; it was not; or it is not
        to be asked, since it makes paid calls.
    refused : dict of Route to set of str
        Optional fields that the family's servers have refused since, in any run. Added to.
    length : int or None
        Numbers that a vector must have; None takes any.
    """

    route: Route
    template: ChatTemplate | Callable[[str], str] | None = None
    lists: bool = False
    rows: bool = False
    either: bool = False
    note: str = ""
    first_tokens: bool = True
    omit: frozenset[str] = frozenset()
    proven: bool = False
    dialect: Dialect | None = None
    marked: bool = False
    health: Literal["unknown", "well", "never"] = "unknown"
    refused: dict[Route, set[str]] = field(default_factory=dict, compare=False)
    length: int | None = None

    def left_out(self, spec: RequestSpec) -> frozenset[str]:
        """The fields that requests do without, as far as is known by now; not those of the caller's."""
        return self.omit.union(self.refused.get(self.route, ())) - fields_of_caller(spec)

    def gives_way(self, failure: Failure, omitted: frozenset[str], spec: RequestSpec) -> bool:
        """Whether a request was refused for optional fields, and did not omit them: from now on all of the family's do,
        and it is to be sent again."""
        if failure.kind is not FailureKind.REJECTED:
            return False
        limit = () if self.route is Route.COMPLETIONS else (TOKEN_LIMIT,)
        named = refused_in(failure.message, {*OPTIONAL, PRIORITY, *limit} - omitted - fields_of_caller(spec))
        self.refused.setdefault(self.route, set()).update(named)
        return bool(named)

    @property
    def wrapped(self) -> bool:
        """Whether the texts hold all special tokens."""
        return self.template is not None and self.first_tokens and not (self.learned and self.learned.as_text)

    @property
    def learned(self) -> ChatTemplate | None:
        """The chat template, if it was learned from the servers."""
        return self.template if isinstance(self.template, ChatTemplate) and self.template.proof else None

    def wrap(self, texts: Iterable[str]) -> list[str]:
        """The texts that are sent for prompts."""
        if isinstance(self.template, ChatTemplate):
            return self.template.wrap_all(texts)
        return list(texts if self.template is None else map(self.template, texts))

    def read(self, replies: list[Reply]) -> list[Reply]:
        """The answers without the model's thoughts; vectors of another length than was asked for are none."""
        if self.length is not None:
            return [reply._replace(problem=reply.problem or self._odd(reply.text)) for reply in replies]
        if not self.marked and (self.route in _WITHOUT_THOUGHTS or not any(reply.reasoning for reply in replies)):
            return replies  # completions have no thoughts but those that the model marks
        opened = opens(self.template.suffix) if isinstance(self.template, ChatTemplate) else None
        return [without_thoughts(reply, self.marked, opened) for reply in replies]

    def _odd(self, vector: str) -> str | None:
        numbers = length_of([vector])
        return None if numbers == self.length else f"its vector has {numbers:,} numbers, not dimensions={self.length}"

    def constraint(self, schema: Schema | None) -> Mapping[str, Any] | None:
        """The fields of a request that say what an answer must be."""
        return None if schema is None or self.dialect is None else fields_of(self.dialect, schema.constraint)

    def as_chat(self, note: str = "") -> RoutePlan:
        """The same server by one chat a prompt."""
        omit = self.omit - set(TEMPLATE_FIELDS)  # they are in a learned template, and there is none any more
        return replace(
            self, route=Route.CHAT, template=None, lists=False, rows=False, either=False, note=note, omit=omit
        )

    async def ask(
        self,
        transport: Transport,
        endpoint: AgentEndpoint,
        spec: RequestSpec,
        texts: Sequence[str] = ("Hi",),
        *,
        omit: frozenset[str] = frozenset(),
        **how: Any,
    ) -> list[Reply]:
        """Ask an endpoint on this route; see ``client.ask``."""
        given: dict[str, Any] = {"wrapped": self.wrapped, "lists": self.lists, **how}
        while True:
            omitted = self.left_out(spec) | omit
            try:
                return await ask(transport, endpoint, self.route, spec, self.wrap(texts), omit=omitted, **given)
            except EndpointError as exc:
                if not self.gives_way(exc.failure, omitted, spec):
                    raise

    def describe(self) -> str:
        """One line for statistics: the route, and how rows are delivered."""
        note = joined(self.note, left_out(self.omit.union(self.refused.get(self.route, ()))))
        return f"{self.route}{', rows as they finish' if self.rows else ''}{f' ({note})' if note else ''}"


def fields_of_caller(spec: RequestSpec) -> set[str]:
    """The optional fields that the caller sets: where a server refuses these, the caller is told."""
    own = {name for name in (*OPTIONAL, PRIORITY) if name in spec.params}
    return own - {"cache_salt"} if str(spec.params.get("cache_salt")).startswith(OUR_SALT) else own


def joined(*notes: str) -> str:
    """The notes that there are, as one."""
    return "; ".join(filter(None, notes))
