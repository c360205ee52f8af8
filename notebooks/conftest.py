"""Which tutorials plain ``pytest`` leaves to ``pytest -m slow``: those that need a minute of computing, and the later ones,
so that the tests end within minutes.
"""

from __future__ import annotations

import pytest

SLOW = (
    "00_quickstart",
    "03_batch_vs_single",
    "04_endpoints",
    "05_failures_and_resume",
    "06_chat_templates",
    "07_gene_annotation",
    "08_plan_a_campaign",
    "09_scale_out",
    "10_typed_answers",
    "11_thinking_models",
    "12_embeddings_and_duplicates",
    "13_votes_and_uncertainty",
    "14_pipelines",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
