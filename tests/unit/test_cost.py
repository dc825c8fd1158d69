"""What a training step costs, counted and not timed: operations, casts, and bytes moved for each parameter.

PyTorch shows a `TorchDispatchMode` every operation of forward pass, backward pass and update. Counts do not depend on
the machine or its load, so one cast more in a layer or one pass more over the parameters fails here, and seconds do
not. To be fewer is no failure: then, and where more is meant, record the figures that the assertion's message gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pocketlm.config import Config
from pocketlm.data.loader import Loader
from pocketlm.machine import Runtime
from pocketlm.training.resolve import resolve
from pocketlm.training.run import new_state
from pocketlm.training.state import TrainState
from pocketlm.training.step import train_step


@dataclass(frozen=True)
class Cost:
    """Of one optimizer step in eager mode."""

    layer_ops: int
    """Operations that one layer more adds: views and allocations do no work and do not count."""
    layer_casts: int
    """Tensors that one layer more casts to another dtype, its weights' copies included."""
    micro_batch_ops: int
    """Operations that one micro-batch more adds, with two layers."""
    step_ops: int
    """Operations of a step of one micro-batch, with two layers."""
    step_casts: int
    bytes_per_parameter: float
    """Read and written for each parameter of the MLPs, the products included, in a step of two tokens."""


CASES: dict[str, dict[str, Any]] = {
    "llama, fp32": {"train.dtype": "fp32"},
    "llama, bf16": {"train.dtype": "bf16"},
    "smallm, bf16": {"train.dtype": "bf16", "model.block": "parallel", "model.position": "learned"},
    "tiny, bf16": {"train.dtype": "bf16", "optim.kind": "muon", "model.qk_norm": True},
}

RECORDED = {  # with torch 2.13.0
    "llama, fp32": Cost(140, 0, 383, 416, 3, 58.6),
    "llama, bf16": Cost(157, 36, 395, 470, 95, 63.5),
    "smallm, bf16": Cost(113, 26, 299, 373, 73, 63.5),
    "tiny, bf16": Cost(241, 56, 503, 755, 143, 183.5),
}

Spoil = Callable[[TrainState], None]


class Ledger(TorchDispatchMode):
    """Counts what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.casts = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.name():
            return result
        given = list(tensors([args, kwargs]))
        written = [tensor for value in changed(func, args, kwargs or {}) for tensor in tensors(value)]
        made = [tensor for tensor in tensors(result) if all(tensor is not old for old in given)]
        self.ops += 1
        self.bytes += sum(tensor.nbytes for tensor in [*given, *written, *made])
        if func.name().startswith(("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")):
            sources, targets = (tensors(args[1]), tensors(args[0])) if len(args) > 1 else (given, made)
            self.casts += sum(old.dtype != new.dtype for old, new in zip(sources, targets, strict=True))
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    """Those inside lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to, as its schema says."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


class Tokens:
    """A stream of drawn ids."""

    complete = True

    def __init__(self, vocab_size: int) -> None:
        self.ids = np.random.default_rng(0).integers(0, vocab_size, 4096)
        self.num_tokens = len(self.ids)
        self.piece_starts = [0, self.num_tokens]

    def read(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length]


def counted(spoil: Spoil, fields: dict[str, Any]) -> tuple[Ledger, int]:
    """The second step of `debug` with other fields, after `spoil` has been at its state; and its parameters."""
    fast = {"train.micro_batch": 4, "train.tokens_per_step": 4 * 32, "train.attention": "folded"}
    config = Config.preset("debug", fast | fields)
    runtime = Runtime(torch.device("cpu"), torch.get_num_threads(), "off")
    resolved = resolve(config, runtime)
    state = new_state(config, resolved, runtime)
    loader = Loader(Tokens(config.model.vocab_size), config.data.context, 0, "global")
    spoil(state)
    train_step(state, loader, config, resolved.micro_batch)
    with Ledger() as ledger:
        train_step(state, loader, config, resolved.micro_batch)
    return ledger, sum(parameter.numel() for parameter in state.precision.model.parameters())


def cost(fields: dict[str, Any], spoil: Spoil = lambda state: None) -> Cost:
    two, _ = counted(spoil, fields)
    three, _ = counted(spoil, fields | {"model.num_hidden_layers": 3})
    twice, _ = counted(spoil, fields | {"train.micro_batch": 2})
    few = fields | {"data.context": 2, "train.tokens_per_step": 2}
    narrow, fewer = counted(spoil, few)
    wide, more = counted(spoil, few | {"model.intermediate_size": 128})
    return Cost(
        layer_ops=three.ops - two.ops,
        layer_casts=three.casts - two.casts,
        micro_batch_ops=twice.ops - two.ops,
        step_ops=two.ops,
        step_casts=two.casts,
        bytes_per_parameter=round((wide.bytes - narrow.bytes) / (more - fewer), 1),
    )


def dearer(found: Cost, recorded: Cost) -> set[str]:
    """The figures that have risen."""
    return {name for name, value in asdict(found).items() if value > getattr(recorded, name)}


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a product costs here is not the question."""
    monkeypatch.setattr("pocketlm.training.resolve.PROBE_S", 0.01)


@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_no_more_than_recorded(case: str) -> None:
    found = cost(CASES[case])
    assert not dearer(found, RECORDED[case]), f'"{case}": {found}'


def test_a_cast_more_in_each_layer_is_seen() -> None:
    def there_and_back(block: Any, inputs: Any, x: Tensor) -> Tensor:
        return x.double().to(x.dtype)

    def spoil(state: TrainState) -> None:
        for block in state.precision.compute.model.layers:
            block.register_forward_hook(there_and_back)

    assert {"layer_casts", "layer_ops"} <= dearer(cost(CASES["llama, bf16"], spoil), RECORDED["llama, bf16"])


def test_a_pass_more_over_the_parameters_is_seen() -> None:
    def spoil(state: TrainState) -> None:
        update = state.optimizer.step

        def twice(*args: Any, **kwargs: Any) -> None:
            torch._foreach_mul_([parameter.detach() for parameter in state.precision.model.parameters()], 1.0)
            update(*args, **kwargs)

        state.optimizer.step = twice  # type: ignore[method-assign]

    assert "bytes_per_parameter" in dearer(cost(CASES["llama, bf16"], spoil), RECORDED["llama, bf16"])
