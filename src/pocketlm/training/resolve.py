"""Every `auto` becomes a value once, at the start of a run, with the reason for it.

The values are written to `resolved.toml` and into every checkpoint's state; a resumed run takes them from there and
never probes again, so a machine that is busier today cannot change the arithmetic of a run begun yesterday.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Annotated, get_args

import tomli_w
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pocketlm.config import Config
from pocketlm.errors import ConfigError, UsageError
from pocketlm.field_types import AttentionKernel, Determinism, Dtype, FP32Matmul, Strategy
from pocketlm.machine import BITWISE_ON, Runtime, versions
from pocketlm.model.arithmetic import ATTENTION_ON, FP32_ERROR, TORCH_DTYPES, Arithmetic, fp32_error
from pocketlm.model.attention import folded_attention
from pocketlm.model.documents import documents_in
from pocketlm.model.sizes import GPU_CHUNK_BYTES, Team, flops_per_token, loss_chunk, training_memory
from pocketlm.training.memory import COUNTED, available_bytes
from pocketlm.training.micro_batch import Training

MUST_GAIN = 1.2
"""What is chosen for its speed has to be faster by more than a probe's noise, so that a second run chooses the same."""
COMPILE_S, COMPILE_GAIN, RATE = 30.0, 0.05, 0.5
"""What compiling costs once, what it saves of a run, and the share of the matmul rate that a run reaches: measured in
docs/performance-log.md, and good enough to tell minutes from hours."""
NOTHING_COMPILES = "nothing compiles here: "
SLOW_ON_A_CPU: tuple[Dtype, ...] = ("fp16",)
"""On a Zen 4 core products in fp16 run at a hundredth of the rate of bf16, and PyTorch's attention at a sixth."""
WHOLE = 0.5
"""Share of a rank's memory that the whole state may take: the rest is for the rows at once."""
PROBE_ROWS = 2048
PROBE_S = 0.25
ATTENTION_ROWS = 4
"""At most, in the probe of attention: enough for all cores."""


