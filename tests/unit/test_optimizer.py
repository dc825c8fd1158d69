"""AdamW and Muon in float64 written anew, the groups, and the state that a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pocketlm.config import Config, OptimConfig
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer, allocate
from pocketlm.optim.groups import split
from pocketlm.optim.muon import Muon, orthogonalize
from pocketlm.optim.optimizer import Optimizer

GO, SKIP = torch.tensor(False), torch.tensor(True)


def small_model(**fields: object) -> tuple[Transformer, Config]:
    config = Config.preset("debug", {f"optim.{name}": value for name, value in fields.items()})
    model = allocate(config.model)
    init_weights(model, config.init, seed=0)
    return model, config


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_groups_cover_the_model_once() -> None:
    model, config = small_model(kind="muon")
    groups = split(dict(model.named_parameters()), config.optim)
    names = [*groups.muon, *groups.decayed, *groups.not_decayed]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert all(".layers." in name and name.endswith("_proj.weight") for name in groups.muon)
    assert groups.decayed == ("model.embed_tokens.weight",)
    assert all("norm" in name for name in groups.not_decayed)


def test_decay_all_takes_norms_too() -> None:
    model, config = small_model(decay="all")
    assert split(dict(model.named_parameters()), config.optim).not_decayed == ()


def adamw_in_float64(
    start: torch.Tensor, gradients: list[torch.Tensor], rates: list[float], decay: float, config: OptimConfig
) -> torch.Tensor:
    """Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, Algorithm 2; alpha is 1, eta_t the rate."""
    (beta1, beta2), theta = config.betas, start.double()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, (gradient, eta) in enumerate(zip(gradients, rates, strict=True), 1):
        g = gradient.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - eta * (m_hat / (v_hat.sqrt() + config.eps) + decay * theta)
    return theta


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adamw_is_the_papers(decay: str) -> None:
    model, config = small_model(weight_decay=0.3, decay=decay)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in start}
    factors = [1.0, 0.5, 0.8, 0.1, 0.3]
    ours = Optimizer(model, config.optim)
    for step, factor in enumerate(factors):
        fill_gradients(model, step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad.clone())
        ours.step(factor, step, 10, GO)
    rates = [config.optim.lr * factor for factor in factors]
    for name, parameter in model.named_parameters():
        rate = 0.3 if decay == "all" or "norm" not in name else 0.0
        truth = adamw_in_float64(start[name], gradients[name], rates, rate, config.optim)
        torch.testing.assert_close(parameter.double(), truth, rtol=1e-6, atol=1e-8)


def muon_in_float64(
    start: torch.Tensor, gradients: list[torch.Tensor], lr: float, mu: float, decay: float
) -> torch.Tensor:
    """The formulas of optim/muon.py, in float64 and one matrix at a time."""
    w, m = start.double(), torch.zeros_like(start).double()
    for gradient in gradients:
        g = gradient.double()
        m = mu * m + (1 - mu) * g
        x = (1 - mu) * g + mu * m
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T if x.size(0) <= x.size(1) else x.T @ x
            poly = -4.7750 * a + 2.0315 * a @ a
            x = 3.4445 * x + (poly @ x if x.size(0) <= x.size(1) else x @ poly)
        w = (1 - lr * decay) * w - lr * max(1, w.size(0) / w.size(1)) ** 0.5 * x
    return w


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 64)])
def test_muon_is_as_near_to_float64_as_pytorchs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    truth = muon_in_float64(start, gradients, 0.02, 0.95, 0.1)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5)
    ours = Muon({"w": mine}, num_steps=5, weight_decay=0.1)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step(0.02, 0.95, GO)
        reference.step()
    moved = (truth - start).norm()
    error, their_error = ((w.detach() - truth).norm() / moved for w in (mine, theirs))
    assert error < 1.2 * their_error  # both run Newton-Schulz in bf16
    assert error < 0.03


def test_orthogonalize_pushes_singular_values_towards_one() -> None:
    torch.manual_seed(0)
    out = orthogonalize(torch.randn(3, 64, 32), num_steps=5)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_taken_up_again_goes_on_bit_for_bit(kind: str) -> None:
    model, config = small_model(kind=kind)
    whole = Optimizer(model, config.optim)
    fill_gradients(model, 0)
    whole.step(1.0, 0, 10, GO)
    other, _ = small_model(kind=kind)
    resumed = Optimizer(other, config.optim)
    names = set(resumed.tensors())
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    resumed.load({name: tensor.clone() for name, tensor in whole.tensors().items()}, whole.updates)
    for step in range(1, 5):
        for m, o in ((model, whole), (other, resumed)):
            fill_gradients(m, step)
            o.step(0.7, step, 10, GO)
    assert set(whole.tensors()) == names
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.goal("R13")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_skipped_update_changes_nothing_whatever_the_gradients_are(kind: str, value: float) -> None:
    model, config = small_model(kind=kind)
    optimizer = Optimizer(model, config.optim)
    fill_gradients(model, 0)
    optimizer.step(1.0, 0, 10, GO)
    everything = dict(model.named_parameters()) | optimizer.tensors()
    before = {name: tensor.detach().clone() for name, tensor in everything.items()}
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(value)
    optimizer.step(1.0, 1, 10, SKIP)
    assert optimizer.updates == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything.items())
    fill_gradients(model, 1)
    optimizer.step(1.0, 2, 10, GO)
    assert optimizer.updates == 2
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
