"""What the probes measure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.config import Config
from pocketlm.training import resolve


def test_the_probe_of_attention_times_the_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call to warm up and then the timed one, on the heads of up to four rows, and with gradients; no projections."""
    seen: dict[str, list[tuple[tuple[int, ...], ...]]] = {"folded": [], "sdpa": []}

    def spied(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(*heads: Tensor, **options: bool) -> Tensor:
            assert all(each.requires_grad and each.dtype == torch.bfloat16 for each in heads)
            assert heads[0].std() > 0.5, "alike keys would make it too easy"
            seen[name].append(tuple(tuple(each.shape) for each in heads))
            return kernel(*heads, **options)

        return spy

    def once(work: Callable[[], object]) -> float:
        work()
        return 1.0

    monkeypatch.setattr(resolve, "folded_attention", spied("folded", resolve.folded_attention))
    sdpa = spied("sdpa", F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(F, "linear", None)
    monkeypatch.setattr(resolve, "_best_s", once)
    config = Config.preset("debug", {"train.attention": "auto"})
    kernel, reason = resolve._attention(config, torch.device("cpu"), "bf16")
    assert (kernel, reason) == ("sdpa", "the folded kernel runs at 1.0 times the rate of PyTorch's here")
    heads = ((4, 2, 32, 16), (4, 1, 32, 16), (4, 1, 32, 16))
    assert seen == {"folded": [heads, heads], "sdpa": [heads, heads]}
