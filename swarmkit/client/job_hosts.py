"""The nodes of a batch job as endpoints: what Slurm and PBS say of them in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import HostfileError, SettingError
from .host_list import expand_list
from .hostfile import DEFAULT_PORT, AgentEndpoint, as_endpoint

__all__ = ["NODES_IN", "hosts_from_env", "job_hosts"]

NODES_IN = {"slurm": "SLURM_JOB_NODELIST", "pbs": "PBS_NODEFILE"}
"""The variable of each batch system: Slurm's holds the list, PBS's the path of a file."""
_ELSEWHERE = "Jobs of Slurm and PBS have it; elsewhere, give a hostfile, or a range as node[001-128]:8000"


def hosts_from_env(
    port: int = DEFAULT_PORT, per_node: int = 1, suffix: str = "", env: Mapping[str, str] | None = None
) -> list[AgentEndpoint]:
    """The endpoints on the nodes of the batch job that this process runs in.

    Parameters
    ----------
    port : int, default 8000
        Port of the first server of each node.
    per_node : int, default 1
        Servers of each node, on the ports from ``port`` on.
    suffix : str, optional
        What follows the name of each node, as ".hsn.example.org" or "-ib0" for a faster network. It takes the place
        of a domain that a name has already. Addresses (10.0.0.1) stay as they are.
    env : mapping of str to str, optional
        The environment, ``os.environ`` by default: ``$SLURM_JOB_NODELIST``, or else the file ``$PBS_NODEFILE``, in
        which a node may be on several lines and counts once.

    Returns
    -------
    list of AgentEndpoint
        Node by node in the job's order; for ``connect``.

    Raises
    ------
    HostfileError
        Neither variable is set, the list is malformed, or the file cannot be read.
    SettingError
        A port would be outside of 1 to 65535.

    Examples
    --------
    >>> job = {"SLURM_JOB_NODELIST": "n[08-09],gpu1"}
    >>> [e.name for e in hosts_from_env(env=job, suffix=".hpc.example.org")]
    ['n08.hpc.example.org:8000', 'n09.hpc.example.org:8000', 'gpu1.hpc.example.org:8000']
    >>> [e.name for e in hosts_from_env(port=9000, per_node=2, env=job)][:3]
    ['n08:9000', 'n08:9001', 'n09:9000']
    """
    env = os.environ if env is None else env
    scheduler = next((name for name, variable in NODES_IN.items() if env.get(variable)), None)
    if scheduler is None:
        variables = " nor ".join(f"${variable}" for variable in NODES_IN.values())
        raise HostfileError(f"neither {variables} is set. {_ELSEWHERE}")
    return job_hosts(scheduler, port, per_node, suffix, env)


def job_hosts(
    scheduler: str, port: int, per_node: int = 1, suffix: str = "", env: Mapping[str, str] | None = None
) -> list[AgentEndpoint]:
    """``hosts_from_env`` for one batch system, "slurm" or "pbs"."""
    whole = all(isinstance(number, int) for number in (port, per_node))
    if not whole or per_node < 1 or port < 1 or port + per_node - 1 > 65535:
        raise SettingError(
            f"port={port!r}, per_node={per_node!r}: both must be whole numbers, 1 or more, and the ports of a node "
            "within 1 to 65535"
        )
    variable = NODES_IN[scheduler]
    value = (os.environ if env is None else env).get(variable)
    if not value:
        raise HostfileError(f"${variable} is not set. {_ELSEWHERE}")
    try:
        nodes = expand_list(value) if scheduler == "slurm" else _lines(Path(value))
        names = dict.fromkeys(_renamed(node, suffix) for node in nodes)
        if not names:
            raise HostfileError(f"{value!r} names no node")
        return [as_endpoint(f"{name}:{at}") for name in names for at in range(port, port + per_node)]
    except HostfileError as exc:
        raise HostfileError(f"${variable}: {exc}") from None


def _lines(path: Path) -> list[str]:
    try:
        nodes = [fields[0] for line in path.read_text("utf-8-sig").splitlines() if (fields := line.split())]
    except (OSError, UnicodeDecodeError) as exc:
        raise HostfileError(f"cannot read the file {str(path)!r} that it names: {exc}") from exc
    if not nodes:
        raise HostfileError(f"the file {str(path)!r} that it names holds no node")
    return nodes


def _renamed(node: str, suffix: str) -> str:
    is_address = node.replace(".", "").isdigit()
    return node if is_address or not suffix else node.partition(".")[0] + suffix
