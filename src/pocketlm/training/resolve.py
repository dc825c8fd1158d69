"""Every `auto` becomes a value once, at the start of a run, with the reason for it.

The values are written to `resolved.toml` and into every checkpoint's state; a resumed run takes them from there and
never probes again, so a machine that is busier today cannot change the arithmetic of a run begun yesterday.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Annotated

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pocketlm.config import Config, Determinism, Dtype
from pocketlm.distributed import Runtime, versions
from pocketlm.training import micro_batch as micro_batches
from pocketlm.training.precision import TORCH_DTYPES

BF16_MUST_GAIN = 1.2
PROBE_ROWS = 2048
PROBE_S = 0.25


class Resolved(BaseModel):
    """What `auto` became, and why; the matmul rate is what MFU is measured against."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    dtype: Dtype
    micro_batch: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1, le=1024)]
    device: str
    determinism: Determinism
    peak_flops: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    reasons: dict[str, str]

    def to_toml(self, config: Config) -> str:
        """`resolved.toml`: the configuration as it ran, this table, and the versions of the libraries."""
        ran = self.model_dump(include={"dtype", "micro_batch", "threads", "determinism"})
        tree = config.tree()
        tree["train"] = tree["train"] | ran
        return tomli_w.dumps(tree | {"resolved": self.model_dump(), "versions": versions()})


def resolve(config: Config, runtime: Runtime) -> Resolved:
    """Probes what is left to `auto`. The probe takes about a second.

    Raises:
        ConfigError: training would not fit into memory; nothing was allocated.
    """
    wanted = config.train.dtype
    candidates: tuple[Dtype, ...] = ("fp32", "bf16") if wanted == "auto" else (wanted,)
    rates = {dtype: matmul_rate(config, runtime.device, TORCH_DTYPES[dtype]) for dtype in candidates}
    dtype, dtype_reason = _dtype(config, rates)
    micro_batch, micro_reason = micro_batches.choose(config, runtime.device, dtype)
    return Resolved(
        dtype=dtype,
        micro_batch=micro_batch,
        threads=runtime.threads,
        device=runtime.device.type,
        determinism=runtime.determinism,
        peak_flops=rates[dtype],
        reasons={
            "dtype": dtype_reason,
            "micro_batch": micro_reason,
            "threads": "every core that this process may use" if config.train.threads == "auto" else "as given",
            "determinism": f"what a {runtime.device.type} does by itself"
            if config.train.determinism == "auto"
            else "as given",
        },
    )


def _dtype(config: Config, rates: Mapping[Dtype, float]) -> tuple[Dtype, str]:
    if config.train.dtype != "auto":
        return config.train.dtype, "as given"
    gain = rates["bf16"] / rates["fp32"]
    reason = f"bf16 products run at {gain:.1f} times the rate of fp32 here"
    return ("bf16" if gain >= BF16_MUST_GAIN else "fp32"), reason


def matmul_rate(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the MLP's product in `dtype`: the best of a few samples, for other work can only make one slower."""
    left = torch.ones(PROBE_ROWS, config.model.hidden_size, dtype=dtype, device=device)
    right = torch.ones(config.model.hidden_size, config.model.intermediate_size, dtype=dtype, device=device)
    best_s, until = math.inf, time.perf_counter() + PROBE_S
    while time.perf_counter() < until:
        best_s = min(best_s, _product_s(left, right))
    return 2 * left.numel() * right.shape[1] / best_s


def _product_s(left: Tensor, right: Tensor) -> float:
    started_at = time.perf_counter()
    for _ in range(2):
        product = left @ right
    product[0, 0].item()  # waits for a GPU
    return (time.perf_counter() - started_at) / 2
