"""The order of rows that share long prefixes: who is asked what, and what the servers' caches make of it."""

import itertools
import json
import random
import time
from collections import defaultdict

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted
from virtual import Server, Virtual

import swarmkit as sk
from swarmkit.analysis.simulate import BLOCK, PrefixCache, blocks_of
from swarmkit.engine.prefixes import prefix_order
from swarmkit.engine.queues import Queues
from swarmkit.errors import SettingError

QUESTIONS = 6


def document(i, words=150):
    rng = random.Random(i)
    return " ".join(f"word{rng.randrange(10_000)}" for _ in range(words))


def table(documents, questions=QUESTIONS, shuffled=True, words=150):
    """Prompts, and the document of each."""
    rows = [(d, q) for d in range(documents) for q in range(questions)]
    if shuffled:
        random.Random(0).shuffle(rows)
    texts = [document(d, words) for d in range(documents)]
    return [f"{texts[d]}\nQuestion {q}?" for d, q in rows], [d for d, _ in rows]


def once(texts):
    """Tokens that are computed if each prefix is computed once."""
    cache = PrefixCache(10**9)
    return sum(cache.computed(blocks_of(text)) for text in texts)


@st.composite
def columns(draw):
    stems = [f"{letter} " * draw(st.integers(0, 200)) for letter in "abcd"]
    rows = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400), st.integers(0, 30)), max_size=150))
    texts = [stems[stem][:length] + f"end {end}" for stem, length, end in rows]
    sent = [row for row in range(len(texts)) if draw(st.booleans())]
    return texts, sent, draw(st.integers(1, 6)), {row for row in sent if row % 5 == draw(st.integers(0, 9))}


@settings(max_examples=200, deadline=None)
@given(columns(), st.sampled_from(["auto", "prefix"]))
def test_every_row_is_in_one_queue_once_and_parts_are_neighbours(column, order):
    texts, sent, endpoints, limited = column
    found = prefix_order(texts, sent, endpoints, limited, order=order)
    if found is None:
        return
    assert len(found.queues) == endpoints
    assert sorted(itertools.chain(*found.queues)) == sent
    seen = set()
    for queue in found.queues:
        kinds = [row in limited for row in queue]
        assert kinds == sorted(kinds), "rows of a limited budget are last"
        for part, rows in itertools.groupby(queue, found.parts.__getitem__):
            assert part not in seen, "a part is in two places"
            seen.add(part)
            assert len({row in limited for row in rows}) == 1


def test_each_document_has_one_home_and_the_homes_are_even():
    texts, documents = table(64)
    found = prefix_order(texts, range(len(texts)), 8)
    homes = [{documents[row] for row in queue} for queue in found.queues]
    assert sum(map(len, homes)) == 64
    assert {len(queue) for queue in found.queues} == {8 * QUESTIONS}


