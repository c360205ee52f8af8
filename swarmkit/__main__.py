"""``python -m swarmkit`` is the command ``swarmkit``."""

import sys

from .cli import main

sys.exit(main())
