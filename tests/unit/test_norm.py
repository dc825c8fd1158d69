"""RMSNorm with its gradient written out, against PyTorch's own in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pocketlm.model import norm
from pocketlm.model.norm import RMSNorm

ULP = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("shape", [(2, 7, 24), (3, 5, 2, 24)])  # tokens, and heads of queries
@pytest.mark.parametrize("most", [1, 4 * 24, 2**19])  # a row at a time, with a last part of fewer, all at once
def test_values_and_gradients_are_those_of_fp64(
    dtype: torch.dtype, shape: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "CACHED_VALUES", most)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    module = RMSNorm(shape[-1], eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.rand(shape[-1], generator=generator) + 0.5)
    x.requires_grad_()
    before = x.detach().clone()
    y = module(x)
    found = (y, *torch.autograd.grad(y, (x, module.weight), grad))
    assert torch.equal(x, before), "the input is left as it was, in fp32 as well"

    exact_x, weight = (each.detach().double().requires_grad_() for each in (x, module.weight))
    exact_y = F.rms_norm(exact_x, shape[-1:], weight, 1e-5)
    exact = (exact_y, *torch.autograd.grad(exact_y, (exact_x, weight), grad.double()))
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() <= ULP[dtype] * theirs.norm()


def test_of_a_transposed_view_and_without_gradients() -> None:
    """As attention may hand it over; and where no gradient is wanted it is PyTorch's own, bit for bit."""
    module, x = RMSNorm(8, eps=1e-5), torch.randn(2, 3, 5, 8).transpose(1, 2)
    y = module(x.requires_grad_())
    y.sum().backward()
    with torch.no_grad():
        plain = module(x)
    assert torch.equal(plain, F.rms_norm(x, (8,), module.weight, 1e-5))
    torch.testing.assert_close(y, plain)
