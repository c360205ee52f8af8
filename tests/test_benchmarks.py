"""The benchmark commands run, at sizes too small to measure anything, so that they cannot rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")} - {"vllm"}  # which needs a real one


@pytest.mark.long
@pytest.mark.timeout(400)
def test_every_benchmark_runs_and_writes_its_figures(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--into", str(tmp_path)]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=380
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "vllm: skipped" in ran.stdout
    figures = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(figures) == COMMANDS
    assert all(table for found in figures.values() for table in found["tables"].values())