def test_documents_of_different_length_are_dealt_by_work():
    texts = [f"{document(d, 100 if d % 4 else 1000)} question {q}" for d in range(40) for q in range(4)]
    found = prefix_order(texts, range(160), 4)
    work = [sum(len(document(row // 4, 100 if row // 4 % 4 else 1000)) for row in queue[::4]) for queue in found.queues]
    assert max(work) < 1.2 * min(work)


def test_a_document_with_many_questions_is_shared_out():
    texts = table(20)[0] + [f"{document(99)} question {q}" for q in range(3000)]
    found = prefix_order(texts, range(len(texts)), 8, answer=400, order="prefix")
    rows = [sum(row >= 20 * QUESTIONS for row in queue) for queue in found.queues]
    assert max(rows) < 2 * 3000 / 8


def test_chapters_of_one_book_are_cut_between_chapters():
    book = document(0, 60)
    texts = [f"{book} {document(chapter)} question {q}" for chapter in range(1, 65) for q in range(QUESTIONS)]
    texts += [f"{document(1000 + i)}" for i in range(64)]
    found = prefix_order(texts, range(len(texts)), 8)
    homes = [{row // QUESTIONS for row in queue if row < 64 * QUESTIONS} for queue in found.queues]
    assert sum(map(len, homes)) <= 64 + 4


NOTHING_TO_FIND = {
    "different": [document(i) for i in range(600)],
    "short": [f"Is {i} a prime number?" for i in range(600)],
    "one prefix for all": [f"{document(0)} {i}" for i in range(600)],
    "one prefix for all but a few": [*(f"{document(0)} {i}" for i in range(600)), "odd", "odder"],
    "few": table(3)[0],
    "two documents, which both endpoints know soon": table(2, 300)[0],
    "missing": [None] * 600,
}


@pytest.mark.parametrize("name", NOTHING_TO_FIND)
def test_rows_without_prefixes_of_their_own_stay_as_they_are(name):
    texts = NOTHING_TO_FIND[name]
    assert prefix_order(texts, [i for i, text in enumerate(texts) if text] or range(0), 2) is None


def test_one_endpoint_is_sent_the_rows_as_they_are():
    assert prefix_order(table(64)[0], range(64 * QUESTIONS), 1) is None


def test_an_explicit_order_does_as_it_says():
    texts, documents = table(8, 3)
    assert prefix_order(texts, range(24), 2, order="auto") is None  # few rows
    assert prefix_order(texts, range(24), 2, order="given") is None
    found = prefix_order(texts, range(24), 1, order="prefix")
    assert len(list(itertools.groupby(found.queues[0], documents.__getitem__))) == 8
    with pytest.raises(SettingError, match=r"order='sorted'.*'auto', 'prefix', 'given'"):
        sk.BatchPolicy(order="sorted")


def test_whole_parts_are_stolen_and_what_is_too_much_waits_at_the_thief():
    queues = Queues([[0, 1, 2, 3, 4, 5, 6], []], limited=(), parts=[0, 0, 0, 1, 1, 1, 1])
    assert queues.steal(2, 1) == (3, 4)
    queues.validate()
    assert (list(queues[0]), list(queues[1])) == ([0, 1, 2], [5, 6])
    assert queues.take(1, 10) == (5, 6)
    assert queues.take(0, 2) == (0, 1)
    assert queues.steal(5, 1) == (2,)
    assert queues.steal(5, 1) == ()


def test_a_request_ends_with_a_part_if_it_is_nearly_full_then():
    parts = [row // 6 for row in range(60)]
    assert len(Queues([range(60)], (), parts).take(0, 20)) == 18
    assert len(Queues([range(60)], (), parts).take(0, 10)) == 10
    assert len(Queues([range(60)], (), parts).take(0, 3)) == 3


def fleet(n, cache=100_000, mixed=False):
    rng = random.Random(n)
    return [Server(0.3, 64, token_s=1e-3 * (rng.uniform(0.3, 2) if mixed else 1), cache=cache) for _ in range(n)]


@pytest.mark.parametrize("shuffled", [False, True])
def test_without_faults_each_document_is_computed_by_one_endpoint(shuffled):
    texts, documents = table(160, shuffled=shuffled)
    servers = {order: fleet(16) for order in ("auto", "given")}
    runs = {order: Virtual(s, len(texts), texts=texts, order=order, books=5).run() for order, s in servers.items()}
    homes = defaultdict(set)
    for row, met in runs["auto"].met.items():
        homes[documents[row]].update(met)
    assert all(len(endpoints) == 1 for endpoints in homes.values())
    computed = sum(s.prefixes.queries - s.prefixes.hits for s in servers["auto"])
    assert computed <= 1.01 * once(texts)
    assert runs["auto"].time_s < 0.4 * runs["given"].time_s


def test_endpoints_of_different_speed_steal_whole_documents():
    texts, documents = table(400)
    virtual = Virtual(servers := fleet(10, mixed=True), len(texts), texts=texts, books=5)
    run = virtual.run()
    assert virtual.scheduler.counts.steals
    homes = defaultdict(set)
    for row, met in run.met.items():
        homes[documents[row]].update(met)
    assert sum(len(endpoints) > 1 for endpoints in homes.values()) <= 0.05 * len(homes)
    assert sum(s.prefixes.queries - s.prefixes.hits for s in servers) <= 1.1 * once(texts)


def test_a_prefix_cache_forgets_what_was_used_least_recently():
    cache = PrefixCache(blocks=10)
    first, second = blocks_of("a" * 4 * BLOCK * 6), blocks_of("b" * 4 * BLOCK * 6)
    assert [cache.computed(prompt) for prompt in (first, first, second)] == [6 * BLOCK, BLOCK, 6 * BLOCK]
    assert cache.computed(first) == 2 * BLOCK  # the end of it had to go
    none = PrefixCache(blocks=0)
    assert [none.computed(first) for _ in range(2)] == [6 * BLOCK] * 2


def test_a_plan_with_prompts_counts_prefill_and_caches():
    texts, _ = table(64)
    fleet = [sk.EndpointModel(slots=64, prefill_tokens_per_s=2000, cache_tokens=100_000)] * 8
    work = sk.Workload(len(texts), 4.0, texts)
    given, auto = (sk.simulate(fleet, work, batch=sk.BatchPolicy(order=order)) for order in ("given", "auto"))
    assert given.prompt_tokens == auto.prompt_tokens == sum(len(text) // 4 for text in texts)
    assert auto.prompt_tokens - auto.cached_tokens <= 1.01 * once(texts)
    assert auto.ideal_s <= auto.time_s < 0.5 * given.time_s
    without = sk.simulate([sk.EndpointModel(slots=64, prefill_tokens_per_s=2000)] * 8, work)
    assert without.cached_tokens == 0
    with pytest.raises(SettingError, match="one a row"):
        sk.Workload(3, prompts=["a"])


class Caching(Scripted):
    """An endpoint that plays a vLLM: it counts, in ``/metrics``, what it finds in its prefix cache."""

    def __init__(self, metrics=True):
        self.cache, self.metrics, self.asked = PrefixCache(10**6), metrics, 0
        self.sent = []
        super().__init__(self.answer)

    def answer(self, call):
        if call.headers.startswith("GET /v1/models"):
            call.reply(json.dumps({"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]}).encode())
        elif call.headers.startswith("GET /metrics"):
            self.asked += 1
            if self.metrics == "silent":
                call.wait_for_the_end()
            elif self.metrics == "odd":
                call.reply(b"vllm:prefix_cache_hits_total NaN\nvllm:prefix_cache_queries_total 1e999\n\xff 1.2.3")
            elif self.metrics:
                counts = {"hits": self.cache.hits, "queries": self.cache.queries}
                lines = [f'vllm:prefix_cache_{name}_total{{engine="0"}} {float(n)}' for name, n in counts.items()]
                call.reply("\n".join(lines).encode(), media="text/plain")
            else:
                call.reply(b"{}", "404 Not Found")
        elif call.headers.startswith("POST /v1/completions"):
            for prompt in call.prompts:
                self.cache.computed(blocks_of(prompt))
            self.sent += call.prompts
            time.sleep(0.05)  # the counts before the run are asked for by then
            call.answer()
        else:
            call.reply(b"{}", "404 Not Found")


def ask(servers, frame, **settings):
    """The answers, and the statistics of the run."""
    urls = [f"http://{host}:{port}" for host, port in (server.address for server in servers)]
    with sk.connect(urls, **settings):
        out = frame.swarm.scatter("{prompt}", chat=None, max_tokens=4, progress=False)
        return out, sk.last_run().stats


def test_over_sockets_results_are_in_order_and_the_servers_say_what_they_found():
    texts, documents = table(30)
    frame = pd.DataFrame({"prompt": texts}, index=range(100, 100 + len(texts)))
    with Caching() as one, Caching() as two:
        out, stats = ask([one, two], frame)
        assert out["response"].tolist() == [f"echo: {text}" for text in texts]
        assert out.index.equals(frame.index)
        where = [
            {documents[texts.index(prompt)] for prompt in server.sent if "Question" in prompt} for server in (one, two)
        ]
        assert not where[0] & where[1]
        assert one.asked == two.asked == 2
        assert stats.prefix_endpoints == 2
        assert stats.prefix_queries == sum(len(text) // 4 for text in texts)
        assert stats.prefix_hits / stats.prefix_queries > 0.75
        assert f"{stats.prefix_hits / stats.prefix_queries:.0%} of" in dict(stats.summary())["prefix caches"]
        _, given = ask([one, two], frame.sample(frac=1, random_state=1), batch=sk.BatchPolicy(order="given"))
        assert given.requests >= 2


@pytest.mark.parametrize("metrics", [False, "silent", "odd"])
def test_servers_that_do_not_count_cost_the_run_nothing(metrics):
    with Caching(metrics) as one, Caching() as two:
        began = time.monotonic()
        out, stats = ask([one, two], pd.DataFrame({"prompt": table(30)[0]}))
        assert time.monotonic() - began < 5
        assert out["response"].notna().all()
        assert stats.prefix_endpoints == 1
