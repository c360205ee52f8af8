"""Job scripts that start servers on a cluster's nodes and write their hostfile: ``swarmkit launch``."""

from __future__ import annotations

import shlex
import string
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["KEY_ENV", "SUBMIT", "job_script"]

SUBMIT = {"job.slurm": "sbatch", "job.pbs": "qsub"}
"""The templates, each with the command that submits it. A template is the head of a script; servers.sh follows it."""
KEY_ENV = "SWARMKIT_JOB_KEY"
_TEMPLATES = Path(__file__).with_name("templates")


class _Script(string.Template):
    delimiter = "@@"  # shells have another meaning for $


def job_script(
    template: str, *, nodes: int, per_node: int, gpus: int, port: int, walltime: str, suffix: str,
    hostfile: Path, server: Sequence[str], options: Sequence[str], setup: Sequence[str],
) -> str:  # fmt: skip
    r"""A job script.

    Parameters
    ----------
    template : {"job.slurm", "job.pbs"}
        For which batch system.
    nodes, per_node, gpus : int
        Nodes of the job, servers of a node, and GPUs or tiles of a server.
    port : int
        Of the first server of each node.
    walltime : str
        As "2:00:00".
    suffix : str
        What follows the nodes' names, see `swarmkit.hosts_from_env`.
    hostfile : Path
        Where the script writes the hostfile. The key is beside it, in ``hostfile.key``, and so are logs.
    server, options : sequence of str
        The words of the server's command, with its model, and its options. The shell takes none of them for its own.
    setup : sequence of str
        Lines of shell that run before, on all nodes.

    Examples
    --------
    >>> text = job_script(
    ...     "job.pbs", nodes=2, per_node=12, gpus=1, port=8000, walltime="1:00:00", suffix="",
    ...     hostfile=Path("/lus/agents.hostfile"), server=["vllm", "serve", "it's mine"], options=[], setup=[],
    ... )
    >>> print(*(line for line in text.splitlines() if line.startswith(("#PBS -l select", "server="))), sep="\n")
    #PBS -l select=2
    server=(vllm serve 'it'"'"'s mine')
    """
    text = "".join((_TEMPLATES / name).read_text("utf-8") for name in (template, "servers.sh"))
    return _Script(text).substitute(
        nodes=nodes, per_node=per_node, gpus=gpus, gpus_per_node=per_node * gpus, port=port,
        walltime=walltime, suffix=shlex.quote(suffix), hostfile=shlex.quote(str(hostfile)), server=shlex.join(server),
        options=shlex.join(options), setup="\n".join(f"  {line}" for line in setup), key_env=KEY_ENV,
        python=shlex.quote(sys.executable),
    )  # fmt: skip
