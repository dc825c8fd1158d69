"""Several processes of one run: the same batches, gradients and losses as one, and each resume the same bits."""

from __future__ import annotations

from itertools import product
from typing import Any

import oracle
import pytest
from rig import Rig, flags

BASE = {"train.total_steps": 20, "train.tokens_per_step": 96 * 32, "train.eval_every": 4, "sample.every": 10}


def test_try(rig: Rig) -> None:
    import time
    for strategy in ("ddp", "fsdp"):
        for n in (1, 2, 4):
            t = time.time()
            fields = {"train.total_steps": 20, "train.strategy": strategy, "train.tokens_per_step": 96 * 32}
            rig.run_ranks(n, ["train", "debug", "--out", f"{strategy}{n}", *flags(fields)])
            print(strategy, n, time.time() - t)