class Resolved(BaseModel):
    """What `auto` became, and why; the matmul rate is what MFU is measured against."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    dtype: Dtype
    attention: AttentionKernel
    fp32_matmul: FP32Matmul
    compile: bool
    micro_batch: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1, le=1024)]
    device: str
    determinism: Determinism
    peak_flops: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ranks: Annotated[int, Field(ge=1)] = 1
    """Processes of the run."""
    strategy: Strategy = "ddp"
    """Whether each has the whole state, or a share of it; one process has it all."""
    loss_chunk: Annotated[int, Field(ge=0)] | None = None
    """Rows of logits alive at once, 0 for all; None in a run that was begun before it was chosen."""
    reasons: dict[str, str]

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(self.dtype, self.attention, self.fp32_matmul)

    def rows_of_logits(self, config: Config) -> int:
        """Rows of logits alive at once, 0 for all. A run that was begun before they were chosen keeps what it had."""
        return loss_chunk(config, on_gpu=False) if self.loss_chunk is None else self.loss_chunk

    def to_toml(self, config: Config) -> str:
        """`resolved.toml`: the configuration as it ran, this table, and the versions of the libraries."""
        ran = self.model_dump(include={"dtype", "attention", "fp32_matmul", "micro_batch", "threads", "determinism"})
        tree = config.tree()
        ran |= {"compile": "on" if self.compile else "off", "loss_chunk": self.rows_of_logits(config)}
        tree["train"] = tree["train"] | ran
        return tomli_w.dumps(tree | {"resolved": self.model_dump(exclude_none=True), "versions": versions()})


def resolve(config: Config, runtime: Runtime) -> Resolved:
    """Probes what is left to `auto`. The probe takes about a second, and some more where compiling may pay.

    Raises:
        UsageError: `train.compile = "on"`, and nothing compiles here; what the device cannot (`check_asked`).
        ConfigError: training would not fit into memory; nothing was allocated.
    """
    device = runtime.device
    check_asked(config, device)
    candidates = _candidates(config, device)
    strategy, strategy_reason = choose_strategy(config, runtime)
    team = team_of(runtime, strategy)
    _refuse_what_never_fits(config, device, candidates, team)
    fp32_matmul, fp32_reason, rates = _fp32_matmul(config, device)
    torch.set_float32_matmul_precision(fp32_matmul)
    for candidate in candidates:
        if candidate not in rates:
            rates[candidate] = matmul_rate(config, device, TORCH_DTYPES[candidate])
    dtype, dtype_reason = _dtype(config, candidates, rates)
    attention, attention_reason = _attention(config, device, dtype)
    compiled, compile_reason = _compile(config, device, rates[dtype])
    micro_batch, micro_reason = Training(config, device, dtype, attention, team).choose()
    chunk, chunk_reason = _loss_chunk(config, device)
    return Resolved(
        dtype=dtype,
        attention=attention,
        fp32_matmul=fp32_matmul,
        compile=compiled,
        micro_batch=micro_batch,
        threads=runtime.threads,
        device=device.type,
        determinism=runtime.determinism,
        peak_flops=rates[dtype],
        ranks=runtime.ranks,
        strategy=strategy,
        loss_chunk=chunk,
        reasons={
            "dtype": dtype_reason,
            "attention": attention_reason,
            "fp32_matmul": fp32_reason,
            "compile": compile_reason,
            "micro_batch": micro_reason,
            "strategy": strategy_reason,
            "loss_chunk": chunk_reason,
            "threads": "every core that this process may use" if config.train.threads == "auto" else "as given",
            "determinism": f"what a {device.type} does by itself" if config.train.determinism == "auto" else "as given",
        },
    )


def _refuse_what_never_fits(config: Config, device: torch.device, candidates: tuple[Dtype, ...], team: Team) -> None:
    """Before a probe takes seconds: no choice needs less than these do. Folded attention keeps more than PyTorch's."""
    attention: AttentionKernel = "folded" if config.train.attention == "folded" else "sdpa"
    refused = list[ConfigError]()
    for dtype in candidates:
        try:
            Training(config, device, dtype, attention, team).choose()
        except ConfigError as error:
            refused.append(error)
    if len(refused) == len(candidates):
        raise refused[-1]


