"""A step's gradient is the same however the step is cut into micro-batches; the oracle is float64 on the whole batch.

The gradient is read from a checkpoint: after one step of AdamW the first moment is (1 - beta1) x the gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.data.loader import Loader
from pocketlm.data.prepare import prepare
from pocketlm.data.shards import open_dataset
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate
from pocketlm.training import resolve
from pocketlm.training.loop import train

ROWS = 8
BASE = {
    "optim.kind": "adamw",
    "optim.clip": None,
    "train.total_steps": 1,
    "train.tokens_per_step": ROWS * 32,
    "train.threads": 1,
    "train.loss_chunk": 0,
}


def config_of(micro_batch: int, **fields: Any) -> Config:
    return Config.preset("debug", BASE | {"train.micro_batch": micro_batch} | fields)


def trained_gradient(config: Config) -> dict[str, Tensor]:
    """The gradient of a run's only step, by parameter."""
    run = train(config, out=Path(f"run-{config.train.micro_batch}"))
    moments = load_file(checkpoint.list_checkpoints(run)[-1] / checkpoint.OPTIMIZER)
    kind = "exp_avg."
    scale = 1 - config.optim.betas[0]
    return {name.removeprefix(kind): moments[name] / scale for name in moments if name.startswith(kind)}


def exact_gradient(config: Config) -> dict[str, Tensor]:
    """The same in float64: the mean over all targets of the step at once, from whole logits."""
    dataset = open_dataset(prepare(config.data, progress=lambda text: None))
    batch = Loader(dataset.train, config.data.context, config.train.seed, config.data.order).read(0, ROWS)
    model = allocate(config.model)
    init_weights(model, config.init, config.train.seed)
    model.double()
    F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient, in the Euclidean norm."""
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()).item() for name in ours
    )


@pytest.mark.goal("R15")
@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_accumulated_is_whole(num_parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    whole, cut = config_of(ROWS), config_of(-(-ROWS // num_parts))  # 3 parts: 3 + 3 + 2 rows
    exact = exact_gradient(whole)
    ours, accumulated = trained_gradient(whole), trained_gradient(cut)
    assert distance(ours, exact) < 1e-6
    assert distance(accumulated, exact) < 1e-6
    assert distance(accumulated, ours) < 1e-6
