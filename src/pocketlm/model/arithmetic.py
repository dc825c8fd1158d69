"""How a model computes: in which precision, and by which kernels.

None of it is part of the model: each choice gives the same function but for rounding. It is chosen once for a run,
kept in its checkpoints, and taken again by whatever must repeat the run's figures: a resume, `pocketlm eval`.

A computing copy in bf16 has its vocabulary rounded up to a multiple of 64: matrix kernels of CPUs and GPUs are slow at
odd widths (GPT-2's 50,257). The rows added are zero, their logits count as -inf, and nothing outside knows of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pocketlm.config import AttentionKernel, Dtype, FP32Matmul
from pocketlm.model.transformer import Transformer, allocate

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Arithmetic:
    """What a model's numbers depend on beside its weights and input."""

    dtype: Dtype = "fp32"
    attention: AttentionKernel = "sdpa"
    fp32_matmul: FP32Matmul = "highest"


@torch.no_grad()
def computing(model: Transformer, arithmetic: Arithmetic) -> Transformer:
    """The model that computes what an fp32 model says: itself, or a copy in another precision.

    Sets PyTorch's precision of fp32 products, which holds for the whole process.
    """
    torch.set_float32_matmul_precision(arithmetic.fp32_matmul)
    if arithmetic.dtype == "fp32":
        model.use_attention(arithmetic.attention)
        return model
    padded = -(-model.config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    dtype = TORCH_DTYPES[arithmetic.dtype]
    copied = allocate(model.config, vocab_rows=padded, dtype=dtype, device=model.head.device)
    copied.use_attention(arithmetic.attention)
    copied.gradient_checkpointing = model.gradient_checkpointing
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.zero_()[: theirs.shape[0]] = theirs
        mine.requires_grad_(theirs.requires_grad)
    return copied
