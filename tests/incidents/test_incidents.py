"""Ordinary incidents over real sockets: a hundred endpoints in one process, rows of a second, 32 at once on each.

``benchmarks/_incidents.py`` says what happens in each, and what it costs at best. Every row is answered and none wrong,
in at most one and a half times the seconds and prompts of the ideal. Where replies come as a whole, the first comes
after three seconds, and before that nothing is known of an endpoint: the ideal is so much longer.
"""

import time
import warnings

import pandas as pd
import pytest

import swarmkit as sk
from benchmarks._incident_server import IncidentServer
from benchmarks._incidents import ROW_S, SLOTS, TEMPLATE, answer_of, incidents

ENDPOINTS = 100
ROWS = 224 * ENDPOINTS
BATCH = 100
LOST_S = {"rows": ROW_S, "batch": BATCH / SLOTS * ROW_S}  # by an endpoint whose connections break
INCIDENTS = incidents(ENDPOINTS)
IN_BATCHES = ("restart", "reset", "half_error", "all_flaky")  # where a whole reply makes the difference
CASES = [(name, "rows") for name in INCIDENTS if name not in ("calm", "refuse_6")] + [(n, "batch") for n in IN_BATCHES]
# Bounds that are met with too little room for a busy machine: 12.4 s of 13.9, 10.0 of 10.5.
OPEN = {("restart", "rows"): {"seconds"}, ("one_flaky", "rows"): {"seconds"}}


@pytest.mark.long
@pytest.mark.parametrize(("name", "delivery"), CASES)
def test_incident(name, delivery):
    incident = INCIDENTS[name]
    df = pd.DataFrame({"row": range(ROWS)})
    with IncidentServer(incident) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SwarmWarning)  # what is not well
        with sk.connect(server.endpoints, batch=sk.BatchPolicy(max_size=BATCH)) as pool:
            began = time.monotonic()
            answers = sk.scatter(df, TEMPLATE, pool=pool, temperature=0, delivery=delivery, progress=False)
            took_s = time.monotonic() - began
    sent, ideal = server.sent, incident.ideal(ROWS, LOST_S[delivery])
    ideal_s = ideal.seconds + LOST_S[delivery] - ROW_S
    print(f"{name}, {delivery}: {took_s:.1f} s, ideally {ideal_s:.1f}; {sent}, ideally {ideal.prompts:.0f}")
    assert answers["response"].tolist() == [answer_of(row) for row in range(ROWS)]
    exceeded = {
        what
        for what, value, bound in (
            ("seconds", took_s, 1.5 * ideal_s),
            ("prompts", sent.prompts, 1.5 * ideal.prompts),
            ("alone", sent.alone, ENDPOINTS),  # the last rows of a run
        )
        if value > bound
    }
    if exceeded and exceeded <= OPEN.get((name, delivery), set()):
        pytest.xfail(f"open: {', '.join(exceeded)}")
    assert not exceeded
