"""What `pocketlm plan` and `pocketlm bench` print, take and refuse; and how an interrupted bench ends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketlm.cli import bench
from pocketlm.cli.main import main
from pocketlm.cli.plan import DEVICES
from pocketlm.training import probe, resolve
from pocketlm.training import step as step_file


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def out_of(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    assert main(list(words)) == code
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_plan_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = out_of(capsys, "plan", "debug", "--train.total-steps", "7")
    assert "\x1b" not in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "parameters 26,816",
        "steps 7",
        "tokens 1,792",
        "evaluations 2",
        "checkpoints 3",
        "data not prepared yet",
    ):
        assert line in lines
    assert err.splitlines()[-1] == "next: pocketlm train debug --train.total-steps=7"
    assert list(Path().iterdir()) == [], "a plan leaves nothing behind"


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = out_of(capsys, "plan", "debug", "--json")
    tree = json.loads(out)
    assert {
        "parameters",
        "flops",
        "tokens",
        "time_s",
        "memory_bytes",
        "disk_bytes",
        "energy_j",
        "left_out",
    } <= tree.keys()
    assert (tree["parameters"], tree["tokens"], tree["steps"]) == (26_816, 60 * 256, 60)
    assert set(tree["time_s"]) == {"start_up", "steps", "evaluations", "checkpoints", "total"}
    assert tree["assumed_mfu"] is None


def test_an_interrupted_plan_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when some steps were measured: nothing is known of evaluations then, and little of the steps."""
    interrupt_at(monkeypatch, 2 + 4)
    out, _ = out_of(capsys, "plan", "debug", "--json", code=130)
    assert out == ""


def test_plan_of_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = out_of(capsys, "plan", "smollm2-1.7b", "--device", "L4", "--devices", "8")
    assert out.startswith("smollm2-1.7b on 8 x L4, which is not here: an estimate, bf16, ")
    assert "of each, fsdp\n" in out
    assert err.splitlines()[-1] == "next: pocketlm train smollm2-1.7b --devices 8"
    for flags, told in (
        (("--devices", "2"), "name a GPU"),
        (("--device", "L4", "--devices", "0"), "whole number >= 1"),
    ):
        out, err = out_of(capsys, "plan", "debug", *flags, code=2)
        assert out == ""
        assert told in err


def test_the_next_command_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    field = '--sample.prompts=["Once upon", "a"]'
    _, err = out_of(capsys, "plan", "tiny", "--device", "H100", field)
    assert shlex.split(err.splitlines()[-1]) == ["next:", "pocketlm", "train", "tiny", field]


def test_plan_for_another_device_needs_no_probe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketlm.training.plan.probe", None)
    out, err = out_of(capsys, "plan", "smollm2-135m", "--device", "h100", "--train.dtype", "bf16")
    assert out.startswith("smollm2-135m on H100, which is not here: an estimate, bf16")
    assert "time, assuming 35 % MFU" in out
    assert err == "next: pocketlm train smollm2-135m --train.dtype=bf16\n"


def test_plan_refuses_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = out_of(capsys, "plan", "smallm", "--device", "H10", code=2)
    assert err == f"pocketlm: no device 'H10' in the table; did you mean H100?; devices: {DEVICES}\n"
    _, err = out_of(capsys, "plan", "smallish", code=2)
    assert "did you mean smallm?" in err


def test_plan_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.training.micro_batch.available_bytes", lambda device: 10**9)
    out, err = out_of(capsys, "plan", "smollm2-1.7b", "--data.tokenizer", "byte", code=2)
    assert out == ""
    assert "take a smaller preset" in err.splitlines()[-1]


def test_plan_on_a_terminal_draws_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out, _ = out_of(capsys, "plan", "debug")
    assert "26,816" in out
    assert "─" in out or "━" in out


# --- bench


@pytest.fixture
def small_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DEFAULT", {"debug": {}, "tiny": {"model.hidden_size": 64, "train.threads": 1}})


def test_bench_of_one_preset_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = out_of(capsys, "bench", "debug", "--steps", "3", "--json")
    result = json.loads(out)
    assert {"tokens_per_s", "mfu", "peak_memory_bytes"} <= result.keys()
    assert result["steps"] == 3
    assert result["step_tokens"] == 256
    assert 0 < result["tokens_per_s_lowest"] <= result["tokens_per_s"] <= result["tokens_per_s_highest"]
    assert result["mfu"] == pytest.approx(result["tokens_per_s"] * 172_224 / 1e9)
    assert result["peak_memory_bytes"] > 10**7
    assert result["interrupted"] is False


