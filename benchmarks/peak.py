"""The rate of bf16 matrix products on this machine: what all GFLOP/s are a share of."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

SHAPES = ((2048, 576, 1536), (2048, 2048, 2048))
SECONDS_A_SHAPE = 2.0


def measure(threads: int, by_cpu: bool, pipe: Connection) -> None:
    """Sends FLOP/s by shape (M, K, N), the best of many products: other work can only make one slower. In a process."""
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if by_cpu else time.perf_counter
    rates: dict[tuple[int, int, int], float] = {}
    for m, k, n in SHAPES:
        left, right = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(n, k, dtype=torch.bfloat16).t()
        best_s, until = float("inf"), time.perf_counter() + SECONDS_A_SHAPE
        while time.perf_counter() < until:
            began_at = clock()
            for _ in range(8):
                left @ right
            best_s = min(best_s, (clock() - began_at) / 8)
        rates[m, k, n] = 2 * m * k * n / best_s
    pipe.send(rates)
