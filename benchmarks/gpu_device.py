"""All that is CUDA's own in the measurements on a GPU. On a CPU it is replaced, so that their logic can be rehearsed.

A rehearsal's figures mean nothing: a CPU counts no allocations, waits for itself, and never runs out by this process's
limit, so the error that would be raised is raised here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketlm.training import step as step_file
from pocketlm.training.gpus import gpu_by_name
from pocketlm.training.memory import forget_peak, peak_bytes
from pocketlm.training.probe import device_name


@dataclass(frozen=True)
class Device:
    """What is measured: `cuda`, or in a rehearsal `cpu`."""

    kind: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.kind)

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    def synchronize(self) -> None:
        """Returns when all that was begun is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes of living tensors."""
        return torch.cuda.memory_allocated() if self.is_gpu else peak_bytes(self.torch)

    def peak(self) -> int:
        """The most of them since `forget`."""
        return peak_bytes(self.torch)

    def peak_reserved(self) -> int:
        """The most that the allocator has taken of the GPU since `forget`: what a limit holds against."""
        return torch.cuda.max_memory_reserved() if self.is_gpu else peak_bytes(self.torch)

    def forget(self) -> None:
        """Gives back what nobody holds, and counts peaks anew."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
        forget_peak(self.torch)

    def limit(self, size: int | None) -> None:
        """From now on this process may take so many bytes; None lifts the limit. The allocator raises its own error."""
        if self.is_gpu:
            self.forget()
            torch.cuda.set_per_process_memory_fraction(size / _total() if size else 1.0)
        elif size:
            _raise_once()

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        """In it, whatever would make the host wait for the GPU raises a RuntimeError."""
        if not self.is_gpu:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def moved(self, rows: Tensor) -> Tensor:
        """Rows on the device, as a good loader brings them: from pinned memory, not waited for."""
        return rows.pin_memory().to(self.torch, non_blocking=True) if self.is_gpu else rows

    def autocast(self) -> Any:
        return torch.autocast(self.kind, torch.bfloat16)

    def sheet_flops(self) -> float | None:
        """The data sheet's dense bf16 rate; None for what is not in the table."""
        gpu = gpu_by_name(device_name(self.torch)) if self.is_gpu else None
        return gpu.flops if gpu else None

    def lines(self) -> list[str]:
        """What is measured, and with what."""
        name = device_name(self.torch)
        if not self.is_gpu:
            return [f"REHEARSAL on a CPU ({name}), torch {torch.__version__}: no figure means anything."]
        return [f"{name}, {_total() / 2**30:.1f} GiB; torch {torch.__version__}, CUDA {torch.version.cuda}."]

    def profiled(self, work: Callable[[], object]) -> Sequence[tuple[str, int, float]]:
        """(kernel, calls, microseconds) of some work, the longest first; on a CPU of its operations."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_gpu else [])]
        with profile(activities=activities) as profiler:
            work()
            self.synchronize()
        wanted = DeviceType.CUDA if self.is_gpu else DeviceType.CPU
        events = [event for event in profiler.key_averages() if event.device_type == wanted]
        field = "self_device_time_total" if self.is_gpu else "self_cpu_time_total"
        found = [(event.key, event.count, float(getattr(event, field))) for event in events]
        return sorted(found, key=lambda each: -each[2])


def device_of(rehearse: bool) -> Device:
    """The device to measure.

    Raises:
        SystemExit: there is no GPU that PyTorch can use, in one line.
    """
    if rehearse:
        return Device("cpu")
    if not torch.cuda.is_available():
        build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a build without CUDA")
        raise SystemExit(f"no GPU that {build} can use; see nvidia-smi, or add --rehearse to try the script on the CPU")
    return Device("cuda")


def _total() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def _raise_once() -> None:
    """The next loss of a step is refused, as an allocator would refuse it."""
    real = step_file.linear_cross_entropy

    def refusing(*_: Any, **__: Any) -> Tensor:
        step_file.linear_cross_entropy = real
        raise torch.OutOfMemoryError("injected by a rehearsal: out of memory")

    step_file.linear_cross_entropy = refusing
