"""Everything that step k + 1 depends on, as one value that can be written down and read back.

Tensors: the parameters, the optimizer's moments, the guard's history and in fp16 the loss scale, by name. The rest is
state.json: how far the run is, the count of updates, the random states, what `auto` was resolved to, and the
fingerprints that say whether a resume continues the same computation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from pocketlm import checkpoint
from pocketlm.checkpoint import STATE
from pocketlm.config import Config
from pocketlm.data import order
from pocketlm.devices import in_use
from pocketlm.distributed import Ranks
from pocketlm.errors import FileError
from pocketlm.machine import versions
from pocketlm.model.sizes import CPU_CHUNK
from pocketlm.optim.optimizer import MOMENTS, Optimizer
from pocketlm.tensors import Shapes, read_tensors
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.training.guard import Guard, Trouble
from pocketlm.training.precision import Precision
from pocketlm.training.progress import Mark, Natural, Progress
from pocketlm.training.resolve import Resolved
from pocketlm.training.scaler import LossScaler

if TYPE_CHECKING:
    from pocketlm.training.sharding import SharedPrecision  # takes a second to import

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

    precision: Precision | SharedPrecision
    optimizer: Optimizer
    guard: Guard
    scaler: LossScaler | None = None
    """Only in fp16."""
    progress: Progress = field(default_factory=Progress)
    saved: Mark | None = None
    """The mark of the newest checkpoint that this process has read or written."""
    loss_chunk: int = CPU_CHUNK
    """Rows of logits alive at once, 0 for all."""

    def check_finite(self) -> None:
        """What is not finite is never evaluated, sampled from or saved.

        Raises:
            Trouble: a parameter or moment is infinite or not a number, on this rank or on another.
        """
        broken = self._broken()
        if self.ranks.most(bool(broken)):
            what = next(filter(None, self.ranks.gather(broken)))
            raise Trouble(f"after step {self.progress.step} {what} is not finite", self.progress)

    def _broken(self) -> str:
        """The first tensor that is not finite."""
        floats = {name: tensor for name, tensor in self._everything().items() if tensor.is_floating_point()}
        norms = torch._foreach_norm(list(floats.values()))  # as fast as memory; of finite ones it may overflow
        if torch.stack(norms).isfinite().all():
            return ""
        return next((name for name, tensor in floats.items() if not tensor.isfinite().all()), "")

    @property
    def ranks(self) -> Ranks:
        return self.precision.ranks

    def _everything(self) -> dict[str, Tensor]:
        """Every tensor of the state, of shared ones this rank's rows."""
        return self.precision.parameters | self.tensors()

    def tensors(self) -> dict[str, Tensor]:
        """The moments, the guard's history and the loss scale, by name; the tensors themselves."""
        return self.optimizer.tensors() | self.guard.tensors() | (self.scaler.tensors() if self.scaler else {})

    def scalars(self, **run: Any) -> dict[str, Any]:
        """The part that is no tensor; `run` are the fields of `Scalars` that this value does not know."""
        counted = {"updates": self.optimizer.updates, "random": random_states(), "versions": versions()}
        return Scalars.model_validate(self.progress.model_dump() | counted | run).model_dump(by_alias=True)

    def shapes(self) -> tuple[Shapes, Shapes]:
        """Names and shapes of the parameters and of the other tensors, of shared ones the whole."""
        parameters = self.precision.shapes
        others = {
            name: parameters.get(parameter_of(name), tuple(tensor.shape)) for name, tensor in self.tensors().items()
        }
        return parameters, others

    def rows(self) -> dict[str, range] | None:
        """This rank's rows of each shared tensor, parameters and moments; None where each rank has all."""
        if (shared := self.precision.shared) is None:
            return None
        names = (*self.precision.shapes, *self.tensors())
        parameters = {name: parameter_of(name) for name in names if parameter_of(name) in shared.shapes}
        return {name: shared.own(shared.shapes[parameter][0]) for name, parameter in parameters.items()}

    def begin(self, config: Config, micro_batch: int) -> None:
        """As before the first step: a function of the configuration, and of the rows at once."""
        seed_global_generators(config.train.seed)
        self.precision.begin(config.init, config.train.seed)
        self.optimizer.reset()
        self.guard.reset()
        if self.scaler:
            self.scaler.reset()
        self.progress, self.saved = Progress(micro_batch=micro_batch), None

    def take_weights(self, path: Path, tokenizer: Tokenizer) -> None:
        """Takes over the weights of a verified checkpoint, and nothing else of it.

        Raises:
            FileError: they are of another model, or of another tokenizer.
        """
        self.take(lambda: self._read_weights(path, tokenizer))

    def take(self, read: Callable[[], None]) -> None:
        """Takes over parameters: each rank that reads by itself writes what it has of them, the others get theirs."""
        self.ranks.each(lambda: read() if self._reads else None)
        self._spread(self.precision.parameters)
        self.precision.refresh()

    @torch.no_grad()
    def _read_weights(self, path: Path, tokenizer: Tokenizer) -> None:
        if (path / "tokenizer.json").read_text(encoding="utf-8") != tokenizer.without_begin().to_json():
            raise FileError(f"{path} has another tokenizer; add --data.tokenizer {path / 'tokenizer.json'}")
        weights = read_tensors(path / checkpoint.WEIGHTS, self.shapes()[0], [torch.float32], self.rows())
        for name, parameter in self.precision.parameters.items():
            parameter.copy_(weights[name])

    def load(self, path: Path, stored: Scalars) -> None:
        """Takes over a verified checkpoint: each rank its own rows, or all of it from rank 0, which alone reads it.

        Raises:
            FileError: it has tensors of other shapes or of another precision, or a random state that is none.
        """
        self.ranks.each(lambda: self._read(path, stored.updates) if self._reads else None)
        self.optimizer.adamw.updates.fill_(float(stored.updates))
        self._spread(self._everything())
        self.precision.refresh()
        self.progress = Progress(**{name: getattr(stored, name) for name in Progress.model_fields})
        self.saved = self.progress.mark
        restore_random_states(stored.random)

    @torch.no_grad()
    def _read(self, path: Path, updates: int) -> None:
        weights, others = checkpoint.restore(path, *self.shapes(), self.rows())
        everything = self._everything()
        for name, tensor in (weights | others).items():
            if tensor.dtype != (mine := everything[name].dtype):
                raise FileError(f"{name} is {tensor.dtype} in the checkpoint, {mine} here; give a new --out")
        for name, parameter in self.precision.parameters.items():
            parameter.copy_(weights[name])
        self.optimizer.load(others, updates)
        self.guard.load(others)
        if self.scaler:
            self.scaler.load(others)

    @property
    def _reads(self) -> bool:
        """Whether this rank reads a checkpoint by itself."""
        return self.ranks.is_first or self.precision.shared is not None

    def _spread(self, tensors: Mapping[str, Tensor]) -> None:
        """What rank 0 has read, on all ranks; rows are everybody's own."""
        if self.precision.shared is None:
            for tensor in tensors.values():
                self.ranks.spread(tensor)


def parameter_of(name: str) -> str:
    """The parameter that a tensor of the state is, or is a moment of: `exp_avg.model.norm.weight` is of the norm."""
    kind, _, parameter = name.partition(".")
    return parameter if kind in MOMENTS else name


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
    gpus = {kind: bytes(torch.get_device_module(kind).get_rng_state().numpy()).hex() for kind in in_use()}
    return gpus | {
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
        for gpu in set(in_use()) & states.keys():
            torch.get_device_module(gpu).set_rng_state(_bytes(states[gpu]))
        name, keys, index, has_gauss, cached = states["numpy"].split()
        words = np.frombuffer(bytes.fromhex(keys), dtype=np.uint32)
        np.random.set_state((name, words, int(index), int(has_gauss), float.fromhex(cached)))
        kind, *numbers, gauss = states["python"].split()
        random.setstate((int(kind), tuple(map(int, numbers)), None if gauss == "None" else float(gauss)))
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise FileError(f"{STATE} is damaged: its random states are none ({error})") from None


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
