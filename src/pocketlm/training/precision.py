"""fp32 is the truth; the computation may be bf16.

Parameters, gradient sums and optimizer state are fp32. In bf16 mode the model computes with a bf16 copy, written by
the optimizer after every update and never stored: bf16 keeps 8 bits of mantissa, too few to hold an update of a
thousandth of a weight (Micikevicius et al., "Mixed Precision Training", 2018, section 3.1). The gradients of the
micro-batches come out of the copy in bf16 and are summed in fp32. fp16 is the same with another copy, and a loss scale
beside it (`scaler.py`).

Several ranks that each hold all of it sum their gradients in fp32 (`Precision`). Ranks that share it (`sharding.py`)
hold some rows of everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pocketlm.config import InitConfig
from pocketlm.distributed import ALONE, Ranks, Shared
from pocketlm.model.arithmetic import Arithmetic, computing
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer
from pocketlm.optim.clip import global_norm

BUCKET_VALUES = 2**23
"""Of gradients that are summed over the ranks at once: 32 MiB, enough that no time is lost in between."""


class Precision:
    """A model's fp32 parameters and the model that computes: the same object in fp32, else a copy."""

    shared: Shared | None = None
    """How the ranks share its rows: here each holds all of them."""

    def __init__(self, model: Transformer, arithmetic: Arithmetic, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.compute = computing(model, arithmetic)
        self.ranks = ranks
        self._masters = dict(model.named_parameters())
        self._computed = dict(self.compute.named_parameters())
        self._sums = None if ranks.alone else Sums(self._masters)
        self._are_apart = False
        """In fp32, whether the gradients of this step have been moved out of what the backward pass has freed."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The fp32 parameters by name, of shared ones this rank's rows; the tensors themselves."""
        return {name: parameter.detach() for name, parameter in self._masters.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole parameters, by name."""
        return {name: tuple(parameter.shape) for name, parameter in self._masters.items()}

    def begin(self, init: InitConfig, seed: int) -> None:
        """The parameters before the first step."""
        init_weights(self.model, init, seed)
        self.refresh()

    def whole(self, name: str) -> Tensor:
        """A whole parameter, in fp32."""
        return self._masters[name].detach()

    def speaker(self) -> Transformer | None:
        """A model of the whole parameters in fp32, to write samples with; None where another rank has it."""
        return self.model if self.ranks.is_first else None

    @property
    def copies(self) -> dict[str, Tensor]:
        """The copy of each parameter, by name, in its shape; none in fp32.

        Whoever updates a parameter writes its copy too.
        """
        if self.compute is self.model:
            return {}
        return {name: self._unpadded(name, copied.detach()) for name, copied in self._computed.items()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter, by name, in its shape: fp32 sums, or the only micro-batch's own.

        Of several ranks, their sum.
        """
        own = self._gradients()
        return own if self._sums is None else self._sums.of(own, self.ranks)

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The Euclidean norm of all gradients as one vector: () fp32."""
        return global_norm(gradients.values())

    def _gradients(self) -> dict[str, Tensor]:
        gradients = {}
        for name, master in self._masters.items():
            gradient = self._computed[name].grad if master.grad is None else master.grad
            assert gradient is not None, name
            gradients[name] = self._unpadded(name, gradient)
        return gradients

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After each micro-batch of several: adds the copy's gradients to the parameters' fp32 sums.

        In fp32 autograd has summed them already. It has made them between activations, and there they would stay: what
        is free around them is in pieces that the next micro-batch does not fit into. So the first ones are moved.
        """
        if self.compute is self.model:
            if not self._are_apart:
                for parameter in self._masters.values():
                    assert parameter.grad is not None
                    if parameter.device.type == "cpu":
                        parameter.grad = parameter.grad.clone()
                self._are_apart = True
            return
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
        self._are_apart = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copy anew from parameters that something else than the optimizer has written."""
        if copies := self.copies:
            torch._foreach_copy_(list(copies.values()), [self._masters[name] for name in copies])

    def before_reading(self) -> None:
        """Called before the model computes with what was read or written since; here there is nothing to do."""

    def _unpadded(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[: self._masters[name].shape[0]]


class Sums:
    """fp32 sums over the ranks of every parameter's gradient, in buffers that are kept.

    Not DistributedDataParallel: it puts gradients into buckets anew after the first step of each process, so that the
    sums of four ranks round otherwise after a resume (docs/decisions/022-sums-over-ranks.md).
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._buckets = [
            (names, torch.empty(sum(parameters[name].numel() for name in names), device=parameters[names[0]].device))
            for names in _buckets(parameters)
        ]

    def of(self, gradients: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        """Their sums, in the shapes of the gradients; the next call writes over them."""
        sums: dict[str, Tensor] = {}
        for names, bucket in self._buckets:
            parts = torch.split(bucket, [gradients[name].numel() for name in names])
            views = [part.view(gradients[name].shape) for name, part in zip(names, parts, strict=True)]
            torch._foreach_copy_(views, [gradients[name] for name in names])
            ranks.add(bucket)
            sums |= dict(zip(names, views, strict=True))
        return sums


def _buckets(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of parameters that are summed at once: the fewest with BUCKET_VALUES together."""
    names, values = list[str](), 0
    for name, parameter in parameters.items():
        names.append(name)
        values += parameter.numel()
        if values >= BUCKET_VALUES:
            yield names
            names, values = [], 0
    if names:
        yield names
