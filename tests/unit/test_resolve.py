"""What the probes measure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.config import Config
from pocketlm.machine import Runtime, versions
from pocketlm.training import as_before, resolve


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


def begun_on(ranks: int, strategy: str, threads: int) -> resolve.Resolved:
    """What `auto` became at the beginning of a run on a CPU."""
    fixed = {"dtype": "fp32", "attention": "sdpa", "fp32_matmul": "highest", "compile": False, "micro_batch": 4}
    fixed |= {"device": "cpu", "determinism": "bitwise", "peak_flops": 1e9, "reasons": {}}
    return resolve.Resolved.model_validate(fixed | {"ranks": ranks, "strategy": strategy, "threads": threads})


@pytest.mark.parametrize("began", ["ddp", "fsdp"])
def test_on_as_many_ranks_a_run_stays_as_it_was_whatever_is_free_today(
    began: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "available_bytes", lambda device: 1000 if began == "ddp" else 10**15)
    then, told = begun_on(2, began, threads=3), list[str]()
    runtime = Runtime(torch.device("cpu"), 1, "bitwise", ranks=2, ranks_here=2)
    now = as_before.as_before(then, versions(), Config.preset("debug"), runtime, told.append)
    assert (now, told) == (then, [])


def test_on_other_ranks_it_takes_todays_share_of_cores_and_state_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "available_bytes", lambda device: 1000)
    then, told = begun_on(1, "ddp", threads=8), list[str]()
    runtime = Runtime(torch.device("cpu"), 2, "bitwise", ranks=4, ranks_here=4)
    config = Config.preset("debug", {"train.threads": "auto"})
    now = as_before.as_before(then, versions(), config, runtime, told.append)
    assert (now.ranks, now.strategy, now.threads, now.determinism) == (4, "fsdp", 2, "same-data")
    assert "it had 1 process, has 4 processes, each with a share of the state (fsdp)" in told[0]
    given = Config.preset("debug", {"train.threads": 8, "train.strategy": "ddp"})
    now = as_before.as_before(then, versions(), given, runtime, told.append)
    assert (now.strategy, now.threads) == ("ddp", 8)
