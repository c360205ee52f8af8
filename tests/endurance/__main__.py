"""Hours of use in minutes: interrupts and kills at random moments, and a soak with one percent of every fault.

::

    python tests/endurance interrupts --times 1000
    python tests/endurance kills --times 100
    python tests/endurance soak --seconds 600

Each ends with exit code 0 and its figures, or with an assertion. Nothing is lost: what was answered is in the frame
(and in the store), right, and is not asked again; and nothing is left over: no descriptor, task, thread or memory.
"""

import argparse
import random
import sys
import warnings

import interrupts
import kills
import soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["interrupts", "kills", "soak"])
    parser.add_argument("--times", type=int, default=100, help="interrupts or kills")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the soak")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"{args.what}, seed {args.seed}", flush=True)
    warnings.simplefilter("ignore")
    if args.what == "soak":
        soak.soak(args.seconds, random.Random(args.seed))
    else:
        {"interrupts": interrupts.interrupts, "kills": kills.kills}[args.what](args.times, random.Random(args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
