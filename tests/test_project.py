"""The project's files say the same thing."""

import re
import tomllib
from pathlib import Path

import yaml

import swarmkit

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


def test_every_export_is_mentioned_in_the_changelog_or_on_a_page():
    pages = [p for p in (ROOT / "docs").glob("*.md") if p.name != "reference.md"]  # which lists everything
    text = "".join(p.read_text() for p in [ROOT / "CHANGELOG.md", *pages])
    verbs = [n for n in swarmkit.__all__ if n[0].islower()]
    assert [n for n in verbs if n not in text] == []


def test_the_extras_are_those_of_the_readme():
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = [name for line in table for name in re.findall(r"`(\w+)`", line)]
    assert sorted(named) == sorted(PROJECT["optional-dependencies"])


def test_the_version_is_said_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert "version" not in citation
    assert (citation["title"], citation["license"]) == ("swarmkit", PROJECT["license"])
    versions = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] in ("Unreleased", swarmkit.__version__)
