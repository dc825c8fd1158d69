"""Everything that step k + 1 depends on, as one value that can be written down and read back.

Tensors: the parameters and the optimizer's moments, by name. The rest is JSON: the schedule's step, the position in
the order, the count of updates, tokens seen, the smoothed loss, the random states, what `auto` was resolved to, and
the fingerprints that say whether a resume continues the same computation.
"""

from __future__ import annotations

import math
import platform
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketlm import __version__, checkpoint
from pocketlm.checkpoint import Restored
from pocketlm.data import order
from pocketlm.errors import Diverged, FileError
from pocketlm.optim.optimizer import Optimizer
from pocketlm.tensors import Shapes
from pocketlm.training.precision import Precision

SCHEMA = 1
SMOOTHING = 0.95


@dataclass
class TrainState:
    """A run between two steps."""

    precision: Precision
    optimizer: Optimizer
    step: int = 0
    """Updates scheduled; the schedule's clock."""
    position: int = 0
    """Rows consumed; the order's clock."""
    tokens: int = 0
    """Tokens trained on."""
    smoothed_loss: float | None = None
    """Exponential mean of the training loss."""
    elapsed_s: float = 0.0
    """Seconds of training so far, over all resumes."""

    def smooth(self, loss: float) -> None:
        """Takes a step's loss into the smoothed loss."""
        before = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = SMOOTHING * before + (1 - SMOOTHING) * loss

    def check_finite(self) -> None:
        """What is not finite is never evaluated, sampled from or saved.

        Raises:
            Diverged: a parameter or moment is infinite or not a number.
        """
        tensors = dict(self.precision.model.named_parameters()) | self.optimizer.tensors()
        norms = torch._foreach_norm([tensor.detach() for tensor in tensors.values()], math.inf)
        broken = [name for name, norm in zip(tensors, norms, strict=True) if not math.isfinite(norm.item())]
        if broken:
            raise Diverged(
                f"after step {self.step} {broken[0]} is not finite; what was saved before stands; "
                f"try a lower --optim.lr in a new --out"
            )

    def scalars(self) -> dict[str, Any]:
        """The part that is no tensor."""
        return {
            "schema": SCHEMA,
            "order_version": order.VERSION,
            "step": self.step,
            "position": self.position,
            "tokens": self.tokens,
            "updates": self.optimizer.updates,
            "smoothed_loss": self.smoothed_loss,
            "elapsed_s": self.elapsed_s,
            "random": random_states(),
            "versions": versions(),
        }

    def shapes(self) -> tuple[Shapes, Shapes]:
        """Names and shapes of the parameters and of the moments."""
        parameters = self.precision.model.named_parameters()
        return (
            {name: tuple(tensor.shape) for name, tensor in parameters},
            {name: tuple(tensor.shape) for name, tensor in self.optimizer.tensors().items()},
        )

    @torch.no_grad()
    def load(self, restored: Restored) -> None:
        """Takes over a checkpoint whose version and shapes were checked."""
        state = restored.state
        for name, parameter in self.precision.model.named_parameters():
            parameter.copy_(restored.weights[name])
        self.precision.refresh()
        self.optimizer.load(restored.optimizer, state["updates"])
        self.step, self.position, self.tokens = state["step"], state["position"], state["tokens"]
        self.smoothed_loss, self.elapsed_s = state["smoothed_loss"], state["elapsed_s"]
        restore_random_states(state["random"])


def read_state(path: Path) -> dict[str, Any]:
    """The scalars of a verified checkpoint.

    Raises:
        FileError: written by a version that this one cannot continue.
    """
    state = checkpoint.read_state(path)
    for key, mine in (("schema", SCHEMA), ("order_version", order.VERSION)):
        if state.get(key) != mine:
            raise FileError(f"{path}: its {key} is {state.get(key)}, this pocketlm has {mine}; give a new --out")
    return state


def seed_global_generators(seed: int) -> None:
    """Training draws from none of them, but what a user adds may: so they begin alike in every equal run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, str]:
    """The states of the global generators as text."""
    kind, words, gauss = random.getstate()[0], random.getstate()[1], random.getstate()[2]
    name, keys, index, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "numpy": f"{name} {np.asarray(keys).tobytes().hex()} {index} {has_gauss} {float(cached).hex()}",
        "python": f"{kind} {' '.join(map(str, words))} {gauss}",
    }


def restore_random_states(states: dict[str, str]) -> None:
    """Puts the global generators back."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    name, keys, index, has_gauss, cached = states["numpy"].split()
    np.random.set_state(
        (name, np.frombuffer(bytes.fromhex(keys), dtype=np.uint32), int(index), int(has_gauss), float.fromhex(cached))
    )
    kind, *words, gauss = states["python"].split()
    random.setstate((int(kind), tuple(map(int, words)), None if gauss == "None" else float(gauss)))


def versions() -> dict[str, str]:
    """The libraries whose arithmetic a bit-exact resume rests on."""
    return {
        "pocketlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
