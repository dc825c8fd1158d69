"""How weights begin: a pure function of the configuration and a seed.

    embeddings (tokens, positions)      N(0, std)
    matrices                            N(0, std), or N(0, gain / sqrt(inputs)) with `fan_in_gain`
    o_proj and down_proj                the same, divided by sqrt(2 x layers), or zero
    norms, biases                       one, zero

o_proj and down_proj write into the residual stream, 2 x layers times; divided so, the variance that they add does not
grow with the depth (GPT-2, section 2.3; nanotron, which trained SmolLM2).

`previous_token_layers` lets the first head of the first layers begin as what short runs spend their time to find: a
head that reads the token before. The embedding gets one channel that is the same for every token. From it alone the
head makes its key, (1, 0) in the n fastest rotary pairs, and its query, the same turned back by one token, so that a
query d tokens after a key scores

    sqrt(D) g^2 mean_i cos(theta_i (d - 1))                  g: the gain of the query-key norm in those pairs

which is largest at d = 1. The channel is still alone in deeper layers, as the blocks begin with adding nothing (zero
output projections); the gain is the whole layer's, for the norm is; and each head has its own keys. It is a beginning
only: every weight of it is trained like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pocketlm.config import InitConfig, ModelConfig
from pocketlm.model.transformer import Transformer

PAIRS, GAIN, CONSTANT = 4, 1.5, 0.5
"""n and g of the formula; the constant channel's size, in lengths of an embedding. Found by trial on `tiny`."""


@torch.no_grad()
def init_weights(model: Transformer, config: InitConfig, seed: int) -> None:
    """Writes every parameter."""
    weights = dict(model.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, weight in initial_weights(model.config, shapes, config, seed):
        weights[name].copy_(weight)


def initial_weights(
    model: ModelConfig, shapes: Mapping[str, torch.Size], config: InitConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, one at a time, from one fp32 generator on the CPU.

    So a seed means the same weights on every device and beside any other use of randomness, and whoever holds some
    rows of a model never has all of it.

    Args:
        shapes: of all parameters, by name, in state-dict order.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            weight = torch.zeros(shape)
        elif len(shape) == 1:
            weight = torch.ones(shape)  # a norm
        else:
            std = weight_std(name, shape[1], config, model.num_hidden_layers)
            weight = torch.empty(shape).normal_(generator=generator).mul_(std)
        if config.previous_token_layers:
            _read_the_token_before(name, weight, model, config)
        yield name, weight


def weight_std(name: str, fan_in: int, config: InitConfig, num_layers: int) -> float:
    """Standard deviation at which the matrix or embedding `name`, with `fan_in` columns, begins."""
    std = config.std
    if config.fan_in_gain is not None and ".embed_" not in name:
        std = config.fan_in_gain / math.sqrt(fan_in)
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        std *= {"same": 1.0, "depth-scaled": 1 / math.sqrt(2 * num_layers), "zero": 0.0}[config.output_projections]
    return std


def _read_the_token_before(name: str, weight: Tensor, model: ModelConfig, config: InitConfig) -> None:
    """Writes of a parameter what is part of it."""
    if name == "model.embed_tokens.weight":
        weight[:, 0] = CONSTANT * config.std * math.sqrt(model.hidden_size)
    layer, _, kind = name.removeprefix("model.layers.").partition(".self_attn.")
    if not kind or int(layer) >= config.previous_token_layers:
        return
    D = model.head_dim
    pairs = torch.arange(min(PAIRS, D // 2))
    angles = model.rope_theta ** (-2 * pairs / D)  # what one token turns
    if kind in ("q_proj.weight", "k_proj.weight"):
        head = weight[:D].zero_()
        if kind == "k_proj.weight":
            head[pairs, 0] = 1.0
        else:
            head[pairs, 0], head[pairs + D // 2, 0] = angles.cos(), -angles.sin()
    elif kind in ("q_norm.weight", "k_norm.weight"):
        weight[torch.cat((pairs, pairs + D // 2))] = GAIN
