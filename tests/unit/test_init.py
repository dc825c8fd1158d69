"""What the initialisation does to the tensors, not what it was asked to do."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from pocketlm.config import Config, InitConfig, ModelConfig
from pocketlm.errors import ConfigError
from pocketlm.model.init import init_weights
from pocketlm.model.loss import linear_cross_entropy
from pocketlm.model.transformer import Transformer, allocate, rotary_table, rotate

MODEL = ModelConfig(
    vocab_size=500,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=8,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=300,
    position="learned",
    norm="layer",
    bias=True,
    tie_word_embeddings=False,
)


def made(model: ModelConfig, init: InitConfig, seed: int = 0) -> Transformer:
    transformer = allocate(model)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.fill_(math.nan)  # what is not written shows
    init_weights(transformer, init, seed)
    return transformer


def assert_normal(weight: torch.Tensor, std: float) -> None:
    """Mean and standard deviation within five of their standard errors."""
    n = weight.numel()
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))


def is_output(name: str) -> bool:
    return "o_proj" in name or "down_proj" in name


@pytest.mark.parametrize(
    ("outputs", "factor"),
    [("same", 1.0), ("depth-scaled", 0.25), ("zero", 0.0)],  # 1 / sqrt(2 x 8)
)
def test_every_tensor_begins_as_the_configuration_says(outputs: str, factor: float) -> None:
    init = InitConfig.model_validate({"std": 0.03, "output_projections": outputs})
    for name, weight in made(MODEL, init).named_parameters():
        if name.endswith(".bias"):
            assert (weight == 0).all(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif is_output(name) and factor == 0:
            assert (weight == 0).all(), name
        else:
            assert_normal(weight, 0.03 * (factor if is_output(name) else 1))


def test_fan_in_gain_is_for_matrices_and_not_for_embeddings() -> None:
    model = made(MODEL, InitConfig(std=0.02, fan_in_gain=0.6))
    block = model.model.layers[0]
    assert_normal(model.model.embed_tokens.weight, 0.02)
    assert_normal(model.model.embed_positions.weight, 0.02)
    assert_normal(block.get_parameter("self_attn.q_proj.weight"), 0.6 / math.sqrt(96))
    assert_normal(block.get_parameter("self_attn.o_proj.weight"), 0.6 / math.sqrt(64))
    assert_normal(block.get_parameter("mlp.down_proj.weight"), 0.6 / math.sqrt(160))


def test_the_seed_decides_and_nothing_else() -> None:
    first = made(MODEL, InitConfig(), 7).state_dict()
    torch.manual_seed(99)
    again, other = made(MODEL, InitConfig(), 7).state_dict(), made(MODEL, InitConfig(), 8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    before = torch.random.get_rng_state()
    made(MODEL, InitConfig())
    assert torch.equal(before, torch.random.get_rng_state())


def test_allocate_draws_no_random_number_and_keeps_every_name() -> None:
    before = torch.random.get_rng_state()
    model = allocate(MODEL)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.state_dict().keys() == Transformer(MODEL).state_dict().keys()
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_allocate_does_not_import_the_compiler() -> None:
    code = "import sys; from pocketlm.config import ModelConfig; from pocketlm.model.transformer import allocate"
    code += "; allocate(ModelConfig()); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def first_loss(preset: str, rows: int, context: int) -> tuple[Transformer, float]:
    torch.set_num_threads(1)
    config = Config.preset(preset)
    model = made(config.model, config.init)
    ids = torch.randint(config.model.vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, targets = model.hidden(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        return model, linear_cross_entropy(hidden, model.head, targets, scale=1 / len(targets)).item()


def test_smallm_begins_near_ln_v() -> None:
    _, loss = first_loss("smallm", 4, 128)
    assert 10.8 < loss < 11.0


def test_smollm2_begins_near_ln_v_with_depth_scaled_outputs() -> None:
    model, loss = first_loss("smollm2-135m-official", 4, 64)
    assert 11.1 < loss < 11.4
    for name, weight in model.named_parameters():
        if is_output(name):
            assert_normal(weight, 0.00538)
        elif weight.dim() == 2:
            assert_normal(weight, 1 / 24)


def test_a_previous_token_head_reads_the_token_before_whatever_the_tokens_are() -> None:
    """Read from the attention of the model itself: a mark in place of each value arrives at the next token."""
    config = Config.preset("tiny", {"init.previous_token_layers": 2})
    model = made(config.model, config.init)
    T, D = 250, config.model.head_dim
    inputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda block, given: inputs.append(given[0]))
    model.hidden(torch.randint(4096, (1, T), generator=torch.Generator().manual_seed(0)))
    rotary = rotary_table(torch.arange(T), D, config.model.rope_theta, torch.float32)
    sharpest = []
    for block, x in zip(model.model.layers, inputs, strict=True):
        h, attention = block.input_layernorm(x), block.self_attn
        q, k = attention.q_norm(attention.q_proj(h)[..., :D]), attention.k_norm(attention.k_proj(h)[..., :D])
        q, k = (rotate(x[:, :, None], rotary).transpose(1, 2) for x in (q, k))
        marks = torch.eye(T)[None, None]  # (1, 1, T, T): what comes out is the weights
        weights = torch.nn.functional.scaled_dot_product_attention(q, k, marks, is_causal=True)[0, 0]
        sharpest.append(weights.diagonal(-1).min().item())
    assert min(sharpest[:2]) > 0.8, "rotations that nearly return take a little of it in long rows"
    assert sharpest[2] < 0.1, "the third layer begins as ever"


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"model.qk_norm": False}, "model.qk_norm true"),
        ({"model.position": "learned"}, "model.position rope"),
        ({"model.num_key_value_heads": 1}, "as many key-value as query heads"),
        ({"init.output_projections": "same"}, "init.output_projections zero"),
        ({"model.num_hidden_layers": 1}, "at least 2 layers"),
    ],
)
def test_a_previous_token_head_says_what_it_takes(changed: dict[str, object], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"previous_token_layers 2 takes {missing}; change"):
        Config.preset("tiny", {"init.previous_token_layers": 2} | changed)
