"""The chunked loss against F.cross_entropy of whole logits, and its gradients against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.model.loss import linear_cross_entropy, token_losses

N, C, V = 7, 5, 11
IGNORE = -100
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 1.5}, {"num_ids": 8}, {"softcap": 0.7, "num_ids": 9}]


CPU = torch.device("cpu")


def rows(
    dtype: torch.dtype = torch.float64, num_ids: int = V, device: torch.device = CPU
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, head and targets, two of the targets ignored; logits of order one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(num_ids, (N,), generator=generator)
    targets[[2, 6]] = IGNORE
    x, head, targets = (made.to(device) for made in (x, head, targets))
    return x.requires_grad_(), head.requires_grad_(), targets


def plain(x: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, num_ids: int | None = None) -> Tensor:
    """Summed nats by whole logits."""
    logits = x @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits[:, :num_ids], targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 100])
def test_value_and_gradients_are_those_of_whole_logits(options: dict[str, Any], chunk: int) -> None:
    x, head, targets = rows(num_ids=options.get("num_ids", V))
    loss = linear_cross_entropy(x, head, targets, scale=0.2, chunk=chunk, **options)
    expected = 0.2 * plain(x, head, targets, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = torch.autograd.grad(loss, (x, head)), torch.autograd.grad(expected, (x, head))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_finite_differences(options: dict[str, Any]) -> None:
    x, head, targets = rows(num_ids=options.get("num_ids", V))
    assert torch.autograd.gradcheck(
        lambda x, head: linear_cross_entropy(x, head, targets, scale=0.3, chunk=3, **options), (x, head)
    )


def test_fp32_with_one_chunk_is_a_rounding_away_from_torch() -> None:
    x, head, targets = rows(torch.float32)
    loss = linear_cross_entropy(x, head, targets, scale=1 / 5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(x, head, targets) / 5, rtol=1e-6, atol=0)


def test_incoming_gradient_and_the_scale_multiply() -> None:
    x, head, targets = rows()
    plain_loss = linear_cross_entropy(x, head, targets, scale=1.0, chunk=2)
    expected = [12 * g for g in torch.autograd.grad(plain_loss, (x, head))]
    for scale in (4.0, torch.tensor(4.0), torch.tensor(4.0, dtype=torch.float64)):
        loss = 3 * linear_cross_entropy(x, head, targets, scale=scale, chunk=2)
        torch.testing.assert_close(loss, 12 * plain_loss)
        torch.testing.assert_close(list(torch.autograd.grad(loss, (x, head))), expected)


def test_an_ignored_row_teaches_nothing() -> None:
    x, head, targets = rows()
    loss = linear_cross_entropy(x, head, targets, scale=1.0, chunk=4)
    dx, dhead = torch.autograd.grad(loss, (x, head))
    ignored = targets == IGNORE
    assert (dx[ignored] == 0).all()
    assert (dx[~ignored] != 0).all()
    kept = linear_cross_entropy(x[~ignored], head, targets[~ignored], scale=1.0)
    torch.testing.assert_close(torch.autograd.grad(kept, head)[0], dhead)


def test_rows_that_are_all_ignored_cost_zero() -> None:
    x, head, targets = rows()
    loss = linear_cross_entropy(x, head, torch.full_like(targets, IGNORE), scale=1.0, chunk=3)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, head)))


def test_padded_rows_of_the_head_get_no_gradient_and_no_probability() -> None:
    x, head, targets = rows(num_ids=8)
    with torch.no_grad():
        head[8:] = 1e4
    loss = linear_cross_entropy(x, head, targets, scale=1.0, num_ids=8)
    torch.testing.assert_close(loss, plain(x, head, targets, num_ids=8))
    assert (torch.autograd.grad(loss, head)[0][8:] == 0).all()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_ids_of_the_whole_head_changes_no_bit(
    dtype: torch.dtype, softcap: float | None, device: torch.device
) -> None:
    x, head, targets = rows(dtype, device=device)
    results = []
    for num_ids in (None, V):
        loss = linear_cross_entropy(x, head, targets, scale=0.3, chunk=3, softcap=softcap, num_ids=num_ids)
        losses = token_losses(x, head, targets, chunk=3, softcap=softcap, num_ids=num_ids)
        results.append((loss, losses, *torch.autograd.grad(loss, (x, head))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_odd_head_in_16_bits_computes_as_its_aligned_copy(dtype: torch.dtype, device: torch.device) -> None:
    """Of a size at which both widths round differently."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 64, generator=generator).to(device, dtype).requires_grad_()
    head = torch.randn(100, 64, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(100, (256,), generator=generator).to(device)
    aligned = F.pad(head.detach(), (0, 0, 0, 128 - 100)).requires_grad_()
    results = []
    for one in (head, aligned):
        loss = linear_cross_entropy(x, one, targets, scale=0.1, num_ids=100)
        dx, dW = torch.autograd.grad(loss, (x, one))
        assert dW.shape == one.shape
        results.append((loss, token_losses(x, one, targets, num_ids=100), dx, dW[:100]))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_equal_logits_cost_ln_v() -> None:
    losses = token_losses(torch.zeros(3, C), torch.randn(V, C), torch.tensor([0, 5, IGNORE]))
    assert losses.tolist() == pytest.approx([math.log(V), math.log(V), 0.0])


@pytest.mark.parametrize("options", OPTIONS)
def test_token_losses_sum_to_the_loss_bit_for_bit(options: dict[str, Any], device: torch.device) -> None:
    x, head, targets = rows(torch.float32, options.get("num_ids", V), device)
    losses = token_losses(x, head, targets, chunk=3, **options)
    assert losses.shape == (N,)
    assert not losses.requires_grad
    trained = linear_cross_entropy(x, head, targets, scale=0.25, chunk=3, **options)
    assert torch.equal(losses.sum() * 0.25, trained)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, head, targets, scale=0.25, chunk=3, **options), trained)


