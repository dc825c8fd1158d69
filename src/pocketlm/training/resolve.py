"""Every `auto` becomes a value once, at the start of a run, with the reason for it.

The values are written to `resolved.toml` and into every checkpoint's state; a resumed run takes them from there and
never probes again, so a machine that is busier today cannot change the arithmetic of a run begun yesterday.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Annotated, get_args

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pocketlm.config import AttentionKernel, Config, Determinism, Dtype
from pocketlm.distributed import Runtime, versions
from pocketlm.model.transformer import Attention
from pocketlm.training.precision import TORCH_DTYPES

MICRO_BATCH_TOKENS = 8192
BF16_MUST_GAIN = 1.2
PROBE_ROWS = 2048
PROBE_S = 0.25


class Resolved(BaseModel):
    """What `auto` became, and why; the matmul rate is what MFU is measured against."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    dtype: Dtype
    attention: AttentionKernel
    micro_batch: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1, le=1024)]
    device: str
    determinism: Determinism
    peak_flops: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    reasons: dict[str, str]

    def to_toml(self, config: Config) -> str:
        """`resolved.toml`: the configuration as it ran, this table, and the versions of the libraries."""
        ran = self.model_dump(include={"dtype", "attention", "micro_batch", "threads", "determinism"})
        tree = config.tree()
        tree["train"] = tree["train"] | ran
        return tomli_w.dumps(tree | {"resolved": self.model_dump(), "versions": versions()})


def resolve(config: Config, runtime: Runtime) -> Resolved:
    """Probes what is left to `auto`. The probe takes about a second."""
    wanted = config.train.dtype
    candidates: tuple[Dtype, ...] = ("fp32", "bf16") if wanted == "auto" else (wanted,)
    rates = {dtype: matmul_rate(config, runtime.device, TORCH_DTYPES[dtype]) for dtype in candidates}
    dtype, dtype_reason = _dtype(config, rates)
    attention, attention_reason = _attention(config, runtime.device, dtype)
    micro_batch, micro_reason = _micro_batch(config)
    return Resolved(
        dtype=dtype,
        attention=attention,
        micro_batch=micro_batch,
        threads=runtime.threads,
        device=runtime.device.type,
        determinism=runtime.determinism,
        peak_flops=rates[dtype],
        reasons={
            "dtype": dtype_reason,
            "attention": attention_reason,
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


def _attention(config: Config, device: torch.device, dtype: Dtype) -> tuple[AttentionKernel, str]:
    if config.train.attention != "auto":
        return config.train.attention, "as given"
    if device.type != "cpu":
        return "sdpa", f"PyTorch's kernel is made for a {device.type}"
    seconds = {kernel: _attention_s(config, TORCH_DTYPES[dtype], kernel) for kernel in get_args(AttentionKernel)}
    gain = seconds["sdpa"] / seconds["folded"]
    reason = f"folded by key-value head it runs at {gain:.1f} times the rate of PyTorch's kernel here"
    return ("folded" if gain > 1 else "sdpa"), reason


def _attention_s(config: Config, dtype: torch.dtype, kernel: AttentionKernel) -> float:
    """Seconds of one row's attention forward and backward in one layer: the best of a few."""
    attention = Attention(config.model, layer=0).to(dtype)
    attention.kernel = kernel
    x = torch.ones(1, config.data.context, config.model.hidden_size, dtype=dtype)
    best_s, until = math.inf, time.perf_counter() + PROBE_S / 2
    while time.perf_counter() < until:
        started_at = time.perf_counter()
        attention(x, None, None).sum().backward()
        best_s = min(best_s, time.perf_counter() - started_at)
    return best_s


def _micro_batch(config: Config) -> tuple[int, str]:
    rows = config.rows_per_step
    if config.train.micro_batch != "auto":
        return min(config.train.micro_batch, rows), "as given"
    fitting = max(1, min(rows, MICRO_BATCH_TOKENS // config.data.context))
    return fitting, f"{fitting * config.data.context} tokens at once, of {config.train.tokens_per_step} a step"


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
