"""What must hold of every layout: causality, attention that attends, caches, recomputation, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.config import InitConfig, ModelConfig
from pocketlm.model.init import init_weights
from pocketlm.model.loss import linear_cross_entropy
from pocketlm.model.transformer import MLP, Transformer, allocate, rotary_table, rotate

BASE = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=20,
)
LAYOUTS = {
    "llama": {},
    "smallm": {"block": "parallel", "position": "learned", "num_key_value_heads": 1},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gpt2": {"position": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "num_key_value_heads": 4},
    "speedrun": {"mlp": "relu2", "logit_softcap": 2.0, "qk_norm": True, "block": "parallel"},
}


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return lively(ModelConfig.model_validate(BASE.model_dump() | LAYOUTS[request.param]))


def lively(config: ModelConfig) -> Transformer:
    """A model with large random weights everywhere, norms and biases too, so that nothing can hide."""
    model = allocate(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1.0)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(BASE.vocab_size, shape, generator=torch.Generator().manual_seed(4))


class ListCache:
    """The simplest cache: everything, concatenated."""

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if (old := self.layers[layer]) is not None:
            k, v = torch.cat((old[0], k), 2), torch.cat((old[1], v), 2)
        assert k.shape[2] == v.shape[2] > self.length
        self.layers[layer] = k, v
        return k, v

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens


def test_logits_are_the_head_over_the_hidden_rows(model: Transformer) -> None:
    ids = tokens(2, 20)
    hidden, logits = model.hidden(ids), model(ids)
    assert hidden.shape == (2, 20, 24)
    assert logits.shape == (2, 20, 61)
    cap = model.config.logit_softcap
    plain = hidden @ model.head.T
    torch.testing.assert_close(logits, plain if cap is None else cap * torch.tanh(plain / cap))
    assert cap is None or logits.abs().max() < cap


@pytest.mark.parametrize("changed", [1, 7, 19])
@torch.no_grad()
def test_a_token_changes_no_logit_before_it_and_every_one_from_it_on(model: Transformer, changed: int) -> None:
    ids = tokens(2, 20)
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1) % BASE.vocab_size
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(-1).all()


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
@torch.no_grad()
def test_attention_depends_on_each_of_its_weights(model: Transformer, name: str) -> None:
    ids = tokens(1, 6)
    before = model(ids)
    weight = model.get_parameter(f"model.layers.0.self_attn.{name}.weight")
    weight[3].neg_()
    changed = (model(ids) - before).abs().amax(-1)[0]
    assert (changed[1:] > 1e-4).all()
    if name in ("q_proj", "k_proj"):
        assert changed[0] < 1e-4  # the first token has only itself to look at


def test_every_parameter_and_every_position_gets_a_gradient(model: Transformer) -> None:
    ids = tokens(4, 20)
    linear_cross_entropy(
        model.hidden(ids).flatten(0, 1), model.head, ids.roll(-1, 1).flatten(), scale=1 / ids.numel()
    ).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name
    if model.config.position == "learned":
        grad = model.model.embed_positions.weight.grad
        assert grad is not None
        assert grad.any(1).all()


def test_order_matters(model: Transformer) -> None:
    ids = tokens(1, 5)
    swapped = ids[:, [1, 0, 2, 3, 4]]
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4


@torch.no_grad()
def test_cached_decoding_equals_the_whole_forward_pass(model: Transformer) -> None:
    ids = tokens(3, 20)
    whole, cache = model(ids), ListCache(BASE.num_hidden_layers)
    parts = [model(ids[:, :9], cache)]
    assert cache.length == 9
    parts += [model(ids[:, t : t + 1], cache) for t in range(9, 20)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prefill_with_an_empty_cache_is_the_forward_pass(model: Transformer) -> None:
    assert torch.equal(model(tokens(2, 11), ListCache(BASE.num_hidden_layers)), model(tokens(2, 11)))


@torch.no_grad()
def test_several_tokens_after_cached_ones_are_a_mistake(model: Transformer) -> None:
    cache = ListCache(BASE.num_hidden_layers)
    model(tokens(1, 3), cache)
    with pytest.raises(AssertionError, match="one at a time"):
        model(tokens(1, 2), cache)


def test_recomputation_changes_neither_losses_nor_gradients_by_a_bit(model: Transformer) -> None:
    ids = tokens(2, 20)

    def run(recompute: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
        model.gradient_checkpointing = recompute
        model.zero_grad()
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
        loss.backward()
        return loss, {name: weight.grad for name, weight in model.named_parameters()}

    (loss, grads), (again, grads_again) = run(False), run(True)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        other = grads_again[name]
        assert grad is not None
        assert other is not None
        assert torch.equal(grad, other), name


def test_recomputation_keeps_less(model: Transformer) -> None:
    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.hidden(tokens(2, 20))
        return sum(sizes)

    whole = kept()
    model.gradient_checkpointing = True
    assert kept() < whole / 2


def test_bf16_follows_fp32(model: Transformer) -> None:
    with torch.no_grad():
        exact = model(tokens(2, 20))
        half = model.to(torch.bfloat16)(tokens(2, 20))
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_angles_stay_exact_far_out(dtype: torch.dtype) -> None:
    cos, sin = rotary_table(torch.arange(8192), 64, 10000.0, dtype)
    frequencies = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    angles = np.outer(np.arange(8192), frequencies)
    atol = {torch.float32: 8192 * 2.0**-23, torch.bfloat16: 2.0**-8}[dtype]
    for half, sign in ((slice(0, 32), -1), (slice(32, 64), 1)):
        np.testing.assert_allclose(cos[:, 0, half].double().numpy(), np.cos(angles), atol=atol, rtol=0)
        np.testing.assert_allclose(sin[:, 0, half].double().numpy(), sign * np.sin(angles), atol=atol, rtol=0)


def test_rotation_is_of_halves_and_knows_only_distances() -> None:
    unit = torch.eye(8)[2].view(1, 1, 1, 8)  # pair (2, 6) turns by theta^(-2 x 2 / 8) = 0.1 a token
    turned = rotate(unit, rotary_table(torch.tensor([3]), 8, 100.0, torch.float32)).flatten()
    expected = torch.zeros(8).index_put((torch.tensor([2, 6]),), torch.tensor([math.cos(0.3), math.sin(0.3)]))
    torch.testing.assert_close(turned, expected)

    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(5))

    def score(i: int, j: int) -> float:
        at_i, at_j = (rotary_table(torch.tensor([p]), 8, 100.0, torch.float32) for p in (i, j))
        return float((rotate(q, at_i) * rotate(k, at_j)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


@pytest.mark.parametrize(
    ("kind", "bent"),
    [
        ("swiglu", lambda gate, up: gate / (1 + math.exp(-gate)) * up),
        ("gelu", lambda _, up: up / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))),
        ("relu2", lambda _, up: max(up, 0.0) ** 2),
    ],
)
@pytest.mark.parametrize("x", [-1.7, 0.6])
def test_the_mlp_by_hand(kind: str, bent: Callable[[float, float], float], x: float) -> None:
    mlp = MLP(ModelConfig.model_validate({"hidden_size": 1, "intermediate_size": 1, "mlp": kind})).double()
    weights = {"gate_proj.weight": 0.8, "up_proj.weight": -1.3, "down_proj.weight": 2.0}
    for name, weight in mlp.named_parameters():
        weight.data.fill_(weights[name])
    result = mlp(torch.tensor([[[x]]], dtype=torch.float64)).item()
    assert result == pytest.approx(2.0 * bent(0.8 * x, -1.3 * x), rel=1e-12)


def test_names_are_hugging_faces() -> None:
    config = ModelConfig.model_validate(BASE.model_dump() | LAYOUTS["qwen3"] | {"num_hidden_layers": 1})
    block = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm")
    block += ("self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    block += ("input_layernorm", "post_attention_layernorm")
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert Transformer(config).state_dict().keys() == names | {f"model.layers.0.{name}.weight" for name in block}
    learned = ModelConfig.model_validate(BASE.model_dump() | LAYOUTS["smallm"])
    assert "model.embed_positions.weight" in Transformer(learned).state_dict()
    assert "lm_head.weight" not in Transformer(learned).state_dict()


@pytest.mark.parametrize("layout", ["llama", "smallm", "speedrun"])
def test_it_learns_to_repeat_and_only_what_can_be_known(layout: str) -> None:
    """The second half of a row repeats the first: it must become certain, the first half must stay at ln 16.

    A model that looks ahead lowers the first half; one without attention, or that predicts another token than the
    next, cannot lower the second.
    """
    torch.set_num_threads(1)
    fields = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 16}
    model = allocate(ModelConfig.model_validate(BASE.model_dump() | LAYOUTS[layout] | fields | {"logit_softcap": None}))
    init_weights(model, InitConfig(std=0.1), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(6)

    def rows() -> Tensor:
        return torch.randint(16, (64, 8), generator=generator).repeat(1, 2)

    for _ in range(250):
        ids = rows()
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.head, ids[:, 1:].flatten(), scale=1 / len(hidden))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = rows()
    with torch.no_grad():
        nats = F.cross_entropy(model(ids).transpose(1, 2)[:, :, :-1], ids[:, 1:], reduction="none").mean(0)
    assert nats[7:].mean() < 0.1
    assert nats[:7].min() > 0.95 * math.log(16)
