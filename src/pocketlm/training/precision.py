"""fp32 is the truth; the computation may be bf16.

Parameters, gradient sums and optimizer state are fp32. In bf16 mode the model computes with a bf16 copy, made from
the parameters after every update and never stored: bf16 keeps 8 bits of mantissa, too few to hold an update of a
thousandth of a weight (Micikevicius et al., "Mixed Precision Training", 2018, section 3.1). The gradients of the
micro-batches come out of the copy in bf16 and are summed in fp32.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pocketlm.config import Dtype
from pocketlm.model.transformer import Transformer

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Precision:
    """A model's fp32 parameters and the model that computes: the same object in fp32, a copy in bf16."""

    def __init__(self, model: Transformer, dtype: Dtype) -> None:
        self.model = model
        self.compute = model if dtype == "fp32" else copy.deepcopy(model).to(TORCH_DTYPES[dtype])
        self._masters: list[Tensor] = list(model.parameters())
        self._copies: list[Tensor] = list(self.compute.parameters())

    @property
    def is_copy(self) -> bool:
        return self.compute is not self.model

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After the backward pass of a micro-batch: adds the copy's gradients to the parameters' fp32 sums."""
        if not self.is_copy:
            return  # autograd has summed them already
        for master, computed in zip(self._masters, self._copies, strict=True):
            assert computed.grad is not None
            if master.grad is None:
                master.grad = computed.grad.float()
            else:
                master.grad += computed.grad
            computed.grad = None

    def drop_gradients(self) -> None:
        """Forgets a step that was not finished."""
        for parameter in (*self._masters, *self._copies):
            parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """After an update: makes the copy anew, and drops the gradients."""
        self.drop_gradients()
        if self.is_copy:
            torch._foreach_copy_(self._copies, self._masters)
