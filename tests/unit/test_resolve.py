"""What the probes measure, and what ranks hold of the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.config import Config
from pocketlm.errors import ConfigError
from pocketlm.field_types import Dtype
from pocketlm.machine import Runtime, versions
from pocketlm.model.sizes import Team
from pocketlm.training import as_before, micro_batch, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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


def ranks(device: torch.device, num: int = 4) -> Runtime:
    return Runtime(device, 1, "same-data", num, num)


def test_ranks_share_the_state_where_the_whole_of_it_takes_more_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = Config.preset("smollm2-135m"), 20 * 134_515_008  # weights, gradients, their sums, two moments
    free = {"now": 0}
    monkeypatch.setattr(resolve, "available_bytes", lambda device: free["now"])
    for device, of_all in ((CUDA, 1), (CPU, 4)):  # on a CPU the four have the memory of one machine
        free["now"] = of_all * 2 * state
        assert resolve.choose_strategy(config, ranks(device)) == (
            "ddp",
            "the whole state takes 50 % of what is free for each",
        )
        free["now"] -= of_all
        assert resolve.choose_strategy(config, ranks(device))[0] == "fsdp"
        given = Config.preset("smollm2-135m", {"train.strategy": "ddp"})
        assert resolve.choose_strategy(given, ranks(device)) == ("ddp", "as given")
        assert resolve.choose_strategy(config, ranks(device, 1))[0] == "ddp"


def test_what_fits_only_in_shares_is_resolved_and_goes_on_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of what one rank would need alone; later, with memory enough for all of it, the run stays as it is."""
    fields = {
        "train.dtype": "bf16",
        "train.attention": "folded",
        "train.fp32_matmul": "highest",
        "train.compile": "off",
    }
    config = Config.preset("smollm2-360m", fields | {"data.context": 256, "train.tokens_per_step": 4096})
    alone = micro_batch.Training(config, CPU, "bf16", "folded")
    one = alone.needs(1).total
    assert 5 * replace(alone, team=Team(64, "fsdp", 64)).needs(1).total < one
    for module in (resolve, micro_batch):
        monkeypatch.setattr(module, "available_bytes", lambda device: 64 * one // 5)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    resolved = resolve.resolve(config, ranks(CPU, 64))
    assert (resolved.strategy, resolved.ranks, resolved.micro_batch) == ("fsdp", 64, 1)
    monkeypatch.setattr(resolve, "available_bytes", lambda device: 10**15)
    again = resolve.strategy_again(config, ranks(CPU, 64), resolved)
    assert again == ("fsdp", resolved.reasons["strategy"])
    assert resolve.strategy_again(config, ranks(CPU, 32), resolved)[0] == "ddp", "another number is another run"


@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("bf16",)])
def test_what_never_fits_is_refused_before_a_probe(dtypes: tuple[Dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the choice that takes least would need; with a byte more it is for the probes to choose."""

    class Probe(Exception):
        pass

    def probe(*_: object) -> None:
        raise Probe

    monkeypatch.setattr(resolve, "_fp32_matmul", probe)
    monkeypatch.setattr(resolve, "_candidates", lambda config, device: dtypes)
    config = Config.preset("smollm2-1.7b")
    least = min(micro_batch.Training(config, CPU, dtype, "sdpa").needs(1).total for dtype in dtypes)
    free = {"now": least}
    monkeypatch.setattr(micro_batch, "available_bytes", lambda device: free["now"])
    with pytest.raises(Probe):
        resolve.resolve(config, ranks(CPU, 1))
    free["now"] -= 1
    with pytest.raises(ConfigError, match=r"smollm2-1.7b needs about .* GB to train with 1 row"):
        resolve.resolve(config, ranks(CPU, 1))


def test_a_run_begun_before_its_loss_chunk_was_chosen_keeps_it() -> None:
    """Then 1,024 rows were the default, and stood in its configuration; another number is still another result."""
    before = begun_on(1, "ddp", threads=1)
    assert before.loss_chunk is None
    auto, old, other = (Config.preset("debug", {"train.loss_chunk": chunk}) for chunk in ("auto", 1024, 4096))
    assert auto == Config.preset("debug")
    assert auto.differences(old) == []
    assert auto.differences(other) == ["train.loss_chunk: auto, 4096"]
    assert old.differences(auto) == ["train.loss_chunk: 1024, auto"], "who asks for a number is heard"
    assert [before.rows_of_logits(config) for config in (auto, old, other)] == [1024, 1024, 4096]
    assert "loss_chunk = 1024" in before.to_toml(auto)
    assert before.model_copy(update={"loss_chunk": 5461}).rows_of_logits(auto) == 5461
