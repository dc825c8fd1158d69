"""The kinds of devices that PyTorch computes on: which are here, and what the rest of the package must know of them.

    cuda   a GPU of NVIDIA, or of AMD by ROCm
    xpu    a GPU of Intel
    mps    the GPU of an Apple chip; its memory is the machine's
    cpu    always here

Only cpu was ever run. What is said of the others was read in PyTorch's source, and is the careful choice where 2.11 and
2.13 differ; docs/train.md says so to the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

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


class Told:
    """Numbers on their way to the host, which hears them without waiting for what the device was given after them.

    `Tensor.item` would: its copy stands at the end of the device's queue, behind the next step.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        """
        Args:
            numbers: () each, on one device; no later change of them is heard from a GPU.
        """
        self._numbers, self._copied = list(numbers), None
        if numbers[0].device.type in COPIES_BESIDE:
            self._numbers = [_pinned_like(number).copy_(number, non_blocking=True) for number in numbers]
            self._copied = torch.get_device_module(numbers[0].device).Event()
            self._copied.record()

    def hear(self) -> list[float]:
        """The numbers, when they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return [number.item() for number in self._numbers]


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
