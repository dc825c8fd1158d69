"""How many rows at once: by what is available, by speed, as given; and refused where nothing fits."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketlm import checkpoint, machine
from pocketlm.config import Config
from pocketlm.errors import ConfigError
from pocketlm.field_types import AttentionKernel, Dtype
from pocketlm.model import sizes
from pocketlm.model.loss import linear_cross_entropy
from pocketlm.model.sizes import ALONE, Team
from pocketlm.training import micro_batch as file
from pocketlm.training import resolve, step
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from pocketlm.training.micro_batch import Training, evenly, is_out_of_memory
from pocketlm.training.probe import RandomRows
from pocketlm.training.run import new_state
from pocketlm.training.state import read_state

PLENTY = 10**15
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOLD = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1152921504606846976 bytes. Error code 12 (Cannot allocate memory)",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
)
"""As PyTorch and its libraries write it."""


def smallm(**fields: object) -> Config:
    return Config.preset("smallm", {f"train.{name}": value for name, value in fields.items()})


def on_cpu(
    config: Config, *, dtype: Dtype = "bf16", attention: AttentionKernel = "folded", team: Team = ALONE
) -> Training:
    return Training(config, CPU, dtype, attention, team)


def on_gpu(config: Config, team: Team = ALONE) -> Training:
    return Training(config, CUDA, "bf16", "sdpa", team)


def test_a_cpu_takes_as_many_as_reach_full_speed() -> None:
    assert on_cpu(smallm()).chosen(PLENTY)[0] == 16  # 4,096 tokens are 16 rows; 248 rows are 15.5 times 16
    assert on_cpu(Config.preset("tiny")).chosen(PLENTY)[0] == 4, "a step has no more"
    long = Config.preset("smollm2-135m", {"train.micro_batch": "auto"})
    assert on_cpu(long).chosen(PLENTY)[0] == 2
    longer = Config.preset(
        "smollm2-135m",
        {"train.micro_batch": "auto", "data.context": 8192, "model.max_position_embeddings": 8192},
    )
    assert on_cpu(longer).chosen(PLENTY)[0] == 1, "one row at least"


def test_a_gpu_takes_all_that_fits() -> None:
    config = smallm()
    assert config.rows_per_step == 248
    assert on_gpu(config).chosen(PLENTY)[0] == 248
    half = int(sizes.training_memory(config, 150, "bf16", on_gpu=True).total / file.USABLE["cuda"]) + 1
    rows, reason = on_gpu(config).chosen(half)
    assert rows == 124, "150 would fit; two times 124 take as many turns as 150 and 98"
    assert "all that fits" in reason


@pytest.mark.parametrize(
    ("rows", "most", "even"),
    [(62, 40, 31), (62, 31, 31), (62, 62, 62), (62, 99, 62), (7, 3, 3), (5, 1, 1), (512, 37, 32), (248, 16, 16)],
)
def test_turns_are_even(rows: int, most: int, even: int) -> None:
    assert evenly(rows, most) == even


def test_what_fits_is_found_by_trying_every_size() -> None:
    config = Config.preset("smallm", {"train.tokens_per_step": 20 * 256})
    training = on_cpu(config, dtype="fp32")
    totals = [training.needs(rows).total for rows in range(1, 21)]
    for room in (*totals, *(total - 1 for total in totals), 0):
        want = len(list(itertools.takewhile(lambda total, room=room: total <= room, totals)))
        assert training.largest_that_fits(room) == want


def test_little_memory_bounds_a_cpu_too() -> None:
    config = smallm()
    training = on_cpu(config)
    room = int(training.needs(5).total / file.USABLE["cpu"]) + 1
    rows, reason = training.chosen(room)
    assert rows == 4, "62 turns of 4, all alike, and not 49 of 5 and one of 3"
    assert training.needs(rows).total <= room
    assert f"all that fits in {room / 1e9:.1f} GB" in reason
    assert f"{rows * 256} tokens at once, of 63488 a step" in reason


def test_what_attention_keeps_is_counted_where_it_is_folded() -> None:
    for device in (CPU, CUDA):
        folded, plain = (Training(smallm(), device, "bf16", kernel).needs(16) for kernel in ("folded", "sdpa"))
        assert folded.activations > plain.activations, device
    room = int(on_cpu(smallm(), attention="sdpa").needs(16).total / file.USABLE["cpu"]) + 1
    assert on_cpu(smallm(), attention="sdpa").chosen(room)[0] == 16
    assert on_cpu(smallm()).chosen(room)[0] < 16


def test_where_one_row_just_fits_it_is_taken() -> None:
    training = on_cpu(smallm())
    assert training.chosen(training.needs(1).total)[0] == 1


def test_where_one_row_does_not_fit_the_line_says_what_would_help() -> None:
    config = Config.preset("smollm2-135m", {"train.micro_batch": "auto"})
    training = on_cpu(config, dtype="fp32")
    one = training.needs(1).total
    again = Config.preset("smollm2-135m", {"train.gradient_checkpointing": True})
    recomputed = on_cpu(again, dtype="fp32").needs(1).total
    assert recomputed < one - 10**9
    with pytest.raises(ConfigError) as refused:
        training.chosen(one - 1)
    line = str(refused.value)
    assert "\n" not in line
    assert f"needs about {one / 1e9:.1f} GB to train with 1 row(s) of 2048 at once" in line
    assert line.endswith("add --train.gradient-checkpointing true")
    kept = 28 * 134_515_008  # weights, gradients, moments; weights and moments again for a save
    with pytest.raises(ConfigError, match=rf"{kept / 1e9:.1f} GB for the parameters.*take a smaller preset"):
        training.chosen(10**9)


def test_a_shorter_context_helps_where_recomputing_is_on_already() -> None:
    fields = {"train.gradient_checkpointing": True, "train.micro_batch": "auto", "train.loss_chunk": 4096}
    config = Config.preset("smollm2-135m", fields)
    shorter = Config.preset("smollm2-135m", fields | {"data.context": 1024})
    room = on_cpu(shorter, dtype="fp32").needs(1).total
    with pytest.raises(ConfigError, match=r"add --data.context 1024 --train.tokens-per-step 16384$"):
        on_cpu(config, dtype="fp32").chosen(room)


def test_what_is_given_is_kept_or_refused() -> None:
    assert on_cpu(smallm(micro_batch=100)).chosen(PLENTY) == (100, "as given")
    assert on_cpu(smallm(micro_batch=10**6)).chosen(PLENTY) == (248, "as given")
    room = on_cpu(smallm()).needs(60).total
    assert on_cpu(smallm(micro_batch=60)).chosen(room) == (60, "as given")
    with pytest.raises(ConfigError, match=r"add --train.micro-batch 60, or leave it to auto"):
        on_cpu(smallm(micro_batch=100)).chosen(room)


def test_a_model_that_no_gpu_holds_whole_is_trained_by_those_that_share_it() -> None:
    config = Config.preset("smollm2-1.7b", {"train.micro_batch": "auto", "train.gradient_checkpointing": True})
    room = 24 * 10**9
    shared = on_gpu(config, Team(8, "fsdp"))
    rows, reason = shared.chosen(room)
    assert 1 <= rows <= -(-config.rows_per_step // 8)
    assert f"of {-(-config.rows_per_step // 8) * config.data.context} a step" in reason
    assert 3e9 < shared.needs(1).per_parameter < 6e9
    with pytest.raises(ConfigError) as refused:
        on_gpu(config, Team(8, "ddp")).chosen(room)
    line = str(refused.value)
    assert "on each of 8 ranks" in line
    assert line.endswith("24.0 GB are free for each; add --train.strategy fsdp")
    with pytest.raises(ConfigError, match=r"add --data.context 1024 --train.tokens-per-step (\d+)$") as short:
        shared.chosen(shared.needs(1).total - 1)
    assert str(short.value).endswith(f" {config.rows_per_step * 1024}"), "of all ranks together"


def test_the_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = smallm(micro_batch=62)
    training = on_cpu(config, team=Team(4, "ddp", 4))
    one = training.needs(62).total
    monkeypatch.setattr(file, "available_bytes", lambda device: 4 * one)
    assert training.choose()[0] == 62
    assert training.warning(62) is None
    monkeypatch.setattr(file, "available_bytes", lambda device: 4 * one - 1)
    assert on_cpu(config).choose()[0] == 62, "one process has it all"
    with pytest.raises(ConfigError, match=r"on each of 4 ranks .* are free for each; add --train.micro-batch 61"):
        training.choose()
    warned = training.warning(62)
    assert warned
    assert "on each of 4 ranks" in warned


def test_a_run_that_does_not_fit_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    monkeypatch.setattr(file, "available_bytes", lambda device: 100_000)
    with pytest.raises(ConfigError, match=r"debug needs about 0.0 GB"):
        train(Config.preset("debug"), out=Path("run"))
    assert not Path("run/config.toml").exists()
    assert not Path("run/checkpoints").exists()


def test_a_run_that_goes_on_with_less_memory_is_warned_of_and_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    config = Config.preset("debug", {"train.total_steps": 10, "train.stop_at_step": 5, "sample.prompts": []})
    train(config, out=Path("run"))
    monkeypatch.setattr(file, "available_bytes", lambda device: 100_000)
    heard = Notes()
    run = train(
        Config.preset("debug", {"train.total_steps": 10, "sample.prompts": []}), out=Path("run"), listener=heard
    )
    assert [note for note in heard.notes if "it may be killed" in note and "with 8 row(s) at once" in note]
    assert read_state(checkpoint.list_checkpoints(run)[-1]).micro_batch == 8


def test_no_micro_batch_holds_the_graph_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nodes lie between the activations that it has freed: a heap in such pieces takes a third more memory."""
    ends: list[weakref.ref[Tensor]] = []

    def spy(hidden: Tensor, *others: Any, **options: Any) -> Tensor:
        loss = linear_cross_entropy(hidden, *others, **options)
        ends.extend((weakref.ref(hidden), weakref.ref(loss)))
        return loss

    monkeypatch.setattr(step, "linear_cross_entropy", spy)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    config = Config.preset("debug")
    runtime = machine.start(config.train)
    state = new_state(config, resolve.resolve(config, runtime), runtime)
    alive = list[bool]()
    state.precision.compute.model.register_forward_pre_hook(
        lambda *_: alive.append(any(end() is not None for end in ends))
    )
    step.train_step(state, RandomRows(config), config, 2)
    assert alive == [False] * (config.rows_per_step // 2)
    assert len(ends) == 2 * len(alive) > 4


def test_errors_that_say_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    for text in TOLD:
        assert is_out_of_memory(RuntimeError(text)), text
        assert not is_out_of_memory(ValueError(text)), text
    assert not is_out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("you tried to allocate"))


def test_an_error_that_was_raised_from_one_of_them_says_so_too() -> None:
    wrapped, in_passing = RuntimeError("backend='inductor' raised"), RuntimeError("while that was handled")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    in_passing.__context__ = wrapped
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(in_passing)
    in_passing.__cause__ = None  # `from None`: another matter
    assert not is_out_of_memory(in_passing)
