"""The project's files say the same thing."""

import re
import tomllib
from pathlib import Path

import pandas as pd
import yaml

import swarmkit

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()


def pins(lines):
    return dict(re.fullmatch(r"([A-Za-z0-9-]+)(?:\[.*\])?(.*)", line).groups() for line in lines)


def test_the_conda_environment_has_what_pip_installs():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    names = {"matplotlib-base": "matplotlib"}  # conda's name for it without the GUI toolkits
    there = {names.get(k, k): v for k, v in pins(line for line in conda if isinstance(line, str)).items()}
    needed = pins(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    needed |= pins(extras["parquet"]) | pins(extras["notebook"])
    assert {k: there.get(k) for k in needed} == needed
    assert there["python"] == PROJECT["requires-python"]
    assert {"pip": ["-e .[local]"]} in conda


def test_the_readme_names_public_verbs_that_exist():
    for name in set(re.findall(r"\bsk\.(\w+)", README)):
        assert hasattr(swarmkit, name), f"the README uses sk.{name}"
    for name in set(re.findall(r"df\.swarm\.(\w+)", README)):
        assert hasattr(pd.DataFrame({"a": []}).swarm, name), f"the README uses df.swarm.{name}"


def test_the_readme_has_its_two_commands():
    lines = README.splitlines()
    assert 'python3 -m venv .venv && .venv/bin/pip install -e ".[local]" && .venv/bin/swarmkit demo' in lines
    assert 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest' in lines


def test_the_readme_shows_a_hostfile_that_parses(tmp_path):
    block = next(b for b in re.findall(r"```text\n(.*?)```", README, re.DOTALL) if "rack=a" in b)
    path = tmp_path / "agents.hostfile"
    path.write_text(block)
    assert len(swarmkit.parse_hostfile(path)) == 4


def test_every_export_is_mentioned_in_the_changelog_or_the_readme():
    text = README + (ROOT / "CHANGELOG.md").read_text()
    verbs = [n for n in swarmkit.__all__ if n[0].islower()]
    assert [n for n in verbs if n not in text] == []
