"""Where servers tell the log-probabilities of tokens, and which tokens stand for labels there.

Servers without them refuse the fields, or leave them out without a word. So each endpoint is asked once, on the route
of its rows, for one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..client.capabilities import without_refused
from ..client.error_replies import Malformed
from ..client.hostfile import AgentEndpoint
from ..client.tokenizer import Tokenizer
from ..client.wire import LOGPROB_FIELDS
from ..errors import EndpointError
from ..records import FailureKind, RequestSpec, Route
from ..runs.stats import UNTOLD
from .constraining import at_each, filled
from .route_plan import RoutePlan, joined
from .routing import LOOK_S, Router

__all__ = ["LabelTokens", "label_tokens", "telling"]

_OPTIONAL = LOGPROB_FIELDS[2:]  # without these, the likeliest tokens come


async def telling(router: Router, plans: Sequence[RoutePlan], spec: RequestSpec) -> list[RoutePlan]:
    """The plans, by endpoint, which leave out the fields for log-probabilities where none come, and say so."""
    transport, memo = router.transport, router.memo
    asked = RequestSpec(model=spec.model, system=spec.system, logprobs=spec.logprobs)

    async def ask(endpoint: AgentEndpoint, plan: RoutePlan, omit: frozenset[str]) -> str:
        """Why none come; empty if they do."""
        try:
            (reply,) = await plan.ask(transport, endpoint, asked, omit=omit, max_tokens=1, timeout=LOOK_S)
        except Malformed as exc:
            return transport.without_secrets(endpoint, str(exc))
        return "" if reply.logprobs else "none came"

    async def told(endpoint: AgentEndpoint, plan: RoutePlan) -> RoutePlan:
        key = (endpoint.url, spec.model, plan.route, "logprobs", spec.logprobs)
        if key not in memo:
            for _ in range(2):  # once more, since one refusal may be chance
                try:
                    why, omit = await without_refused(lambda omit: ask(endpoint, plan, omit), _OPTIONAL)
                except EndpointError as exc:
                    if exc.failure.kind is not FailureKind.REJECTED:
                        raise
                    why, omit = f"refused: {exc.failure.message}", frozenset()
                if not why:
                    break
            memo[key] = why, omit | set(LOGPROB_FIELDS if why else ())
        why, omit = memo[key]
        note = f"{UNTOLD} ({why})" if why else ""
        return replace(plan, omit=plan.omit | omit, note=joined(plan.note, note))

    return filled(plans, await at_each(router, plans, told), "")


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """How the probabilities of labels are read from log-probabilities.

    Attributes
    ----------
    endpoints : list of int
        Indexes of the endpoints that tell these; empty where none does.
    choice : int or None
        Which of the given lists of words can be told apart by one token; None where none can.
    ids : tuple of int
        The ids of these tokens; empty where no server tokenizes.
    names : list of list of str
        By word: what its tokens may be called in a reply.
    why : str
        Why it is not the first of the lists, or no log-probabilities, in words.
    """

    endpoints: list[int]
    choice: int | None = None
    ids: tuple[int, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()
    why: str = ""


async def label_tokens(
    router: Router, plans: Sequence[RoutePlan], spec: RequestSpec, text: str, choices: Sequence[Sequence[str]]
) -> LabelTokens:
    """Find the words that can be told apart by one token after a prompt.

    Parameters
    ----------
    text : str
        One of the run's prompts: the words are looked up after it, since tokens depend on what stands before them.
    choices : sequence of sequence of str
        Lists of words, the best first. Words of one letter are taken to be one token where no server tokenizes.
    """
    told = [i for i, plan in enumerate(plans) if UNTOLD not in plan.note]
    if not told:
        note = plans[0].note
        return LabelTokens([], why=note[note.index(UNTOLD) :])
    plan = plans[told[0]]
    before = plan.wrap([text])[0] if plan.route is Route.COMPLETIONS else ""
    members = [router.endpoints[i] for i in told]
    why = ""
    for choice, words in enumerate(choices):

        async def look(endpoint: AgentEndpoint, words: Sequence[str] = words) -> list[dict[int, str]] | None:
            return await Tokenizer(router.transport, endpoint, spec.model, LOOK_S).next_tokens(before, words)

        tokens, _ = await router.look((spec.model, "next", before, *words), members, look)
        if tokens is None:
            if all(len(word) == 1 for word in words):
                return LabelTokens(told, choice, (), tuple((word, f" {word}") for word in words), why)
            why = why or "no server tokenizes"
            continue
        ids = [i for of_word in tokens for i in of_word]
        if all(tokens) and len(set(ids)) == len(ids):
            names = tuple((*(f"token_id:{i}" for i in known), *known.values()) for known in tokens)
            return LabelTokens(told, choice, tuple(ids), names, why)
        long = [repr(word) for word, known in zip(words, tokens, strict=True) if not known]
        why = why or (f"{', '.join(long[:3])}: not one token" if long else "labels share a token")
    return LabelTokens(told, why=why)
