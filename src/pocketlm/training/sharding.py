"""Parameters, gradients and moments shared among the ranks: each holds some rows of every tensor (FSDP2).

PyTorch's `fully_shard` puts a block's parameters together before the block computes, in the precision of the
computation, and gives its gradients, summed over the ranks in fp32, back to the rows that each rank holds (Zhao et al.,
"PyTorch FSDP", 2023; Rajbhandari et al., "ZeRO", 2020, section 5.3). So nothing beside the block at work is ever whole,
and there is no copy: the rule of `precision.py`, fp32 for what is kept and bf16 for what computes, is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pocketlm.config import InitConfig
from pocketlm.distributed import Ranks, Shared
from pocketlm.model.arithmetic import TORCH_DTYPES, Arithmetic
from pocketlm.model.init import initial_weights
from pocketlm.model.transformer import Transformer, allocate
from pocketlm.optim.clip import global_norm


class SharedPrecision:
    """As `Precision`, of a model whose rows the ranks share."""

    def __init__(self, model: Transformer, arithmetic: Arithmetic, ranks: Ranks, device: torch.device) -> None:
        """
        Args:
            model: on the CPU; a block at a time comes to the device, where each rank keeps its rows of it.
        """
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        model.use_attention(arithmetic.attention)
        _share(model, arithmetic, ranks, device)
        self.model = self.compute = model
        self.ranks = ranks
        self.shared = Shared(ranks, shapes)
        self._masters = {name: _rows_of(parameter) for name, parameter in model.named_parameters()}
        assert all(len(own) == len(self.shared.own(shapes[name][0])) for name, own in self._masters.items())

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self._masters)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in self.shared.shapes.items()}

    @property
    def copies(self) -> dict[str, Tensor]:
        """None: the blocks are put together in the precision of the computation."""
        return {}

    @torch.no_grad()
    def begin(self, init: InitConfig, seed: int) -> None:
        for name, weight in initial_weights(self.model.config, self.shared.shapes, init, seed):
            rows = self.shared.own(len(weight))
            self._masters[name].copy_(weight[rows.start : rows.stop])
        self.refresh()

    def whole(self, name: str) -> Tensor:
        return self.shared.whole(self._masters[name], self.shared.shapes[name][0])

    @torch.no_grad()
    def speaker(self) -> Transformer | None:
        speaker = allocate(self.model.config) if self.ranks.is_first else None
        places = dict(speaker.named_parameters()) if speaker else {}
        for name in self._masters:
            whole = self.whole(name)
            if speaker:
                places[name].copy_(whole)
        if speaker:
            speaker.document_end = self.model.document_end
        return speaker

    def gradients(self) -> dict[str, Tensor]:
        return {name: _rows_of(parameter.grad) for name, parameter in self.model.named_parameters()}

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        squares = global_norm(gradients.values()).square()
        self.ranks.add(squares)
        return squares.sqrt()

    def collect_gradients(self) -> None:
        """Nothing: each micro-batch's gradients are added to the rows' fp32 sums as they come."""

    def drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def refresh(self) -> None:
        """What was put together before is put together anew."""
        self.before_reading()

    def before_reading(self) -> None:
        self.model.reshard()  # type: ignore[operator]


def _share(model: Transformer, arithmetic: Arithmetic, ranks: Ranks, device: torch.device) -> None:
    """Leaves each rank its rows. Sums, not means: the loss has the scale of the whole step already."""
    mesh = init_device_mesh(device.type, (ranks.size,))
    dtype = None if arithmetic.dtype == "fp32" else TORCH_DTYPES[arithmetic.dtype]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")


def _rows_of(tensor: Tensor | None) -> Tensor:
    """What this rank holds of a parameter or of its gradient."""
    assert isinstance(tensor, DTensor)
    rows: Tensor = tensor.to_local()
    return rows.detach()
