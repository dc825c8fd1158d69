"""What a run does with numbers that are none and with leaps of the loss, and that a stop in between changes nothing.

Faults are put in by the data's position, as bad data would be: rows that were left out do not come back.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from inside import Dead, Killed, poison
from safetensors.numpy import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pocketlm import checkpoint, files, machine
from pocketlm.config import Config, GuardConfig, OptimConfig
from pocketlm.errors import Diverged, FileError, Interrupted
from pocketlm.journal import Journal
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate
from pocketlm.optim.clip import clip_coefficient, global_norm
from pocketlm.optim.optimizer import Optimizer
from pocketlm.training import boundary, halving, step
from pocketlm.training.guard import APPLIED, Guard, Trouble
from pocketlm.training.loop import train
from pocketlm.training.resolve import resolve
from pocketlm.training.run import Run, new_state
from pocketlm.training.scaler import LossScaler
from pocketlm.training.signals import StopRequest
from pocketlm.training.state import TrainState
from proof import Proof

ROWS = 8  # of a step
CLOCKS = {"elapsed_s", "tokens_per_s", "mfu"}
BASE = {"train.eval_every": 10, "train.checkpoint_every": 5, "guard.window": 8, "guard.max_skips": 3}
FAULTS = ("loss", "gradient", "moment", "weight")


def config_of(**fields: Any) -> Config:
    return Config.preset("debug", BASE | {name.replace("__", "."): value for name, value in fields.items()})


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def only_finite_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint that is ever committed is read by another library, and must be finite."""
    save = checkpoint.save

    def checked(checkpoints: Path, snapshot: checkpoint.Snapshot) -> Path:
        folder = save(checkpoints, snapshot)
        for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
            assert all(np.isfinite(tensor).all() for tensor in load_file(folder / name).values()), folder
        return folder

    monkeypatch.setattr(checkpoint, "save", checked)


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    found = Journal.read(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in found if record["kind"] in kinds]


