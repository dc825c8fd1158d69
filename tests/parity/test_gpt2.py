"""LayerNorm, biases, GELU and learned positions against transformers' GPT-2, whose weights have other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pocketlm.config import ModelConfig
from pocketlm.model.transformer import allocate

transformers = pytest.importorskip("transformers")

C = 32


def our_weights(theirs: Any) -> dict[str, Tensor]:
    """GPT-2's weights under our names; its matrices are stored as (inputs, outputs), and q, k, v as one."""
    weights = {
        "model.embed_tokens.weight": theirs.transformer.wte.weight,
        "model.embed_positions.weight": theirs.transformer.wpe.weight,
        "model.norm.weight": theirs.transformer.ln_f.weight,
        "model.norm.bias": theirs.transformer.ln_f.bias,
    }
    for i, block in enumerate(theirs.transformer.h):
        layer = f"model.layers.{i}."
        for ours, norm in (("input_layernorm", block.ln_1), ("post_attention_layernorm", block.ln_2)):
            weights |= {f"{layer}{ours}.weight": norm.weight, f"{layer}{ours}.bias": norm.bias}
        projections = zip(block.attn.c_attn.weight.split(C, 1), block.attn.c_attn.bias.split(C), strict=True)
        for name, (weight, bias) in zip("qkv", projections, strict=True):
            weights |= {f"{layer}self_attn.{name}_proj.weight": weight.T, f"{layer}self_attn.{name}_proj.bias": bias}
        others = (("self_attn.o_proj", block.attn.c_proj), ("mlp.up_proj", block.mlp.c_fc))
        for ours, conv in (*others, ("mlp.down_proj", block.mlp.c_proj)):
            weights |= {f"{layer}{ours}.weight": conv.weight.T, f"{layer}{ours}.bias": conv.bias}
    return weights


@pytest.mark.goal("R16")
@torch.no_grad()
def test_random_weights_give_gpt2s_logits() -> None:
    sizes = {"vocab_size": 101, "n_positions": 24, "n_embd": C, "n_layer": 2, "n_head": 4}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    generator = torch.Generator().manual_seed(31)
    for name, weight in theirs.named_parameters():
        weight.normal_(1.0 if ".ln_" in name and "weight" in name else 0.0, 0.3, generator=generator)
    config = ModelConfig(
        vocab_size=101,
        hidden_size=C,
        intermediate_size=4 * C,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=24,
        position="learned",
        norm="layer",
        mlp="gelu",
        bias=True,
    )
    model = allocate(config)
    model.load_state_dict(our_weights(theirs))
    ids = torch.randint(101, (2, 24), generator=generator)
    torch.testing.assert_close(model.double()(ids), theirs.double()(ids).logits, rtol=1e-10, atol=1e-10)
