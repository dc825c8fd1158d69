"""AdamW and Muon in float64 written anew, the groups, and the state that a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pocketlm.config import Config, OptimConfig
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer, allocate
from pocketlm.optim import adamw, muon
from pocketlm.optim.clip import clip_coefficient, global_norm
from pocketlm.optim.groups import split
from pocketlm.optim.muon import Muon, orthogonalize
from pocketlm.optim.optimizer import Optimizer

GO, SKIP = torch.tensor(False), torch.tensor(True)


CPU = torch.device("cpu")


def small_model(device: torch.device = CPU, **fields: object) -> tuple[Transformer, Config]:
    config = Config.preset("debug", {f"optim.{name}": value for name, value in fields.items()})
    model = allocate(config.model)
    init_weights(model, config.init, seed=0)
    return model.to(device), config


def random_gradients(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator).to(p.device) for name, p in model.named_parameters()}


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
def test_adamw_is_the_papers(decay: str, device: torch.device) -> None:
    go = GO.to(device)
    model, config = small_model(device, weight_decay=0.3, decay=decay)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = [1.0, 0.5, 0.8, 0.1, 0.3]
    gradients = [random_gradients(model, step) for step in range(len(factors))]
    ours = Optimizer(dict(model.named_parameters()), config.optim)
    for step, factor in enumerate(factors):
        ours.step(gradients[step], factor, step, 10, skip=go)
    rates = [config.optim.lr * factor for factor in factors]
    for name, parameter in model.named_parameters():
        rate = 0.3 if decay == "all" or "norm" not in name else 0.0
        there = [g[name].cpu() for g in gradients]
        truth = adamw_in_float64(start[name].cpu(), there, rates, rate, config.optim)
        torch.testing.assert_close(parameter.cpu().double(), truth, rtol=1e-6, atol=1e-8)


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
    ours = Muon({"w": mine}, {}, num_steps=5, weight_decay=0.1)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        ours.step({"w": gradient}, 0.02, 0.95, None, GO)
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
    whole = Optimizer(dict(model.named_parameters()), config.optim)
    whole.step(random_gradients(model, 0), 1.0, 0, 10, skip=GO)
    other, _ = small_model(kind=kind)
    resumed = Optimizer(dict(other.named_parameters()), config.optim)
    names = set(resumed.tensors())
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    resumed.load({name: tensor.clone() for name, tensor in whole.tensors().items()}, whole.updates)
    for step in range(1, 5):
        for m, o in ((model, whole), (other, resumed)):
            o.step(random_gradients(m, step), 0.7, step, 10, skip=GO)
    assert set(whole.tensors()) == names
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.goal("R13")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_skipped_update_changes_nothing_whatever_the_gradients_are(
    kind: str, value: float, device: torch.device
) -> None:
    model, config = small_model(device, kind=kind)
    go, skip = GO.to(device), SKIP.to(device)
    optimizer = Optimizer(dict(model.named_parameters()), config.optim)
    optimizer.step(random_gradients(model, 0), 1.0, 0, 10, skip=go)
    everything = dict(model.named_parameters()) | optimizer.tensors()
    before = {name: tensor.detach().clone() for name, tensor in everything.items()}
    broken = {name: torch.full_like(p, value) for name, p in model.named_parameters()}
    optimizer.step(broken, 1.0, 1, 10, skip=skip)
    assert optimizer.updates == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything.items())
    optimizer.step(random_gradients(model, 1), 1.0, 2, 10, skip=go)
    assert optimizer.updates == 2
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_update_in_small_passes_has_the_bits_of_one_in_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is PyTorch's kernel over whole tensors, by way of passes that hold the largest of them."""
    runs = []
    for most in (2**30, 1000, 64):
        monkeypatch.setattr(adamw, "CACHED_VALUES", most)
        model, config = small_model(kind=kind, weight_decay=0.3)
        optimizer = Optimizer(dict(model.named_parameters()), config.optim)
        for step in range(3):
            clip = torch.tensor(0.25) if step == 1 else None
            optimizer.step(random_gradients(model, step), 1.0, step, 10, skip=GO, clip=clip)
        runs.append(dict(model.named_parameters()) | optimizer.tensors())
    for other in runs[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in runs[0].items())


def test_what_is_clipped_is_what_pytorch_clips() -> None:
    model, _ = small_model(clip=0.5)
    gradients = random_gradients(model, 0)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    their_norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.testing.assert_close(global_norm(gradients.values()), their_norm)
    coefficient = clip_coefficient(their_norm, 0.5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(gradients[name] * coefficient, parameter.grad)
    assert clip_coefficient(torch.tensor(0.4), 0.5) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_values_is_exact(dtype: torch.dtype) -> None:
    """Where PyTorch's own is 1e-4 too small."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(8192, 1024, generator=generator).to(dtype), torch.randn(1024, generator=generator)]
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert abs(global_norm(gradients) / exact - 1) < 1e-6


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("skip", [GO, SKIP])
def test_a_bf16_copy_is_what_the_parameters_round_to(kind: str, skip: torch.Tensor, device: torch.device) -> None:
    model, config = small_model(device, kind=kind)
    copies = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    gradients = {name: g.bfloat16() for name, g in random_gradients(model, 0).items()}
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    optimizer = Optimizer(dict(model.named_parameters()), config.optim, copies)
    optimizer.step(gradients, 1.0, 0, 10, skip=skip.to(device), clip=torch.tensor(0.5, device=device))
    assert all(torch.equal(copies[name], p.bfloat16()) for name, p in model.named_parameters())
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients.items())


def test_muon_gives_the_same_in_batches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for most in (2**23, 1):
        monkeypatch.setattr(muon, "BATCH_VALUES", most)
        model, config = small_model(kind="muon")
        optimizer = Optimizer(dict(model.named_parameters()), config.optim)
        for step in range(2):
            optimizer.step(random_gradients(model, step), 1.0, step, 10, skip=GO)
        runs.append(dict(model.named_parameters()))
    for name, whole in runs[0].items():
        torch.testing.assert_close(whole, runs[1][name], rtol=1e-3, atol=1e-4, msg=name)
