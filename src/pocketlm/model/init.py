"""How weights begin: a pure function of the configuration and a seed.

    embeddings (tokens, positions)      N(0, std)
    matrices                            N(0, std), or N(0, gain / sqrt(inputs)) with `fan_in_gain`
    o_proj and down_proj                the same, divided by sqrt(2 x layers), or zero
    norms, biases                       one, zero

o_proj and down_proj write into the residual stream, 2 x layers times; divided so, the variance that they add does not
grow with the depth (GPT-2, section 2.3; nanotron, which trained SmolLM2).
"""

from __future__ import annotations

import math

import torch

from pocketlm.config import InitConfig
from pocketlm.model.transformer import Transformer


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


def weight_std(name: str, fan_in: int, config: InitConfig, num_layers: int) -> float:
    """Standard deviation at which the matrix or embedding `name`, with `fan_in` columns, begins."""
    std = config.std
    if config.fan_in_gain is not None and ".embed_" not in name:
        std = config.fan_in_gain / math.sqrt(fan_in)
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        std *= {"same": 1.0, "depth-scaled": 1 / math.sqrt(2 * num_layers), "zero": 0.0}[config.output_projections]
    return std