def test_bench_counts_no_step_twice_and_leaves_the_warm_up_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[probe.Probed]()
    original = probe.probe

    def kept(*rest: Any, **options: Any) -> probe.Probed:
        made.append(original(*rest, **options))
        return made[-1]

    monkeypatch.setattr(probe, "probe", kept)
    fields = ["--train.tokens-per-step", "1024", "--train.micro-batch", "8"]
    out, _ = out_of(capsys, "bench", "debug", "--steps", "4", "--json", *fields)
    (probed,) = made
    assert (probed.long, probed.num_micro_batches) == (4, 4)
    assert (len(probed.long_s), len(probed.short_s)) == (4, 1)
    assert json.loads(out)["tokens_per_s_lowest"] == pytest.approx(1024 / max(probed.long_s))


def test_bench_without_a_preset_takes_the_default_ones(small_default: None, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = out_of(capsys, "bench", "--steps", "2")
    lines = out.strip().splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["debug", "tiny"]
    assert lines[-1].startswith("pocketlm 0.")
    assert f"torch {torch.__version__}, bf16/fp32: debug " in lines[-1] or ", fp32: debug " in lines[-1]
    assert "tok/s" in lines[-1]
    out, _ = out_of(capsys, "bench", "--steps", "2", "--json")
    assert [result["preset"] for result in json.loads(out)] == ["debug", "tiny"]


def test_bench_goes_on_where_one_of_the_default_presets_does_not_fit(
    small_default: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketlm.training.micro_batch.available_bytes", lambda device: 10**7)
    out, err = out_of(capsys, "bench", "--steps", "2", "--json")
    assert [result["preset"] for result in json.loads(out)] == ["debug"]
    assert "tiny needs about" in err


def test_a_bench_of_which_nothing_fits_has_failed(
    small_default: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketlm.training.micro_batch.available_bytes", lambda device: 10)
    out, err = out_of(capsys, "bench", "--steps", "2", "--json", code=2)
    assert out == ""
    assert err.splitlines()[-1] == "pocketlm: none of debug, tiny fits; type: pocketlm bench debug"


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ctrl-C comes in the nth micro-batch."""
    calls, original = list[int](), step_file.linear_cross_entropy

    def loss(*rest: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*rest, **options)

    monkeypatch.setattr(step_file, "linear_cross_entropy", loss)


def test_an_interrupted_bench_tells_what_it_has_measured(
    small_default: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 2 + 4)
    out, _ = out_of(capsys, "bench", "--steps", "9", "--json", code=130)
    (result,) = json.loads(out)
    assert (result["preset"], result["steps"], result["interrupted"]) == ("debug", 3, True)


def test_bench_and_plan_take_fewer_rows_where_memory_runs_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = step_file.linear_cross_entropy

    def loss(hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(hidden) > 2 * 32:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(hidden, *rest, **options)

    monkeypatch.setattr(step_file, "linear_cross_entropy", loss)
    out, _ = out_of(capsys, "bench", "debug", "--steps", "2", "--json")
    assert json.loads(out)["micro_batch"] == 2
    out, err = out_of(capsys, "plan", "debug", "--json")
    assert json.loads(out)["micro_batch"] == 2
    assert "out of memory: 4 rows at once instead of 8" in err
    monkeypatch.setattr(step_file, "linear_cross_entropy", lambda *_, **__: loss(torch.empty(999)))
    _, err = out_of(capsys, "bench", "debug", code=2)
    assert err.splitlines()[-1] == "pocketlm: debug: one row at once does not fit into memory (CUDA out of memory.)"


def test_a_bench_that_is_interrupted_at_once_says_nothing(
    small_default: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 1)
    out, _ = out_of(capsys, "bench", "--json", code=130)
    assert out == ""


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_bench_refuses_a_number_of_steps_that_is_none(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = out_of(capsys, "bench", "debug", f"--steps={steps}", code=2)
    assert err == f"pocketlm: --steps: given '{steps}', allowed is a number from 1 on\n"
