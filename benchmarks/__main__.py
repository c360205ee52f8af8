"""Run every benchmark, each in a process of its own, in under 15 minutes; the figures as JSON into a folder.

Two need more, and are left out without it: ``vllm`` a real vLLM, and ``incidents``, which takes half an hour, the
clients that it compares. ``prediction`` measures a real vLLM, too, where there is one.

python -m benchmarks [--quick] [--into FOLDER] [cost growth ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

from swarmkit.text import plural

HERE = Path(__file__).parent
COMMANDS = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
VLLM = "SWARMKIT_VLLM_TINY"
NEEDS_VLLM = "it needs a real vLLM: python tests/real_vllm/serve.py run -- python -m benchmarks vllm"
NEEDS_RIVALS = 'it needs the clients that it compares: pip install -e ".[rivals]"'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"which: {', '.join(COMMANDS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that they run, measures nothing")
    parser.add_argument("--into", type=Path, metavar="FOLDER", default=Path("build/benchmarks"), help="for the JSON")
    args = parser.parse_args()
    if unknown := set(args.commands) - set(COMMANDS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; the benchmarks are {', '.join(COMMANDS)}")
    args.into.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name in args.commands or COMMANDS:
        if why := _left_out(name, args.quick):
            print(f"\n=== {name}: skipped; {why}", flush=True)
            continue
        print(f"\n=== {name}", flush=True)
        began = monotonic()
        quick = ["--quick"] if args.quick else []
        file = (args.into / f"{name}.json").resolve()
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file), *quick]
        codes[name] = subprocess.run(command, cwd=HERE.parent).returncode
        print(f"({monotonic() - began:.0f} s)", flush=True)
    bad = [name for name, code in codes.items() if code]
    print(
        f"\n{plural(len(codes), 'benchmark')}, figures in {args.into}" + (f"; failed: {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


def _left_out(name: str, quick: bool) -> str:
    """Why a benchmark cannot be run here; "" if it can."""
    if name == "vllm" and (quick or VLLM not in os.environ):
        return NEEDS_VLLM
    rivals = all(importlib.util.find_spec(module) for module in ("flexllm", "lm_eval"))
    return NEEDS_RIVALS if name == "incidents" and not (quick or rivals) else ""


if __name__ == "__main__":
    sys.exit(main())