def choose_strategy(config: Config, runtime: Runtime) -> tuple[Strategy, str]:
    """Whether each rank holds the whole state, or a share of it: whole while memory bears it, as that is faster."""
    team = team_of(runtime, "ddp")
    if config.train.strategy == "auto" and team.ranks > 1:
        return strategy_within(config, team, available_bytes(runtime.device) // team.here)
    return strategy_within(config, team, 0)


def strategy_again(config: Config, runtime: Runtime, before: Resolved) -> tuple[Strategy, str]:
    """Of a run that goes on: as it was, where it has as many ranks and none is asked for, whatever is free today."""
    if config.train.strategy == "auto" and runtime.ranks == before.ranks:
        return before.strategy, before.reasons.get("strategy", "")
    return choose_strategy(config, runtime)


def strategy_within(config: Config, team: Team, available: int) -> tuple[Strategy, str]:
    """The same as a function of what is available to each rank, in bytes."""
    if team.ranks == 1:
        return "ddp", "one process has the whole state"
    if config.train.strategy != "auto":
        return config.train.strategy, "as given"
    needed = training_memory(config, 1, "fp32", team=team).per_parameter
    reason = f"the whole state takes {100 * needed / max(1, available):.0f} % of what is free for each"
    return ("ddp" if needed <= WHOLE * available else "fsdp"), reason


def team_of(runtime: Runtime, strategy: Strategy) -> Team:
    """The ranks of a run; on a CPU those of a host have its memory together."""
    return Team(runtime.ranks, strategy, runtime.ranks_here if runtime.device.type == "cpu" else 1)


def memory_warning(config: Config, at_once: int, resolved: Resolved, runtime: Runtime) -> str | None:
    """What to say of a run that goes on with so many rows at once, where memory has become less than they need."""
    team = team_of(runtime, resolved.strategy)
    train = config.train.model_copy(update={"loss_chunk": resolved.rows_of_logits(config)})  # of where it began
    config = config.model_copy(update={"train": train})
    return Training(config, runtime.device, resolved.dtype, resolved.attention, team).warning(at_once)


def _fp32_matmul(config: Config, device: torch.device) -> tuple[FP32Matmul, str, dict[Dtype, float]]:
    """On a CPU without fp32 units in its matrix engine, medium chooses another library, and rounds nothing.

    Also gives the rate of fp32 with it, if that was measured.
    """
    if config.train.fp32_matmul != "auto":
        return config.train.fp32_matmul, "as given", {}
    if device.type != "cpu":
        return "highest", f"medium rounds on a {device.type}", {}
    rates = {}
    for precision in get_args(FP32Matmul):
        torch.set_float32_matmul_precision(precision)
        rates[precision] = matmul_rate(config, device, torch.float32)
    if (error := fp32_error()) > FP32_ERROR:  # with medium, the last one set
        return "highest", f"medium rounds here: a relative error of {error:.0e}", {"fp32": rates["highest"]}
    gain = rates["medium"] / rates["highest"]
    reason = f"medium runs at {gain:.1f} times the rate of highest here, and is fp32: a relative error of {error:.0e}"
    chosen: FP32Matmul = "medium" if gain >= MUST_GAIN else "highest"
    return chosen, reason, {"fp32": rates[chosen]}


def check_asked(config: Config, device: torch.device) -> None:
    """What a new run asks for; one that was begun elsewhere keeps what it had, as far as it can.

    Raises:
        UsageError: fp16 on a CPU; bitwise where it is not promised; PyTorch's attention in 16 bits on an mps.
    """
    train, kind = config.train, device.type
    if kind == "cpu" and train.dtype in SLOW_ON_A_CPU:
        raise UsageError("train.dtype: given fp16, which is for GPUs without bf16; on a CPU take auto, bf16 or fp32")
    if train.determinism == "bitwise" and kind not in BITWISE_ON:
        raise UsageError(f"train.determinism: given bitwise, not promised on {kind}; take same-data, or --device cpu")
    kernel, why = ATTENTION_ON.get(kind, (train.attention, ""))
    if kind == "mps" and train.dtype in ("bf16", "fp16") and train.attention not in (kernel, "auto"):
        raise UsageError(f"train.attention: given {train.attention}: {why}; take auto or {kernel}")


def _candidates(config: Config, device: torch.device) -> tuple[Dtype, ...]:
    """The precisions that `auto` chooses from, fp32 first; or the one that is given."""
    if config.train.dtype != "auto":
        return (config.train.dtype,)
    if device.type == "mps":
        return ("fp32",)
    return ("fp32", "bf16" if device.type == "cpu" or has_bf16(device) else "fp16")


def has_bf16(device: torch.device) -> bool:
    """Whether a device has units for it; a CPU without them computes it all the same, slower than fp32."""
    if device.type in ("cuda", "xpu"):
        return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def _dtype(config: Config, candidates: tuple[Dtype, ...], rates: Mapping[Dtype, float]) -> tuple[Dtype, str]:
    if len(candidates) == 1:
        return candidates[0], "as given" if config.train.dtype != "auto" else "16 bits only where they are asked for"
    fp32, half = candidates
    gain = rates[half] / rates[fp32]
    reason = f"{half} products run at {gain:.1f} times the rate of fp32 here"
    return (half if gain >= MUST_GAIN else fp32), reason


def _attention(config: Config, device: torch.device, dtype: Dtype) -> tuple[AttentionKernel, str]:
    if config.train.attention != "auto":
        return config.train.attention, "as given"
    if device.type in ATTENTION_ON:
        return ATTENTION_ON[device.type]
    seconds = {kernel: _attention_s(config, TORCH_DTYPES[dtype], kernel) for kernel in get_args(AttentionKernel)}
    gain = seconds["sdpa"] / seconds["folded"]
    reason = f"the folded kernel runs at {gain:.1f} times the rate of PyTorch's here"
    return ("folded" if gain >= MUST_GAIN else "sdpa"), reason


def _attention_s(config: Config, dtype: torch.dtype, kernel: AttentionKernel) -> float:
    """Seconds of a layer's attention, forward and backward, without the projections around it."""
    rows, model = min(ATTENTION_ROWS, config.rows_per_step), config.model
    generator = torch.Generator().manual_seed(0)

    def heads(num: int) -> Tensor:
        shape = (rows, num, config.data.context, model.head_dim)
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    q, k, v = (heads(num) for num in (model.num_attention_heads, *[model.num_key_value_heads] * 2))
    upstream = torch.ones_like(q)
    mask = None
    if config.data.document_masks:
        one_document = torch.ones(rows, config.data.context, dtype=torch.int64)
        mask = documents_in(one_document, 0, dtype).mask

    def work() -> None:
        if kernel == "folded":
            y = folded_attention(q, k, v, mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        torch.autograd.grad(y, (q, k, v), upstream)

    work()  # the first call chooses kernels and takes memory
    return _best_s(work)


def _compile(config: Config, device: torch.device, peak_flops: float) -> tuple[bool, str]:
    """Whether to compile; tried on a small function first, as it takes a compiler and much else."""
    if config.train.compile == "off":
        return False, "as given"
    if config.train.compile == "auto" and device.type == "mps":
        return False, "PyTorch's compiler for an mps is a prototype"
    flops = flops_per_token(config.model, config.data.context)
    run_s = config.train.total_steps * config.train.tokens_per_step * flops / (RATE * peak_flops)
    if config.train.compile == "auto" and run_s * COMPILE_GAIN < 2 * COMPILE_S:
        return False, f"about {run_s / 60:.0f} min of training do not pay for compiling"
    if refusal := why_not_compile(device):
        if config.train.compile == "on":
            raise UsageError(f"train.compile: given on, but {NOTHING_COMPILES}{refusal}; take auto or off")
        return False, NOTHING_COMPILES + refusal
    return True, "as given" if config.train.compile == "on" else f"about {run_s / 3600:.1f} h of training pay for it"


def _loss_chunk(config: Config, device: torch.device) -> tuple[int, str]:
    on_gpu = device.type in COUNTED
    chunk = loss_chunk(config, on_gpu=on_gpu)
    if config.train.loss_chunk != "auto":
        return chunk, "as given"
    return chunk, f"{GPU_CHUNK_BYTES / 1e9:.1f} GB of them in fp32" if on_gpu else "more are no faster here"


def why_not_compile(device: torch.device) -> str:
    """Why PyTorch's compiler does not work on this machine; empty where it does. Takes some seconds."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever it is: training goes on without it
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""


def matmul_rate(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the MLP's product in `dtype`."""
    left = torch.ones(PROBE_ROWS, config.model.hidden_size, dtype=dtype, device=device)
    right = torch.ones(config.model.hidden_size, config.model.intermediate_size, dtype=dtype, device=device)

    def products() -> None:
        for _ in range(2):
            product = left @ right
        product[0, 0].item()  # waits for a GPU

    return 4 * left.numel() * right.shape[1] / _best_s(products)


def _best_s(work: Callable[[], object]) -> float:
    """Seconds that `work` takes: the best of a few, for other work on the machine can only make it slower."""
    best_s, until = math.inf, time.perf_counter() + PROBE_S
    while time.perf_counter() < until:
        started_at = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - started_at)
    return best_s
