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

import torch

from pocketlm.config import InitConfig
from pocketlm.model.transformer import Transformer

PAIRS, GAIN, CONSTANT = 4, 1.5, 0.5
"""n and g of the formula; the constant channel's size, in lengths of an embedding. Found by trial on `tiny`."""


@torch.no_grad()
def init_weights(model: Transformer, config: InitConfig, seed: int) -> None:
    """Writes every parameter, in state-dict order, from one fp32 generator on the CPU.

    So a seed means the same weights on every device and beside any other use of randomness.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            weight.zero_()
        elif weight.dim() == 1:
            weight.fill_(1.0)  # a norm
        else:
            std = weight_std(name, weight.shape[1], config, model.config.num_hidden_layers)
            weight.copy_(torch.empty(weight.shape).normal_(generator=generator).mul_(std))
    if config.previous_token_layers:
        _read_the_token_before(model, config)


def weight_std(name: str, fan_in: int, config: InitConfig, num_layers: int) -> float:
    """Standard deviation at which the matrix or embedding `name`, with `fan_in` columns, begins."""
    std = config.std
    if config.fan_in_gain is not None and ".embed_" not in name:
        std = config.fan_in_gain / math.sqrt(fan_in)
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        std *= {"same": 1.0, "depth-scaled": 1 / math.sqrt(2 * num_layers), "zero": 0.0}[config.output_projections]
    return std


def _read_the_token_before(model: Transformer, config: InitConfig) -> None:
    shape = model.config
    D = shape.head_dim
    pairs = torch.arange(min(PAIRS, D // 2))
    angles = shape.rope_theta ** (-2 * pairs / D)  # what one token turns
    model.model.embed_tokens.weight[:, 0] = CONSTANT * config.std * math.sqrt(shape.hidden_size)
    weights = dict(model.named_parameters())
    for layer in range(config.previous_token_layers):
        attention = f"model.layers.{layer}.self_attn"
        query, key = (weights[f"{attention}.{name}.weight"][:D] for name in ("q_proj", "k_proj"))
        query.zero_()
        key.zero_()
        key[pairs, 0] = 1.0
        query[pairs, 0], query[pairs + D // 2, 0] = angles.cos(), -angles.sin()
        for name in ("q_norm", "k_norm"):
            weights[f"{attention}.{name}.weight"][torch.cat((pairs, pairs + D // 2))] = GAIN
