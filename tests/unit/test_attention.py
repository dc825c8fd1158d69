"""Folded attention against float64 over the whole square, against PyTorch's kernel, and by its gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.config import InitConfig, ModelConfig
from pocketlm.model import attention
from pocketlm.model.attention import folded_attention
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate


def inputs(B: int, H: int, K: int, T: int, D: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the model hands them over: views of (B, T, heads, D)."""
    generator = torch.Generator().manual_seed(B * T + H)
    made = (torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64) for heads in (H, K, K))
    q, k, v = (x.to(dtype).transpose(1, 2).requires_grad_() for x in made)
    return q, k, v


def square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D), -inf above the diagonal) V, head by head."""
    heads = []
    for h in range(q.shape[1]):
        kv = h * k.shape[1] // q.shape[1]
        S = q[:, h] @ k[:, kv].mT / math.sqrt(q.shape[3])
        S = S.masked_fill(torch.ones(S.shape[-2:]).triu(1).bool(), -math.inf)
        heads.append(S.softmax(-1) @ v[:, kv])
    return torch.stack(heads, 1)


# shorter than a block, whole blocks, a rest of one token; one head, grouped, one for all, one each
SHAPES = [
    (2, 1, 1, 1, 8),
    (1, 2, 1, 5, 8),
    (2, 6, 2, 128, 16),
    (1, 4, 1, 129, 8),
    (2, 3, 3, 300, 8),
    (1, 4, 2, 384, 42),
]


@pytest.mark.parametrize("kept_up_to", [0, 1024])
@pytest.mark.parametrize("shape", SHAPES)
def test_folded_attention_is_attention(
    shape: tuple[int, int, int, int, int], kept_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEPT_UP_TO", kept_up_to)
    x = inputs(*shape)
    ours, truth = folded_attention(*x), square(*x)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    weight = torch.randn(truth.shape, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), x) for y in (ours, truth))
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_gradients_by_differences(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    assert torch.autograd.gradcheck(folded_attention, inputs(1, 4, 2, 5, 4))


def test_a_later_token_changes_nothing_before_it(device: torch.device) -> None:
    q, k, v = (x.detach().to(device) for x in inputs(1, 2, 1, 300, 8, torch.float32))
    before = folded_attention(q, k, v)
    k[:, :, 200], v[:, :, 200] = 9.0, 9.0
    after = folded_attention(q, k, v)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_of_the_size_of_pytorchs(dtype: torch.dtype, device: torch.device) -> None:
    x = inputs(2, 6, 2, 256, 64, dtype)
    truth = square(*(part.double() for part in x))
    x = (x[0].to(device), x[1].to(device), x[2].to(device))
    theirs = F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
    error, their_error = ((y.cpu().double() - truth).norm() / truth.norm() for y in (folded_attention(*x), theirs))
    assert error < 2.5 * their_error, "in bf16 the logits are rounded, too"


@pytest.mark.parametrize(("T", "kept"), [(5, 1), (128, 1), (300, 3), (1024, 8), (1025, 0)])
def test_what_the_backward_pass_is_left(T: int, kept: int) -> None:
    """q, k and v, and the weights of each block of 128 queries in rows of up to 1,024 tokens."""
    held: list[Tensor] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    q, k, v = inputs(1, 2, 1, T, 8)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        made = attention._FoldedAttention.apply(q.reshape(1, 2, T, 8), k[:, 0], v[:, 0], None)
        assert len(held) == 3 + kept
        held.clear()
        with torch.no_grad():
            without = attention._FoldedAttention.apply(q.reshape(1, 2, T, 8), k[:, 0], v[:, 0], None)
    assert held == []
    assert torch.equal(made, without)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_model_says_the_same_by_both_kernels(position: str) -> None:
    config = ModelConfig.model_validate(
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "position": position}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 200}
    )
    model = allocate(config)
    init_weights(model, InitConfig(std=0.2), seed=0)
    model.double()
    ids = torch.randint(64, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids)
        model.use_attention("folded")
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
