"""fp32 is the truth; the computation may be bf16.

Parameters, gradient sums and optimizer state are fp32. In bf16 mode the model computes with a bf16 copy, written by
the optimizer after every update and never stored: bf16 keeps 8 bits of mantissa, too few to hold an update of a
thousandth of a weight (Micikevicius et al., "Mixed Precision Training", 2018, section 3.1). The gradients of the
micro-batches come out of the copy in bf16 and are summed in fp32.

The copy's vocabulary is rounded up to a multiple of 64: matrix kernels of both CPUs and GPUs are slow at odd widths
(GPT-2's 50,257). The rows added are zero, their logits count as -inf, and nothing outside the copy knows of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketlm.config import AttentionKernel, Dtype
from pocketlm.model.transformer import Transformer

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB_MULTIPLE = 64


class Precision:
    """A model's fp32 parameters and the model that computes: the same object in fp32, a copy in bf16."""

    def __init__(self, model: Transformer, dtype: Dtype, attention: AttentionKernel) -> None:
        self.model = model
        self.compute = computing(model, dtype, attention)
        self._masters = dict(model.named_parameters())
        self._computed = dict(self.compute.named_parameters())

    @property
    def copies(self) -> dict[str, Tensor]:
        """The bf16 copy of each parameter, by name, in its shape; none in fp32. Whoever updates one writes the other."""
        if self.compute is self.model:
            return {}
        return {name: self._unpadded(name, copied.detach()) for name, copied in self._computed.items()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter, by name, in its shape: fp32 sums, or the only micro-batch's own in bf16."""
        gradients = {}
        for name, master in self._masters.items():
            gradient = self._computed[name].grad if master.grad is None else master.grad
            assert gradient is not None, name
            gradients[name] = self._unpadded(name, gradient)
        return gradients

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After each micro-batch of several: adds the copy's gradients to the parameters' fp32 sums."""
        if self.compute is self.model:
            return  # autograd has summed them already
        for name, master in self._masters.items():
            computed = self._computed[name]
            assert computed.grad is not None, name
            gradient = self._unpadded(name, computed.grad)
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient
            computed.grad = None

    def drop_gradients(self) -> None:
        """Forgets a step that was not finished, or is."""
        for parameter in (*self._masters.values(), *self._computed.values()):
            parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copy anew from parameters that something else than the optimizer has written."""
        if copies := self.copies:
            torch._foreach_copy_(list(copies.values()), [self._masters[name] for name in copies])

    def _unpadded(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[: self._masters[name].shape[0]]


@torch.no_grad()
def computing(model: Transformer, dtype: Dtype, attention: AttentionKernel) -> Transformer:
    """The model that computes what an fp32 model says: itself, or a copy in another precision."""
    if dtype == "fp32":
        model.use_attention(attention)
        return model
    padded = -(-model.config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    with torch.device("meta"):
        copied = Transformer(model.config, vocab_rows=padded).to(TORCH_DTYPES[dtype])
    copied.to_empty(device=model.head.device)
    copied.use_attention(attention)
    copied.gradient_checkpointing = model.gradient_checkpointing
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.zero_()[: theirs.shape[0]] = theirs
        mine.requires_grad_(theirs.requires_grad)
    return copied
