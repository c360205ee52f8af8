"""Run every benchmark, each in a process of its own, in under 15 minutes; the figures as JSON into a folder.

python -m benchmarks [--quick] [--into FOLDER] [cost growth ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

HERE = Path(__file__).parent
COMMANDS = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
NEEDS_VLLM = {"vllm"}
VLLM = "SWARMKIT_VLLM_TINY"
HOW = "it needs a real vLLM: python tests/real_vllm/serve.py run -- python -m benchmarks vllm"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"which: {', '.join(COMMANDS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that they run, measures nothing")
    parser.add_argument("--into", type=Path, metavar="FOLDER", default=Path("build/benchmarks"), help="for the JSON")
    args = parser.parse_args()
    if unknown := set(args.commands) - set(COMMANDS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    args.into.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name in args.commands or COMMANDS:
        if name in NEEDS_VLLM and (args.quick or VLLM not in os.environ):
            print(f"\n=== {name}: left out; {HOW}", flush=True)
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
        f"\n{len(codes)} benchmarks, figures in {args.into}"
        + (f"; not as they should be: {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
