"""The kinds of devices that PyTorch computes on: which are here, and what the rest of the package must know of them.

    cuda   a GPU of NVIDIA, or of AMD by ROCm
    xpu    a GPU of Intel
    mps    the GPU of an Apple chip; its memory is the machine's
    cpu    always here

Only cpu was ever run. What is said of the others was read in PyTorch's source, and is the careful choice where 2.11 and
2.13 differ; docs/train.md says so to the user.
"""

from __future__ import annotations

from typing import get_args

import torch

from pocketlm.field_types import Device

COPIES_BESIDE = ("cuda", "xpu")
"""Where copies from and to pinned memory go on beside the computation. An mps has no pinned memory of its own: a copy
that nobody waits for would be read before it is there."""


def present() -> list[Device]:
    """The kinds that are here, as `auto` prefers them."""
    return [kind for kind in get_args(Device) if torch.get_device_module(kind).is_available()]


def claim(device: torch.device) -> None:
    """Begins to use it. A GPU that nobody has claimed is left alone: to ask for its state would fill memory there."""
    if device.type in COPIES_BESIDE:
        torch.get_device_module(device).init()


def in_use() -> list[Device]:
    """The kinds of GPUs that this process has claimed; an mps has no such mark, and is in use wherever it is."""
    gpus: list[Device] = [kind for kind in present() if kind != "cpu"]
    return [kind for kind in gpus if kind == "mps" or torch.get_device_module(kind).is_initialized()]


def gpu_name(device: torch.device) -> str:
    """What a GPU calls itself."""
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return str(torch.get_device_module(device).get_device_name(device))
