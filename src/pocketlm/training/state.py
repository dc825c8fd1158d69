"""Everything that step k + 1 depends on, as one value that can be written down and read back.

Tensors: the parameters, the optimizer's moments, the guard's history and in fp16 the loss scale, by name. The rest is
state.json: how far the run is, the count of updates, the random states, what `auto` was resolved to, and the
fingerprints that say whether a resume continues the same computation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from pocketlm import checkpoint
from pocketlm.checkpoint import STATE, Restored
from pocketlm.config import Config
from pocketlm.data import order
from pocketlm.errors import FileError
from pocketlm.machine import versions
from pocketlm.model.init import init_weights
from pocketlm.optim.optimizer import Optimizer
from pocketlm.tensors import Shapes, read_tensors
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.training.guard import Guard, Trouble
from pocketlm.training.precision import Precision
from pocketlm.training.progress import Mark, Natural, Progress
from pocketlm.training.resolve import Resolved
from pocketlm.training.scaler import LossScaler

SCHEMA = 3


class Scalars(Progress):
    """state.json."""

    schema_number: int = Field(SCHEMA, alias="schema")
    order_version: int = order.VERSION
    updates: Natural
    """Updates applied."""
    regular: bool
    """Whether the checkpoint was due at this step; one that a signal or `stop_at_step` made is not."""
    records: Natural
    """Lines of the journal."""
    journal_sha256: str
    """Of those lines."""
    random: dict[str, str]
    """States of the global generators."""
    versions: dict[str, str]
    data_fingerprint: str
    resolved: Resolved


@dataclass
class TrainState:
    """A run between two steps."""

    precision: Precision
    optimizer: Optimizer
    guard: Guard
    scaler: LossScaler | None = None
    """Only in fp16."""
    progress: Progress = field(default_factory=Progress)
    saved: Mark | None = None
    """The mark of the newest checkpoint that this process has read or written."""

    def check_finite(self) -> None:
        """What is not finite is never evaluated, sampled from or saved.

        Raises:
            Trouble: a parameter or moment is infinite or not a number.
        """
        tensors = dict(self.precision.model.named_parameters()) | self.tensors()
        floats = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
        norms = torch._foreach_norm(list(floats.values()))  # as fast as memory; of finite ones it may overflow
        if torch.stack(norms).isfinite().all():
            return
        broken = next((name for name, tensor in floats.items() if not tensor.isfinite().all()), None)
        if broken:
            raise Trouble(f"after step {self.progress.step} {broken} is not finite", self.progress)

    def tensors(self) -> dict[str, Tensor]:
        """The moments, the guard's history and the loss scale, by name; the tensors themselves."""
        return self.optimizer.tensors() | self.guard.tensors() | (self.scaler.tensors() if self.scaler else {})

    def scalars(self, **run: Any) -> dict[str, Any]:
        """The part that is no tensor; `run` are the fields of `Scalars` that this value does not know."""
        counted = {"updates": self.optimizer.updates, "random": random_states(), "versions": versions()}
        return Scalars.model_validate(self.progress.model_dump() | counted | run).model_dump(by_alias=True)

    def shapes(self) -> tuple[Shapes, Shapes]:
        """Names and shapes of the parameters and of the other tensors."""
        parameters = self.precision.model.named_parameters()
        return (
            {name: tuple(tensor.shape) for name, tensor in parameters},
            {name: tuple(tensor.shape) for name, tensor in self.tensors().items()},
        )

    def begin(self, config: Config, micro_batch: int) -> None:
        """As before the first step: a function of the configuration, and of the rows at once."""
        seed_global_generators(config.train.seed)
        init_weights(self.precision.model, config.init, config.train.seed)
        self.precision.refresh()
        self.optimizer.reset()
        self.guard.reset()
        if self.scaler:
            self.scaler.reset()
        self.progress, self.saved = Progress(micro_batch=micro_batch), None

    @torch.no_grad()
    def take_weights(self, path: Path, tokenizer: Tokenizer) -> None:
        """Takes over the weights of a verified checkpoint, and nothing else of it.

        Raises:
            FileError: they are of another model, or of another tokenizer.
        """
        if (path / "tokenizer.json").read_text(encoding="utf-8") != tokenizer.to_json():
            raise FileError(f"{path} has another tokenizer; add --data.tokenizer {path / 'tokenizer.json'}")
        weights = read_tensors(path / checkpoint.WEIGHTS, self.shapes()[0], [torch.float32])
        for name, parameter in self.precision.model.named_parameters():
            parameter.copy_(weights[name])
        self.precision.refresh()

    @torch.no_grad()
    def load(self, restored: Restored) -> None:
        """Takes over a checkpoint whose shapes were checked.

        Raises:
            FileError: tensors of another precision, or a random state that is none.
        """
        scalars = Scalars.model_validate(restored.state)
        mine = dict(self.precision.model.named_parameters()) | self.tensors()
        for name, tensor in (restored.weights | restored.optimizer).items():
            if tensor.dtype != mine[name].dtype:
                raise FileError(
                    f"{name} is {tensor.dtype} in the checkpoint, {mine[name].dtype} here; give a new --out"
                )
        for name, parameter in self.precision.model.named_parameters():
            parameter.copy_(restored.weights[name])
        self.precision.refresh()
        self.optimizer.load(restored.optimizer, scalars.updates)
        self.guard.load(restored.optimizer)
        if self.scaler:
            self.scaler.load(restored.optimizer)
        self.progress = Progress(**{name: getattr(scalars, name) for name in Progress.model_fields})
        self.saved = self.progress.mark
        restore_random_states(scalars.random)


def read_state(path: Path) -> Scalars:
    """The scalars of a verified checkpoint.

    Raises:
        FileError: written by a version that this one cannot continue, or not a state.
    """
    tree = checkpoint.read_state(path)
    for key, mine in (("schema", SCHEMA), ("order_version", order.VERSION)):
        if tree.get(key) != mine:
            raise FileError(f"{path}: its {key} is {tree.get(key)}, this pocketlm has {mine}; give a new --out")
    try:
        return Scalars.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"]))
        raise FileError(f"{path / STATE} is damaged: {field_name}: {first['msg'].lower()}") from None


def seed_global_generators(seed: int) -> None:
    """Training draws from none of them, but what a user adds may: so they begin alike in every equal run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, str]:
    """The states of the global generators as text."""
    kind, words, gauss = random.getstate()[0], random.getstate()[1], random.getstate()[2]
    name, keys, index, has_gauss, cached = np.random.get_state(legacy=True)
    gpu = {"cuda": bytes(torch.cuda.get_rng_state().numpy()).hex()} if torch.cuda.is_available() else {}
    return gpu | {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "numpy": f"{name} {np.asarray(keys).tobytes().hex()} {index} {has_gauss} {float(cached).hex()}",
        "python": f"{kind} {' '.join(map(str, words))} {gauss}",
    }


def restore_random_states(states: dict[str, str]) -> None:
    """Puts the global generators back.

    Raises:
        FileError: what they are given is none of their states.
    """
    try:
        torch.set_rng_state(_bytes(states["torch"]))
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.set_rng_state(_bytes(states["cuda"]))
        name, keys, index, has_gauss, cached = states["numpy"].split()
        words = np.frombuffer(bytes.fromhex(keys), dtype=np.uint32)
        np.random.set_state((name, words, int(index), int(has_gauss), float.fromhex(cached)))
        kind, *numbers, gauss = states["python"].split()
        random.setstate((int(kind), tuple(map(int, numbers)), None if gauss == "None" else float(gauss)))
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise FileError(f"{STATE} is damaged: its random states are none ({error})") from None


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
