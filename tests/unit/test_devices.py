"""What is chosen on machines with other devices than this one's, as far as it can be said without them.

PyTorch's answers about a device are invented here, and no arithmetic is done on it: nothing in this file shows that a
GPU computes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from pocketlm import devices, machine
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.errors import UsageError
from pocketlm.field_types import Device
from pocketlm.model.arithmetic import Arithmetic, usable
from pocketlm.optim import adamw
from pocketlm.optim.adamw import AdamW
from pocketlm.tensors import Copies
from pocketlm.training import boundary, memory, micro_batch, resolve, state

CPU, XPU, MPS = (torch.device(kind) for kind in ("cpu", "xpu", "mps"))
GB = 10**9


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes it a machine with these GPUs; to touch another one is an error."""

    def touched(*_: object) -> Any:
        pytest.fail("a GPU was touched that nobody has chosen")

    def only(*gpus: str) -> None:
        for kind in ("cuda", "xpu", "mps"):
            monkeypatch.setattr(f"torch.{kind}.is_available", lambda kind=kind: kind in gpus)
            monkeypatch.setattr(f"torch.{kind}.get_rng_state", touched)
        for kind in ("cuda", "xpu"):
            monkeypatch.setattr(f"torch.{kind}.init", touched)
            monkeypatch.setattr(f"torch.{kind}.is_initialized", lambda: False)

    return only


@pytest.mark.parametrize(
    ("gpus", "chosen"), [((), "cpu"), (("mps",), "mps"), (("mps", "xpu"), "xpu"), (("xpu", "cuda", "mps"), "cuda")]
)
def test_the_first_that_is_here_is_chosen(
    gpus: tuple[str, ...], chosen: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(*gpus)
    claimed: list[torch.device] = []
    monkeypatch.setattr(devices, "claim", claimed.append)
    assert machine.default_device("auto").type == machine.default_device(chosen).type == chosen
    assert [device.type for device in claimed] == [chosen] * 2


def test_a_gpu_that_is_not_chosen_is_left_alone(only: Callable[..., None]) -> None:
    """To ask CUDA for a random state, or a name, takes hundreds of megabytes on the GPU: for a run on the CPU, none."""
    only("cuda", "xpu")
    assert machine.default_device("cpu") == CPU
    assert devices.in_use() == []
    assert machine.versions()["gpu"] == "none"
    assert state.random_states().keys() == {"torch", "numpy", "python"}


def test_one_that_is_not_here_is_refused_with_those_that_are(only: Callable[..., None]) -> None:
    only("mps")
    with pytest.raises(UsageError, match=r"^device: given cuda, which is not here; allowed is auto, mps, cpu$"):
        machine.default_device("cuda")


@pytest.mark.parametrize("verb", ["train debug --out run", "plan debug", "bench debug --train.device"])
def test_the_verbs_refuse_it_with_exit_code_2_and_one_line(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    away = next(kind for kind in get_args(Device) if kind not in devices.present())
    words = verb.split()
    assert main([*words, away] if words[-1].startswith("--train") else [*words, "--device", away]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"given {away}, which is not here" in line


def test_a_run_may_go_on_elsewhere() -> None:
    assert Config.preset("debug", {"train.device": "cpu"}).differences(Config.preset("debug")) == []


@pytest.mark.parametrize("kind", get_args(Device))
def test_every_kind_has_an_answer_wherever_one_is_asked(kind: Device) -> None:
    config, device = Config.preset("tiny", {"train.micro_batch": "auto"}), torch.device(kind)
    rows, _ = micro_batch.Training(config, device, "fp32", "sdpa").chosen(80 * GB)
    small = micro_batch.FULL_SPEED_TOKENS // config.data.context
    assert rows == (config.rows_per_step if kind in ("cuda", "xpu") else min(small, config.rows_per_step))
    kept, why = usable(Arithmetic("bf16", "sdpa"), device)
    assert (kept.attention, bool(why)) == (("folded", True) if kind == "mps" else ("sdpa", False))
    resolve.check_asked(config, device)


def test_what_an_mps_is_not_trusted_with() -> None:
    assert resolve._candidates(Config.preset("tiny"), MPS) == ("fp32",)
    assert resolve._compile(Config.preset("smollm2-135m"), MPS, 1e12)[0] is False
    assert resolve._attention(Config.preset("tiny"), MPS, "fp32")[0] == "folded"
    for fields, told in (
        ({"train.determinism": "bitwise"}, "take same-data"),
        ({"train.dtype": "bf16", "train.attention": "sdpa"}, "take auto or folded"),
    ):
        with pytest.raises(UsageError, match=told):
            resolve.check_asked(Config.preset("tiny", fields), MPS)
    resolve.check_asked(Config.preset("tiny", {"train.dtype": "bf16", "train.attention": "folded"}), MPS)


def test_a_run_that_was_bitwise_is_not_on_a_device_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "default_device", lambda wanted: MPS)
    threads = torch.get_num_threads()
    try:
        assert machine.start(Config.preset("debug").train, "bitwise").determinism == "same-data"
        assert torch.get_deterministic_debug_mode() == 0
    finally:
        torch.set_num_threads(threads)


def test_memory_of_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"mem_get_info": (5 * GB, 16 * GB), "memory_reserved": 4 * GB, "memory_allocated": 1 * GB}
    for name, value in (told | {"max_memory_allocated": 7 * GB}).items():
        monkeypatch.setattr(f"torch.xpu.{name}", lambda device, value=value: value)
    assert memory.available_bytes(XPU) == 8 * GB, "what is free, and what PyTorch keeps for itself"
    assert memory.peak_bytes(XPU) == 7 * GB
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 12 * GB)
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 2 * GB)
    for free, available in ((64 * GB, 10 * GB), (3 * GB, 3 * GB)):
        monkeypatch.setattr(memory, "available_here", lambda root, free=free: free)
        assert memory.available_bytes(MPS) == available


