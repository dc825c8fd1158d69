"""Keys and values of the tokens already seen, so that a new token costs one position and not all of them.

Every layer's keys and values lie in one block that is allocated once; a step writes at the end of what is there and
reads a view of it, so nothing is copied as the text grows. Keys are stored as the model rotated them: a cache is only
good for the positions at which its tokens were run, which is why a window that slides must be run anew (engine.py).

Shapes: B batch, H key-value heads (not query heads: grouped queries share them), D head width, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketlm.config import ModelConfig


class PreallocatedCache:
    """Keys and values of up to `capacity` tokens, for all layers of one model."""

    def __init__(
        self, config: ModelConfig, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # (L, B, H, capacity, D)
        self.values = torch.empty(shape, dtype=dtype, device=device)  # (L, B, H, capacity, D)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's keys and values of T new tokens, and returns all of that layer's so far.

        `length` stays: each layer of a step appends at the same place, and `advance` ends the step.

        Args:
            layer: which layer.
            k: (B, H, T, D) keys, already rotated.
            v: (B, H, T, D) values.

        Returns:
            Views (B, H, length + T, D) of keys and values, valid until the next `append` or `reset`.
        """
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens that every layer has appended."""
        self.length += num_tokens

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        self.length = 0
