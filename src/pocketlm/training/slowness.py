"""What makes a run slower than it should be, and what to do about it: a line each, said once before the first step.

`slower_than_it_should_be` is a function of plain facts, `facts` looks for them. Nothing is measured for it: what the
probes have found is among the reasons in `resolved.toml`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pocketlm import machine
from pocketlm.config import Config
from pocketlm.limits import available_cores
from pocketlm.machine import Runtime
from pocketlm.training.resolve import NOTHING_COMPILES, Resolved, has_bf16


@dataclass(frozen=True)
class Facts:
    """Of a run and its machine; the defaults are those of one that lacks nothing."""

    device: str = "cpu"
    device_wanted: str = "auto"
    has_nvidia: bool = False
    """Whether a GPU of NVIDIA is in the machine."""
    torch_build: str = "2.13.0+cpu"
    built_for_cuda: bool = False
    dtype: str = "bf16"
    dtype_wanted: str = "auto"
    has_bf16: bool = True
    threads: int = 1
    threads_wanted: str | int = "auto"
    cores: int = 1
    omp_threads: int | None = None
    """What OMP_NUM_THREADS says."""
    why_not_compiled: str = ""
    """Why nothing compiles here, where the run is long enough to pay for it."""
    goes_on: bool = False


def slower_than_it_should_be(facts: Facts) -> list[str]:
    """One line for each reason: what is so, and what helps."""
    lines = (_unused_gpu(facts), _no_bf16(facts), _more_threads_than_cores(facts), _omp(facts), _not_compiled(facts))
    return [line for line in lines if line]


def _unused_gpu(facts: Facts) -> str:
    if facts.device != "cpu" or facts.device_wanted != "auto" or not facts.has_nvidia:
        return ""
    here = f"an NVIDIA GPU is here, and PyTorch {facts.torch_build}"
    if facts.built_for_cuda:
        return f"{here} cannot use it: nvidia-smi says whether its driver runs and is new enough; or take --device cpu"
    return f"{here} is built without CUDA: install a build with it (pytorch.org/get-started), or take --device cpu"


def _no_bf16(facts: Facts) -> str:
    has_none = "this CPU has no bf16 (AVX512_BF16, AMX)" if facts.device == "cpu" else "this GPU has no bf16"
    if facts.has_bf16:
        return ""
    if facts.dtype == "bf16":
        return f"{has_none} and emulates it: take --train.dtype auto"
    if facts.dtype_wanted != "auto":
        return ""
    if facts.dtype == "fp16":
        return f"{has_none}: products run in fp16, with a loss scale; newer GPUs (NVIDIA's from Ampere on) need none"
    return f"{has_none}: products run in fp32; what helps is a smaller preset, or another machine"


def _more_threads_than_cores(facts: Facts) -> str:
    if facts.threads <= facts.cores:
        return ""
    if facts.goes_on:
        return f"the run began with {facts.threads} threads and keeps them; only {facts.cores} cores are here"
    return f"{facts.threads} threads wait for one another on {facts.cores} core(s): leave out --train.threads"


def _omp(facts: Facts) -> str:
    """A run takes all cores whatever OMP_NUM_THREADS says: whoever has set it shall know how that is said."""
    asked, taken = facts.omp_threads, facts.threads
    if facts.threads_wanted != "auto" or facts.goes_on or asked is None or asked >= taken:
        return ""
    return f"OMP_NUM_THREADS={asked} has no say, the run takes {taken} threads: --train.threads {asked} takes fewer"


def _not_compiled(facts: Facts) -> str:
    if not facts.why_not_compiled:
        return ""
    what = "a C++ compiler (g++, clang), worth some 5 %" if facts.device == "cpu" else "Triton and a C++ compiler"
    return f"nothing compiles here ({facts.why_not_compiled}), and the run is long enough to pay for it: install {what}"


def facts(config: Config, resolved: Resolved, runtime: Runtime, *, goes_on: bool) -> Facts:
    """Looks for them; a millisecond."""
    train, compiling = config.train, resolved.reasons["compile"]
    tried = compiling.startswith(NOTHING_COMPILES) and not goes_on
    return Facts(
        device=runtime.device.type,
        device_wanted=train.device,
        has_nvidia=machine.has_nvidia(),
        torch_build=torch.__version__,
        built_for_cuda=torch.version.cuda is not None,
        dtype=resolved.dtype,
        dtype_wanted=train.dtype,
        has_bf16=has_bf16(runtime.device),
        threads=runtime.threads,
        threads_wanted=train.threads,
        cores=max(1, available_cores() // runtime.ranks_here),
        omp_threads=machine.omp_threads(),
        why_not_compiled=compiling.removeprefix(NOTHING_COMPILES) if tried else "",
        goes_on=goes_on,
    )


def warn(
    hear: Callable[[str], None], config: Config, resolved: Resolved, runtime: Runtime, *, goes_on: bool = False
) -> None:
    """Says what there is to say."""
    for line in slower_than_it_should_be(facts(config, resolved, runtime, goes_on=goes_on)):
        hear(line)
