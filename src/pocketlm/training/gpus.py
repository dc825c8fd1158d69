"""Well-known GPUs by name, for plans of machines that are not here: dense rates, memory and its speed.

From the makers' data sheets, without sparsity, products summed in fp32. fp32 is the real one, as pocketlm computes it,
not TF32. What a training run reaches of the rate is assumed, and said: `ASSUMED_MFU`. A T4 has fp16 in place of bf16.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pocketlm.errors import UsageError
from pocketlm.field_types import Dtype

ASSUMED_MFU = 0.35
VARIANTS = {"laptop", "mobile", "max", "pcie", "nvl", "ti", "super", "d", "vgpu"}


@dataclass(frozen=True)
class Gpu:
    """What the data sheet says."""

    name: str
    flops: float
    """FLOP/s of matrix products in `dtype`."""
    fp32_flops: float
    """FLOP/s of matrix products in fp32."""
    bytes_per_s: float
    memory_bytes: int
    dtype: Dtype = "bf16"

    def rate(self, dtype: Dtype) -> float:
        """FLOP/s of matrix products in either precision."""
        return self.fp32_flops if dtype == "fp32" else self.flops


def _gpu(
    name: str, teraflops: float, fp32_teraflops: float, gigabytes_per_s: float, gigabytes: int, dtype: Dtype = "bf16"
) -> Gpu:
    return Gpu(name, teraflops * 1e12, fp32_teraflops * 1e12, gigabytes_per_s * 1e9, gigabytes * 10**9, dtype)


GPUS = (
    _gpu("H200", 989, 67, 4800, 141),
    _gpu("H100", 989, 67, 3350, 80),
    _gpu("A100-80GB", 312, 19.5, 2039, 80),
    _gpu("A100-40GB", 312, 19.5, 1555, 40),
    _gpu("L40S", 362, 91.6, 864, 48),
    _gpu("L4", 121, 30.3, 300, 24),
    _gpu("A10G", 70, 31, 600, 24),
    _gpu("T4", 65, 8.1, 320, 16, "fp16"),
    _gpu("RTX-5090", 209.5, 104.8, 1792, 32),
    _gpu("RTX-4090", 165.2, 82.6, 1008, 24),
    _gpu("RTX-3090", 71, 35.6, 936, 24),
)


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, whatever its case, hyphens and spaces; `A100` is the smaller one.

    Raises:
        UsageError: it is not in the table.
    """
    known = {_key(gpu.name): gpu for gpu in GPUS} | {"a100": next(gpu for gpu in GPUS if gpu.name == "A100-40GB")}
    if gpu := known.get(_key(name)):
        return gpu
    near = difflib.get_close_matches(_key(name), known, n=1)
    hint = f"; did you mean {known[near[0]].name}?" if near else ""
    raise UsageError(f"no device {name!r} in the table{hint}; devices: {', '.join(gpu.name for gpu in GPUS)}")


def gpu_by_name(device_name: str) -> Gpu | None:
    """The GPU that calls itself `NVIDIA H100 80GB HBM3`; None for an unknown one. Its memory may be another.

    Whole words count: an L40 is no L4, and what is sold under a name with one of VARIANTS is slower or faster.
    """
    words = _words(device_name)
    if VARIANTS & set(words):
        return None
    for gpu in GPUS:
        own = _words(gpu.name.removesuffix("-80GB").removesuffix("-40GB"))
        if any(words[place : place + len(own)] == own for place in range(len(words))):
            return gpu
    return None


def _words(name: str) -> list[str]:
    return re.findall("[a-z0-9]+", name.lower())


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
