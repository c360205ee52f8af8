"""``python -m swarmkit`` is the command ``swarmkit``."""

import sys

from .cli.main import main

sys.exit(main())
