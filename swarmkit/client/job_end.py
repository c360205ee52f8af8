"""When the batch job ends that this process runs in: what Slurm and PBS say."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from ..errors import SettingError
from ..text import printable

__all__ = ["ENDS_OF", "job_end"]

_ASKED_S = 10.0
"""Seconds that the commands of a batch system may take."""
_DURATION = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_ELSEWHERE = "give seconds or a datetime"


def job_end(scheduler: str, env: Mapping[str, str] | None = None) -> datetime:
    """The moment at which the time limit of this job is over.

    Parameters
    ----------
    scheduler : {"slurm", "pbs"}
        Slurm: ``$SLURM_JOB_END_TIME``, or what ``squeue`` says of ``$SLURM_JOB_ID``. PBS: what ``qstat -f`` says of
        ``$PBS_JOBID``, start and walltime.
    env : mapping of str to str, optional
        The environment, ``os.environ`` by default.

    Raises
    ------
    SettingError
        This is no such job, its batch system does not answer, or the job has no limit.

    Examples
    --------
    >>> job_end("slurm", {"SLURM_JOB_END_TIME": "1795860000"})
    datetime.datetime(2026, 11, 28, 10, 0, tzinfo=datetime.timezone.utc)
    """
    return ENDS_OF[scheduler](os.environ if env is None else env)


def _slurm(env: Mapping[str, str]) -> datetime:
    if (at := env.get("SLURM_JOB_END_TIME", "")).isdecimal():
        return datetime.fromtimestamp(int(at), UTC)
    job = _job("slurm", "SLURM_JOB_ID", env)
    said = _asked("slurm", ["squeue", "-h", "-j", job, "-o", "%L"], env).strip()  # the time left, 1-02:03:04
    if (left := _seconds(said)) is None:
        raise SettingError(f'deadline="slurm": the time left of job {job} is {printable(said)!r}: {_ELSEWHERE}')
    return datetime.now(UTC) + timedelta(seconds=left)


def _pbs(env: Mapping[str, str]) -> datetime:
    job = _job("pbs", "PBS_JOBID", env)
    said = _asked("pbs", ["qstat", "-f", job], env).replace("\n\t", "")
    found = dict(re.findall(r"^\s*([\w.]+) = (.*?)\s*$", said, re.MULTILINE))
    limit, start = _seconds(found.get("Resource_List.walltime", "")), _asctime(found.get("stime", ""))
    if start is None:
        start = _asctime(found.get("start_time", ""))  # as Torque names it
    if limit is None or start is None:
        lacking = "Resource_List.walltime" if limit is None else "stime"
        raise SettingError(f'deadline="pbs": qstat -f {job} shows no {lacking} that can be read: {_ELSEWHERE}')
    return start + timedelta(seconds=limit)


ENDS_OF: Mapping[str, Callable[[Mapping[str, str]], datetime]] = {"slurm": _slurm, "pbs": _pbs}
"""The batch systems whose jobs say when they end."""


def _job(scheduler: str, variable: str, env: Mapping[str, str]) -> str:
    if job := env.get(variable):
        return job
    raise SettingError(
        f'deadline="{scheduler}" is the end of the job that this process runs in, and ${variable} is not set: outside '
        f"of a job, {_ELSEWHERE}"
    )


def _asked(scheduler: str, command: list[str], env: Mapping[str, str]) -> str:
    """What a command of a batch system prints."""
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ASKED_S,
            env={**env, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        problem = f"it says nothing for {_ASKED_S:g} s"
    except OSError as exc:
        problem = exc.strerror or str(exc)
    else:
        if not done.returncode:
            return done.stdout
        problem = printable(done.stderr.strip(), 200) or f"its exit code is {done.returncode}"
    raise SettingError(f'deadline="{scheduler}": {shown} does not say when the job ends ({problem}): {_ELSEWHERE}')


def _seconds(text: str) -> int | None:
    """Seconds of a time as batch systems write it: days-hours:minutes:seconds."""
    if not (found := _DURATION.fullmatch(text)):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _asctime(text: str) -> datetime | None:
    """A local time as C writes it: Sat Nov 28 09:00:00 2026."""
    match text.split():
        case [_, month, day, clock, year] if month in _MONTHS and (seconds := _seconds(clock)) is not None:
            try:
                midnight = datetime(int(year), _MONTHS.index(month) + 1, int(day))
            except ValueError:
                return None
            return (midnight + timedelta(seconds=seconds)).astimezone(UTC)
    return None