def test_no_gradient_is_worked_out_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, head, targets = rows()
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: pytest.fail("made room for a gradient"))
    with torch.no_grad():
        assert linear_cross_entropy(x, head, targets, scale=1.0).grad_fn is None
    assert linear_cross_entropy(x.detach(), head.detach(), targets, scale=1.0).grad_fn is None


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    inputs = list(rows()[:2])
    targets = rows()[2]
    expected = torch.autograd.grad(plain(inputs[0], inputs[1], targets), inputs[wanted])[0]
    inputs[1 - wanted] = inputs[1 - wanted].detach()
    loss = linear_cross_entropy(inputs[0], inputs[1], targets, scale=1.0)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[wanted])[0], expected)


def test_a_second_derivative_is_refused() -> None:
    x, head, targets = rows()
    loss = linear_cross_entropy(x, head, targets, scale=1.0).square()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_bf16_stays_near_fp32_at_the_size_of_a_vocabulary(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 32, generator=generator).bfloat16()
    head = (0.3 * torch.randn(5000, 32, generator=generator)).bfloat16()
    targets = torch.randint(5000, (64,), generator=generator)
    exact = [t.float().requires_grad_() for t in (x, head)]
    half = [t.clone().to(device).requires_grad_() for t in (x, head)]
    expected = plain(exact[0], exact[1], targets) / 64
    loss = linear_cross_entropy(half[0], half[1], targets.to(device), scale=1 / 64, chunk=10)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    pairs = zip(torch.autograd.grad(loss, half), torch.autograd.grad(expected, exact), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.bfloat16
        assert (ours.cpu().float() - theirs).norm() < 0.01 * theirs.norm()


def sure_rows(margins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 rows (N, 64) along their targets' rows of the head (1000, 64), so far that p is about sigmoid(margin)."""
    generator = torch.Generator().manual_seed(3)
    head = 8 * F.normalize(torch.randn(1000, 64, generator=generator), dim=1)
    targets = torch.randperm(1000, generator=generator)[: len(margins)]
    # a row of this length has the logit 8 l; the others are near normal, of deviation l: 8 l - (ln 1000 + l^2 / 2)
    length = 8 - (64 - 2 * (margins + math.log(1000))).sqrt()
    return (length[:, None] * head[targets] / 8).bfloat16(), head.bfloat16(), targets


def exact_gradients(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p of the targets, dx and dhead in float64, of the logits that bf16 gives."""
    dz = (x @ head.T).double().softmax(1)
    p = dz.gather(1, targets[:, None]).squeeze(1)
    dz[torch.arange(len(x)), targets] -= 1
    return p, dz @ head.double(), dz.T @ x.double()


@pytest.mark.parametrize("p", [0.98, 0.999, 1 - 1e-5])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_bf16_gradients_of_sure_targets_keep_their_digits(p: float, share: float) -> None:
    sure = torch.arange(64) < 64 * share
    x, head, targets = sure_rows(torch.where(sure, math.log(p / (1 - p)), -2.0))
    p_exact, *exact = exact_gradients(x, head, targets)
    assert (1 - p_exact[sure]).median().item() == pytest.approx(1 - p, rel=0.5)
    inputs = [x.requires_grad_(), head.requires_grad_()]
    loss = linear_cross_entropy(x, head, targets, scale=1.0, chunk=10)
    dx, dhead = (gradient.double() for gradient in torch.autograd.grad(loss, inputs))
    pairs = [(dx[sure], exact[0][sure]), (dhead[targets[sure]], exact[1][targets[sure]]), (dhead, exact[1])]
    for got, expected in pairs:
        assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_fp16_keeps_a_vocabulary_beyond_its_end(softcap: float | None) -> None:
    """The exponents of 80,000 near-equal ids sum to above 65,504; each share is 1e-5, where fp16 has few digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 32, generator=generator) * 0.05
    head = torch.randn(80_000, 32, generator=generator) * 0.05
    targets = torch.randint(80_000, (24,), generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (x.half(), head.half())]
    truth = torch.autograd.grad(1024 * plain(*exact, targets, softcap), exact)
    half = [tensor.half().requires_grad_() for tensor in (x, head)]
    loss = linear_cross_entropy(*half, targets, scale=torch.tensor(1024.0), chunk=7, softcap=softcap)
    assert loss.item() / 1024 == pytest.approx(plain(*exact, targets, softcap).item(), rel=1e-3)
    others = torch.ones(80_000, dtype=torch.bool).index_fill_(0, targets, False)
    dx, dW = torch.autograd.grad(loss, half)
    for ours, theirs in ((dx, truth[0]), (dW, truth[1]), (dW[others], truth[1][others])):
        assert (ours.double() - theirs).norm() < 1e-3 * theirs.norm()
