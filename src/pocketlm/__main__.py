"""`python -m pocketlm`: the command, for whoever starts modules, as torchrun does."""

from __future__ import annotations

import sys

from pocketlm.cli.main import main

sys.exit(main())