@contextlib.contextmanager
def steps_wrapped(around: Callable[[TrainState, Callable[[], step.Outcome]], step.Outcome]) -> Iterator[None]:
    """Training whose every step goes through `around`."""
    real = halving.train_step

    def wrapped(state: TrainState, *arguments: Any, **options: Any) -> step.Outcome:
        return around(state, lambda: real(state, *arguments, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "train_step", wrapped)
        yield


def break_at(position: int, fault: str, value: float) -> contextlib.AbstractContextManager[None]:
    """Puts `value` into the step that reads the rows from `position` on."""

    def around(state: TrainState, run_step: Callable[[], step.Outcome]) -> step.Outcome:
        if state.progress.position != position:
            return run_step()
        parameter = next(iter(state.precision.model.parameters()))
        if fault == "weight":
            parameter.data.view(-1)[7] = value
            state.precision.refresh()
        if fault == "moment":
            next(iter(state.optimizer.tensors().values())).view(-1)[7] = value
        if fault in ("weight", "moment"):
            return run_step()
        before = everything(state)
        with gradient_broken(state, value) if fault == "gradient" else loss_broken(value):
            done = run_step()
        assert everything(state) == before, "nothing was applied"
        return done

    return steps_wrapped(around)


@contextlib.contextmanager
def gradient_broken(state: TrainState, value: float) -> Iterator[None]:
    def broken(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[3] = value
        return gradient

    hook = list(state.precision.compute.parameters())[-2].register_hook(broken)
    yield
    hook.remove()


@contextlib.contextmanager
def loss_broken(value: float) -> Iterator[None]:
    real = step.linear_cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "linear_cross_entropy", lambda *a, **o: real(*a, **o) * value)
        yield


def everything(state: TrainState) -> dict[str, bytes]:
    """All that a step which is not applied must leave alone, as bytes."""
    computed = {f"computed {name}": tensor for name, tensor in state.precision.compute.named_parameters()}
    tensors = dict(state.precision.model.named_parameters()) | computed | state.tensors()
    found = {name: tensor.detach().float().numpy().tobytes() for name, tensor in tensors.items()}
    return found | {"updates": bytes(str(state.optimizer.updates), "ascii")}


@pytest.mark.goal("R13")
def test_what_is_not_finite_never_reaches_weights_or_disk(proof: Proof) -> None:
    kinds = [{"optim__kind": kind, "train__dtype": dtype} for kind in ("adamw", "muon") for dtype in ("fp32", "bf16")]
    all_cases = list(product(FAULTS, (math.nan, math.inf), kinds))
    for case in proof.cases(12, len(all_cases)):
        rng = proof.random(case)
        fault, value, kind = all_cases[case] if proof.long else rng.choice(all_cases)
        broken, run = rng.randrange(1, 30), Path(f"run-{case}")
        with break_at(broken * ROWS, fault, value):
            train(config_of(**kind, train__total_steps=30), out=run)
        final = checkpoint.read_state(checkpoint.list_checkpoints(run)[-1])
        assert final["step"] == 30
        if fault in ("loss", "gradient"):
            (skip,) = records(run, "skip")
            assert skip["step"] == broken + 1
            assert fault in skip["reason"]
            assert (final["updates"], final["position"], final["rollbacks"]) == (29, 30 * ROWS, 0)
        else:
            (back,) = records(run, "rollback")
            assert back["step"] <= broken < back["from_step"]
            assert final["rollbacks"] == 1
            assert final["position"] == 30 * ROWS + back["rows_left_out"]
            assert final["updates"] == 30
        assert all(math.isfinite(record["loss"]) for record in records(run, "train", "eval"))


@pytest.mark.goal("R14")
def test_leaps_are_skipped_and_only_they(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {20, 30, 31, 50}
    poison(monkeypatch, {index * ROWS for index in bad})
    run = train(config_of(), out=Path("run"))
    assert [(record["step"] - 1, record["reason"]) for record in records(run, "skip")] == [
        (index, "the loss leaps") for index in sorted(bad)
    ]
    final = checkpoint.read_state(checkpoint.list_checkpoints(run)[-1])
    assert (final["step"], final["updates"], final["position"]) == (60, 56, 60 * ROWS)
    assert records(run, "rollback") == []


@pytest.mark.goal("R14")
def test_too_many_leaps_lead_back_and_past_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {index * ROWS for index in range(22, 26)})
    run = train(config_of(), out=Path("run"))
    (back,) = records(run, "rollback")
    assert (back["step"], back["from_step"], back["rows_left_out"]) == (20, 26, 6 * ROWS)
    assert [record["step"] for record in records(run, "train")] == list(range(1, 61))
    final = checkpoint.read_state(checkpoint.list_checkpoints(run)[-1])
    assert (final["step"], final["updates"], final["position"]) == (60, 60, 66 * ROWS)


@pytest.mark.goal("R14")
def test_too_many_times_back_end_the_run_with_exit_code_4_and_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """A loss that is none from the 13th step of data on."""

        def __call__(self, state: TrainState, run_step: Callable[[], step.Outcome]) -> step.Outcome:
            if state.progress.position < 12 * ROWS:
                return run_step()
            with loss_broken(math.nan):
                return run_step()

    with steps_wrapped(Broken()), pytest.raises(Diverged, match=r"gone back 2 time\(s\), as often as it may") as caught:
        train(config_of(guard__max_rollbacks=2), out=Path("run"))
    assert caught.value.exit_code == 4
    run = Path("run")
    assert len(records(run, "rollback")) == 2
    assert "gone back from step 16: 4 of the last 8 steps were skipped" in (run / "report.html").read_text()
    assert checkpoint.step_of(checkpoint.list_checkpoints(run)[-1]) == 10
    for path in checkpoint.list_checkpoints(run):
        checkpoint.verify(path)


@pytest.mark.goal("R14")
def test_a_stop_anywhere_changes_nothing_of_skips_and_rollbacks(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {index * ROWS for index in (18, 22, 24, 26, 27, 44, 50, 51, 52, 53)})
    whole = train(config_of(), out=Path("whole"))
    assert len(records(Path("whole"), "rollback")) == 2
    assert len(records(Path("whole"), "skip")) >= 2
    stops = list(range(1, 60))
    for case in proof.cases(8, len(stops)):
        stop = stops[case] if proof.long else proof.random(case).choice(stops)
        run = Path(f"stopped-{case}")
        train(config_of(train__stop_at_step=stop), out=run)
        train(config_of(train__stop_at_step=min(stop + 3, 60)), out=run)
        train(config_of(), out=run)
        oracle.assert_equal(run, whole)


def nan_at(*indices: int) -> contextlib.AbstractContextManager[None]:
    """A loss that is none in the steps that read these rows."""

    def around(state: TrainState, run_step: Callable[[], step.Outcome]) -> step.Outcome:
        with loss_broken(math.nan) if state.progress.position // ROWS in indices else contextlib.nullcontext():
            return run_step()

    return steps_wrapped(around)


@pytest.mark.goal("R14")
def test_every_checkpoint_that_may_be_gone_back_to_is_kept(proof: Proof) -> None:
    """The window is far longer than the way between checkpoints, and skips leave it one by one."""
    config = config_of(guard__window=30)
    with nan_at(5, 17, 37, 38, 39):
        whole = train(config, out=Path("whole"))
        (back,) = records(whole, "rollback")
        assert (back["step"], back["skipped"]) == (15, [18, 38, 39, 40])
        for case in proof.cases(6, 59):
            stop, run = case + 1 if proof.long else (6, 18, 37, 38, 39, 41)[case], Path(f"stopped-{case}")
            train(config_of(guard__window=30, train__stop_at_step=stop), out=run)
            train(config, out=run)
            oracle.assert_equal(run, whole)


@pytest.mark.goal("R14")
def test_a_checkpoint_that_a_signal_made_where_trouble_is_found_is_not_gone_back_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The validation loss at step 20 is none, and a signal comes in that very evaluation."""
    evaluate, evaluate_stream = boundary.evaluate, boundary.evaluate_stream

    def broken_at_20(run: Run, state: TrainState, stop: StopRequest) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if state.progress.position == 20 * ROWS:
                if signalled.pop():
                    os.kill(os.getpid(), signal.SIGTERM)
                patch.setattr(
                    boundary, "evaluate_stream", lambda *a, **o: replace(evaluate_stream(*a, **o), loss=math.nan)
                )
            evaluate(run, state, stop)

    monkeypatch.setattr(boundary, "evaluate", broken_at_20)
    signalled = [False, False, True]  # what happens in the evaluations at step 20, the first one last
    with pytest.raises(Interrupted, match="at step 20, saved"):
        train(config_of(), out=Path("run"))
    run, whole = (train(config_of(), out=Path(name)) for name in ("run", "whole"))
    (back,) = records(whole, "rollback")
    assert (back["step"], back["from_step"]) == (15, 20)
    oracle.assert_equal(run, whole)


def test_other_checkpoints_than_before_do_not_lose_the_way_back() -> None:
    train(config_of(train__stop_at_step=20), out=Path("run"))
    with break_at(23 * ROWS, "weight", math.nan):
        run = train(config_of(train__checkpoint_every=25), out=Path("run"))
    (back,) = records(run, "rollback")
    assert back["step"] == 20


@pytest.mark.goal("R2", "R14")
@pytest.mark.parametrize("way", ["rollback", "--resume"])
def test_killed_at_any_operation_of_a_way_back(way: str, proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rollback, or the resume from step 10, every operation of the disk in turn is the last one.

    Of the saves on the way, and of all else.
    """
    poisoned = {index * ROWS for index in range(22, 26)} if way == "rollback" else set()
    poison(monkeypatch, poisoned)
    whole = train(config_of(train__total_steps=32), out=Path("whole"))
    train(config_of(train__total_steps=32, train__stop_at_step=24, train__keep_last=9), out=Path("before"))
    resume = "auto" if way == "rollback" else "run/checkpoints/step-00000010"

    def attempt(at: int, beside: bool) -> int:
        """How many operations were left."""
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("before", "run")
        disk = Dead(at, beside=beside)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(files, "DISK", disk)
            train(config_of(train__total_steps=32, train__keep_last=9), out=Path("run"), resume=resume)
            return disk.left
        disk.bury()
        return 0

    many = 10_000
    ways = [(at, beside) for beside in (True, False) for at in range(many - attempt(many, beside))]
    for case in proof.cases(10, len(ways)):
        attempt(*ways[case] if proof.long else proof.random(case).choice(ways))
        run = train(config_of(train__total_steps=32, train__keep_last=9), out=Path("run"))
        oracle.assert_equal(run, whole)


def test_the_host_does_not_wait_between_loss_and_update() -> None:
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            assert "local_scalar" not in str(op), "the host reads a number"
            return op(*arguments, **(options or {}))

    guard, loss = Guard(GuardConfig(), torch.device("cpu")), torch.tensor(3.0)
    scaler = LossScaler(torch.device("cpu"))
    model = allocate(Config.preset("debug").model)
    init_weights(model, Config.preset("debug").init, 0)
    optimizer = Optimizer(dict(model.named_parameters()), OptimConfig(kind="muon"))
    gradients = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    with NoWaiting():
        norm = global_norm(gradients.values())
        verdict = scaler.judge(guard.verdict(loss, norm))
        optimizer.step(gradients, 1.0, 0, 10, skip=verdict != APPLIED, clip=clip_coefficient(norm, 1.0))
    assert int(verdict) == APPLIED


def state_of(config: Config) -> TrainState:
    runtime = machine.start(config.train, None)
    return new_state(config, resolve(config, runtime), runtime)


def test_numbers_that_are_only_large_are_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """The square of 1e30 is infinite in fp32; the number is not."""
    monkeypatch.setattr("pocketlm.training.resolve.PROBE_S", 0.001)
    state = state_of(config_of())
    state.check_finite()
    moments = state.tensors()
    name = next(name for name in moments if name.startswith("exp_avg_sq."))
    moments[name].view(-1)[5] = 1e30
    state.check_finite()
    for value in (math.nan, math.inf, -math.inf):
        moments[name].view(-1)[6] = value
        with pytest.raises(Trouble, match=f"{name} is not finite"):
            state.check_finite()


def test_a_skip_of_long_ago_does_not_lead_far_back() -> None:
    with break_at(11 * ROWS, "loss", math.nan), break_at(41 * ROWS, "weight", math.nan):
        run = train(config_of(), out=Path("run"))
    (back,) = records(run, "rollback")
    assert back["step"] == 40
    assert checkpoint.step_of(checkpoint.list_checkpoints(run)[0]) > 11, "nor is its checkpoint kept"


def test_logits_that_are_none_are_trouble_and_no_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    real, draws = boundary.LanguageModel.stream, list[int]()

    def stream(*arguments: Any, **options: Any) -> Any:
        draws.append(1)
        if len(draws) == 2:
            raise FileError("the model's logits are not finite")
        return real(*arguments, **options)

    monkeypatch.setattr(boundary.LanguageModel, "stream", stream)
    run = train(config_of(train__total_steps=30, sample__every=10), out=Path("run"))
    (back,) = records(run, "rollback")
    assert (back["step"], back["from_step"]) == (15, 20)
    assert [record["step"] for record in records(run, "sample")] == [10, 20, 30]


def test_a_validation_loss_that_is_none_is_trouble_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real, evaluations = boundary.evaluate_stream, list[int]()

    def evaluate_stream(*arguments: Any, **options: Any) -> Any:
        report = real(*arguments, **options)
        evaluations.append(len(evaluations))
        return type(report)(**(report.tree() | {"loss": math.nan})) if len(evaluations) == 2 else report

    monkeypatch.setattr(boundary, "evaluate_stream", evaluate_stream)
    run = train(config_of(train__total_steps=30), out=Path("run"))
    (back,) = records(run, "rollback")
    assert (back["step"], back["from_step"], back["reason"]) == (15, 20, "the validation loss is nan")