def test_an_update_is_skipped_where_the_kernel_would_not_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an mps before PyTorch 2.13, whose kernel drops `found_inf`."""
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *given, found_inf, **options: kernel(*given, **options))
    monkeypatch.setattr(adamw, "SKIPS_ITSELF", ())
    weight, gradient = torch.ones(100), {"w": torch.full((100,), torch.nan)}
    optimizer = AdamW({0.1: {"w": weight}}, {}, betas=(0.9, 0.95), eps=1e-8)
    optimizer.step(gradient, 0.1, None, torch.tensor(True))
    assert weight.equal(torch.ones(100))
    assert not optimizer.exp_avg["w"].any()
    assert optimizer.updates == 0
    optimizer.step({"w": torch.ones(100)}, 0.1, None, torch.tensor(False))
    assert weight.less(1).all()
    assert optimizer.updates == 1


def test_copies_wait_for_themselves_where_no_memory_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[bool]()
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *_, non_blocking: waits.append(not non_blocking))
    Copies().of({"a": torch.ones(3)})
    assert waits == [True]


def test_numbers_are_heard_without_waiting_for_what_came_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose copies are made in the order of its queue: an event stands behind them, and it is waited for.

    Here they are made at once; whatever the number is later, the one that was told is heard.
    """
    events, number, count = list[str](), torch.tensor(1.5), torch.tensor(3)

    class Event:
        def record(self) -> None:
            events.append("record")

        def synchronize(self) -> None:
            events.append("wait")

    monkeypatch.setattr(devices, "COPIES_BESIDE", ("cpu",))
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(devices, "_pinned_like", torch.empty_like)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: events.append("read") or float(tensor))
    told = devices.Told([number, count])
    assert events == ["record"]
    number.fill_(7)
    assert told.hear() == [1.5, 3.0]
    assert events == ["record", "wait", "read", "read"]


def test_the_loop_hears_what_was_told_and_asks_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[Any]()
    monkeypatch.setattr(boundary, "_hear", lambda run, state, after, figures, seconds: heard.append(figures))
    late = boundary.Late(None, None)  # type: ignore[arg-type]
    for told, figures in (([2.5, 1.0, 0.0], (2.5, 1.0, 0, None)), ([2.5, 1.0, 4.0, 64.0], (2.5, 1.0, 4, 64.0))):
        figures_of_a_gpu = SimpleNamespace(hear=lambda told=told: told)
        late.put(SimpleNamespace(progress=None, told=figures_of_a_gpu, started_at=0.0, ended_at=1.0))  # type: ignore[arg-type]
        late.read()
        assert heard.pop() == figures


def test_a_gpu_takes_few_large_chunks_of_logits() -> None:
    """2^30 bytes are 5,461 rows of 49,152 ids in fp32, and some more; beside them they are there in bf16."""
    auto, given = (Config.preset("smollm2-135m", {"train.loss_chunk": chunk}) for chunk in ("auto", 512))
    assert resolve._loss_chunk(auto, CPU) == (1024, "more are no faster here")
    assert resolve._loss_chunk(auto, torch.device("cuda")) == (5504, "1.1 GB of them in fp32")
    assert resolve._loss_chunk(given, torch.device("cuda")) == (512, "as given")
    kinds = (CPU, torch.device("cuda"))
    on_cpu, on_gpu = (micro_batch.Training(auto, kind, "bf16", "sdpa").needs(4).loss for kind in kinds)
    head_gradients = 8 * 49152 * 576
    assert on_cpu - head_gradients == 2 * 1024 * 49152
    assert on_gpu - head_gradients == 6 * 5504 * 49152
    in_fp32 = micro_batch.Training(auto, kinds[1], "fp32", "sdpa").needs(4).loss
    assert in_fp32 == 4 * 5504 * 49152 + 12 * 49152 * 576
