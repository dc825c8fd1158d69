"""How a model computes: in which precision, and by which kernels.

None of it is part of the model: each choice gives the same function but for rounding. It is chosen once for a run,
kept in its checkpoints, and taken again by whatever must repeat the run's figures: a resume, `pocketlm eval`.

A computing copy in 16 bits has its vocabulary rounded up to a multiple of 64: matrix kernels of CPUs and GPUs are slow
at odd widths (GPT-2's 50,257). The rows added are zero, their logits count as -inf, and nothing outside knows of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pocketlm.field_types import AttentionKernel, Dtype, FP32Matmul
from pocketlm.model.sizes import VOCAB_MULTIPLE
from pocketlm.model.transformer import Transformer, allocate

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP32_ERROR = 1e-5
"""Relative; fp32 products are below 1e-6, those of TF32 or bf16 above 1e-4."""


ATTENTION_ON: dict[str, tuple[AttentionKernel, str]] = {
    "cuda": ("sdpa", "PyTorch's kernel is made for a cuda"),
    "xpu": ("sdpa", "PyTorch's kernel is made for an xpu"),
    "mps": ("folded", "PyTorch's kernel lets tokens see later ones in 16 bits on an mps, up to 2.12"),
}
"""What computes attention on a GPU, and why; on a CPU a probe chooses. For mps see PyTorch's issue 195910."""


@dataclass(frozen=True)
class Arithmetic:
    """What of a model's rounding is chosen and stored.

    The last bits depend on more: the number of threads, compiled blocks, the rows at once, the machine and its
    libraries.
    """

    dtype: Dtype = "fp32"
    attention: AttentionKernel = "sdpa"
    fp32_matmul: FP32Matmul = "highest"

    def use(self) -> None:
        """Sets PyTorch's precision of fp32 products, which holds for the whole process."""
        torch.set_float32_matmul_precision(self.fp32_matmul)


def usable(arithmetic: Arithmetic, device: torch.device) -> tuple[Arithmetic, str]:
    """What of an arithmetic that was chosen on another machine can be kept on a device here, and why not all of it.

    Each GPU has its kernel of attention, and fp32 stays fp32. Changes the precision of the process while it looks.
    """
    kept, reasons = arithmetic, list[str]()
    kernel, why = ATTENTION_ON.get(device.type, (kept.attention, ""))
    if kept.attention != kernel:
        reasons.append(f"attention is {kernel}, not {kept.attention}: {why}")
        kept = replace(kept, attention=kernel)
    if kept.fp32_matmul == "medium":
        kept.use()
        where = f"on a {device.type}" if device.type != "cpu" else "here"
        if device.type != "cpu" or fp32_error() > FP32_ERROR:
            kept = replace(kept, fp32_matmul="highest")
            reasons.append(f"fp32_matmul is highest, not medium, which rounds {where}")
    return kept, "; ".join(reasons)


def fp32_error() -> float:
    """Of an fp32 product of this process on the CPU against fp64, norm of the difference over norm."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    truth = left.double() @ right.double()
    return float(((left @ right).double() - truth).norm() / truth.norm())


@torch.no_grad()
def computing(model: Transformer, arithmetic: Arithmetic) -> Transformer:
    """The model that computes what an fp32 model says: itself, or a copy in another precision.

    The precision of fp32 products is the process's, and not touched: see `Arithmetic.use`.
    """
    if arithmetic.dtype == "fp32":
        model.use_attention(arithmetic.attention)
        return model
    padded = -(-model.config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    dtype = TORCH_DTYPES[arithmetic.dtype]
    copied = allocate(model.config, vocab_rows=padded, dtype=dtype, device=model.head.device)
    copied.use_attention(arithmetic.attention)
    copied.gradient_checkpointing = model.gradient_checkpointing
    copied.document_end = model.document_end
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.zero_()[: theirs.shape[0]] = theirs
        mine.requires_grad_(theirs.requires_grad)
    return copied
