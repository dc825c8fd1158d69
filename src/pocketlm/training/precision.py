"""fp32 is the truth; the computation may be bf16.

Parameters, gradient sums and optimizer state are fp32. In bf16 mode the model computes with a bf16 copy, written by
the optimizer after every update and never stored: bf16 keeps 8 bits of mantissa, too few to hold an update of a
thousandth of a weight (Micikevicius et al., "Mixed Precision Training", 2018, section 3.1). The gradients of the
micro-batches come out of the copy in bf16 and are summed in fp32. fp16 is the same with another copy, and a loss scale
beside it (`scaler.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketlm.model.arithmetic import Arithmetic, computing
from pocketlm.model.transformer import Transformer


class Precision:
    """A model's fp32 parameters and the model that computes: the same object in fp32, else a copy."""

    def __init__(self, model: Transformer, arithmetic: Arithmetic) -> None:
        self.model = model
        self.compute = computing(model, arithmetic)
        self._masters = dict(model.named_parameters())
        self._computed = dict(self.compute.named_parameters())

    @property
    def copies(self) -> dict[str, Tensor]:
        """The copy of each parameter, by name, in its shape; none in fp32.

        Whoever updates a parameter writes its copy too.
        """
        if self.compute is self.model:
            return {}
        return {name: self._unpadded(name, copied.detach()) for name, copied in self._computed.items()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter, by name, in its shape: fp32 sums, or the only micro-batch's own."""
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
