"""The parallel, learned-position, multi-query layout against numpy in float64, written from the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pocketlm.config import Config, ModelConfig
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate

Array = npt.NDArray[np.float64]


def rms_norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def smallm(w: dict[str, Array], ids: npt.NDArray[np.int64], num_layers: int, num_heads: int, head_dim: int) -> Array:
    """Logits (T, V) of one row of ids, one head and one query at a time."""
    x = w["model.embed_tokens.weight"][ids] + w["model.embed_positions.weight"][: len(ids)]
    for layer in range(num_layers):
        p = {name.removeprefix(f"model.layers.{layer}."): value for name, value in w.items()}
        h = rms_norm(x, p["input_layernorm.weight"])
        q = h @ p["self_attn.q_proj.weight"].T
        k = h @ p["self_attn.k_proj.weight"].T  # one key and value head for all queries
        v = h @ p["self_attn.v_proj.weight"].T
        heads = np.zeros_like(q)
        for head in range(num_heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            for t in range(len(ids)):
                attention = softmax(k[: t + 1] @ q[t, columns] / np.sqrt(head_dim))
                heads[t, columns] = attention @ v[: t + 1]
        gate, up = h @ p["mlp.gate_proj.weight"].T, h @ p["mlp.up_proj.weight"].T
        mlp = (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.weight"].T
        x = x + heads @ p["self_attn.o_proj.weight"].T + mlp
    return rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


@torch.no_grad()
def check(config: ModelConfig, weights: Any, num_tokens: int) -> None:
    ids = torch.randint(config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(21))
    model = allocate(config)
    weights(model)
    wide = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected = smallm(wide, ids.numpy(), config.num_hidden_layers, config.num_attention_heads, config.head_dim)
    np.testing.assert_allclose(model(ids[None])[0].numpy(), expected, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(model.double()(ids[None])[0].numpy(), expected, atol=1e-12, rtol=1e-11)


@pytest.mark.goal("R16")
def test_tiny_with_every_weight_random() -> None:
    def weights(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(22)
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)

    small = {"vocab_size": 71, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "head_dim": 12}
    preset = Config.preset("smallm").model.model_dump()
    check(ModelConfig.model_validate(preset | small | {"max_position_embeddings": 24}), weights, 24)


@pytest.mark.goal("R16")
def test_the_preset_itself() -> None:
    config = Config.preset("smallm")
    check(config.model, lambda model: init_weights(model, config.init, 0), 20)
