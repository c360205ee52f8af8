"""What a command would ask, without asking it: ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterable

from ..analysis.estimate import rows_to_ask
from ..client import io_thread
from ..engine.columns import Columns
from ..frames.call import PreparedCall
from ..frames.scatter import ScatterFrame
from ..frames.tree_reduce import ReductionTrees
from ..patterns.tree_reduce import Settle
from ..pool.vllm_pool import VLLMPool
from ..records import Response
from ..runs.failure_summary import FailureSummary
from ..runs.stats import RunStats
from ..text import plural, printable
from .batch_file import AskedLines, BatchFile
from .chunks import Chunks
from .job import Job
from .parser import Exit
from .terminal import say

__all__ = ["dry_run", "dry_run_of_lines", "dry_run_of_trees"]

_SHOWN = 300  # characters of a prompt


def dry_run(job: Job, frames: Iterable[ScatterFrame], call: PreparedCall, chunks: Chunks) -> Exit:
    """Say what would be asked of the rows of a table."""
    causes, asked, shown = FailureSummary(), 0, ""
    for frame in frames:
        rows = rows_to_ask(frame, call)
        if rows and not asked:
            shown = f"\nthe first prompt: {printable(frame.prompts.texts[rows[0]] or '', _SHOWN)}"
        asked += len(rows)
        pending = range(len(frame.index)) if frame.pending is None else {*frame.pending}
        causes.add((frame.index[row], why) for row, why in frame.prompts.errors.items() if row in pending)
        chunks.drop()
    counts = {"without a prompt": causes.count, "beyond --limit": chunks.not_asked}
    counts["answered already, or asked once with others"] = job.source.rows - asked - sum(counts.values())
    others = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
    say(f"dry run: of {plural(job.source.rows, 'row')} {asked:,} would be asked{others}; of "
        f"{plural(call.pool.size, 'endpoint')}, to {job.output}; nothing was sent or written{shown}")  # fmt: skip
    if causes.count:
        say("\n".join(causes.lines()))
    return Exit.ROWS_FAILED if causes.count else Exit.OK


def dry_run_of_lines(lines: BatchFile, asked: Iterable[AskedLines], pool: VLLMPool) -> Exit:
    """Say what would be asked of the lines of batch files."""
    groups = [len(group.index) for group in asked]
    causes = FailureSummary("lines")
    for _, errors in lines.answers([]):
        causes.add(errors.items())
    kinds = f", in {plural(len(groups), 'group')} with the same parameters" if groups else ""
    say(f"dry run: of {plural(lines.rows, 'line')} {sum(groups):,} would be asked{kinds}, {causes.count:,} cannot be; "
        f"of {plural(pool.size, 'endpoint')}; nothing was sent or written")  # fmt: skip
    if causes.count:
        say("\n".join(causes.lines()))
    return Exit.ROWS_FAILED if causes.count else Exit.OK


def dry_run_of_trees(job: Job, trees: ReductionTrees, call: PreparedCall) -> Exit:
    """Say what would be asked to reduce trees. Answers that no store has are taken to be empty: by ``--fanin`` as many
    are merged, whatever their length, and as many as fit are no fewer."""
    asked: list[str] = []
    merges, levels = 0, 0

    async def scatter_level(prompts: list[str], level: int, settle: Settle) -> None:
        nonlocal merges, levels
        merges, levels, columns = merges + len(prompts), level, Columns(len(prompts))
        stored = [False] * len(prompts)
        if call.store is not None:
            keys = call.store.keys(await call.pool.complete(call.spec), prompts, True)
            stored = call.store.fill(columns, keys, range(len(prompts)), {}).tolist()
        for place, known in enumerate(stored):
            settle(place, columns.response(place) if known else Response(True, ""))
        asked.extend(prompt for prompt, known in zip(prompts, stored, strict=True) if not known)

    io_thread.call(trees.reduce(call, RunStats(), scatter_level))
    least = "at least " if trees.fanin == "auto" and levels > 1 else ""
    counts = {"stored": merges - len(asked), "without a text": sum(trees.missing), "without a key": trees.in_no_group}
    others = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
    shown = f"\nthe first prompt: {printable(asked[0], _SHOWN)}" if asked else ""
    groups = f"{sum(trees.leaves):,} in {plural(len(trees.groups), 'group')}"
    say(f"dry run: of {plural(job.source.rows, 'row')} {groups}: {least}{plural(len(asked), 'merge')} on "
        f"{plural(levels, 'level')} would be asked{others}; of {plural(call.pool.size, 'endpoint')}, "
        f"to {job.output}; nothing was sent or written{shown}")  # fmt: skip
    return Exit.OK if all(trees.leaves) else Exit.ROWS_FAILED
