"""Memory that runs out in the middle of a run: the step is done again with half as many rows at once.

The errors are injected: in a forward pass, in a backward pass, between the micro-batches of one step. Each step is two
micro-batches of 16 rows until then. A step that was done again must leave no trace of the attempt: so a run that ran
out of memory in its first step must equal, bit for bit, one that was given the smaller size from the start.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketlm import checkpoint
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.journal import Journal
from pocketlm.model.loss import linear_cross_entropy
from pocketlm.model.transformer import Transformer
from pocketlm.training import halving, resolve
from pocketlm.training import step as step_file
from pocketlm.training.loop import train
from pocketlm.training.micro_batch import OutOfMemory
from pocketlm.training.saving import regular_steps

ROWS, CONTEXT, STEPS = 32, 32, 100
FIELDS = {
    "train.total_steps": STEPS,
    "train.tokens_per_step": ROWS * CONTEXT,
    "train.micro_batch": 16,
    "train.eval_every": 0,
    "train.checkpoint_every": 20,
    "train.keep_last": 10,
    "sample.prompts": [],
}
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
Loss = Callable[..., Tensor]


class Killed(BaseException):
    """Ends a run where it stands, as nearly as that goes inside one process."""


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(MESSAGE)


class Faults:
    """Stands for the loss function, and fails in chosen calls: {number of the call: what happens}."""

    def __init__(self, faults: dict[int, str]) -> None:
        self.faults, self.calls = faults, 0
        self.rows: list[int] = []
        """Of each call."""

    def __call__(self, hidden: Tensor, *rest: Any, **options: Any) -> Tensor:
        fault, self.calls = self.faults.get(self.calls), self.calls + 1
        self.rows.append(len(hidden) // CONTEXT)
        if fault == "forward":
            raise torch.OutOfMemoryError(MESSAGE)
        if fault == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)
        if fault == "bug":
            raise RuntimeError("shapes cannot be multiplied")
        if fault == "kill":
            raise Killed
        loss = linear_cross_entropy(hidden, *rest, **options)
        return _FailingBackward.apply(loss) if fault == "backward" else loss  # type: ignore[no-untyped-call,no-any-return]


@pytest.fixture
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Faults]]:
    """Trains in `name` with faults, or goes on there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)

    def run(name: str, faults: dict[int, str] | None = None, **fields: Any) -> tuple[Path, Faults]:
        loss = Faults(faults or {})
        monkeypatch.setattr(step_file, "linear_cross_entropy", loss)
        return train(Config.preset("debug", FIELDS | fields), out=Path(name)), loss

    return run


def losses(run: Path) -> list[float]:
    records = [record for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def furthest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(mine - yours) for mine, yours in zip(ours, theirs, strict=True))


def halvings(run: Path) -> list[dict[str, Any]]:
    return [record for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "micro_batch"]


def newest(run: Path) -> Path:
    return checkpoint.list_checkpoints(run)[-1]


def weights_and_moments(run: Path) -> dict[str, bytes]:
    return {name: (newest(run) / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("call", [0, 1], ids=["first micro-batch", "second micro-batch"])
@pytest.mark.parametrize("where", ["forward", "backward", "cpu"])
def test_nothing_of_the_attempt_is_left(where: str, call: int, dtype: str, run_with: Any) -> None:
    fields = {"train.total_steps": 6, "train.dtype": dtype}
    disturbed, faults = run_with("disturbed", {call: where}, **fields)
    smaller, _ = run_with("smaller", **fields, **{"train.micro_batch": 8})
    assert faults.rows == [16] * (call + 1) + [8] * 4 * 6
    assert losses(disturbed) == losses(smaller)
    assert weights_and_moments(disturbed) == weights_and_moments(smaller)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_curve_stays(dtype: str, where: str, run_with: Any) -> None:
    """Within 1e-3 nats in fp32. In bf16 the same sizes, from the first step on, move it as far: 0.0004 to 0.005."""
    fields = {"train.dtype": dtype, "optim.lr": 2e-3}
    whole, _ = run_with("whole", **fields)
    at = 2 * 10 + 1  # the second micro-batch of step 11
    again = at + 1 + 4 * 30 + 2  # then of size 8: the third of step 41
    disturbed, faults = run_with("disturbed", {at: where, again: where}, **fields)
    assert set(faults.rows) == {16, 8, 4}
    assert [(r["step"], r["before"], r["micro_batch"]) for r in halvings(disturbed)] == [(10, 16, 8), (40, 8, 4)]
    assert MESSAGE in halvings(disturbed)[0]["reason"]
    ours, theirs = losses(disturbed), losses(whole)
    assert len(ours) == STEPS
    assert ours[:10] == theirs[:10]
    assert ours != theirs
    by_size = [run_with(f"of {size}", **fields, **{"train.micro_batch": size})[0] for size in (8, 4)]
    rounding = max(furthest(losses(run), theirs) for run in by_size)
    assert furthest(ours, theirs) < (1e-3 if dtype == "fp32" else rounding)
    assert theirs[-1] < theirs[0] - 1, "nothing was learned: close losses would mean little"


def test_a_resume_keeps_the_smaller_size(run_with: Any) -> None:
    at = 2 * 24
    whole, _ = run_with("whole", {at: "forward"})
    killed_at = at + 1 + 4 * 30  # in step 55
    with pytest.raises(Killed):
        run_with("killed", {at: "forward", killed_at: "kill"})
    run, faults = run_with("killed")
    assert faults.rows == [8] * 4 * (STEPS - 40), "it goes on from step 40, with the size of step 40"
    assert losses(run) == losses(whole)
    assert len(halvings(run)) == 1
    assert checkpoint.state_hash(newest(run)) == checkpoint.state_hash(newest(whole))
    state = checkpoint.read_state(newest(run))
    assert (state["micro_batch"], state["resolved"]["micro_batch"]) == (8, 16)


def test_what_was_halved_is_saved_with_the_step(run_with: Any) -> None:
    """Killed before the next regular checkpoint; the memory is there again, and the run computes as before all the
    same."""
    at = 2 * 24
    whole, _ = run_with("whole", {at: "forward"})
    with pytest.raises(Killed):
        run_with("killed", {at: "forward", at + 1 + 4 * 5: "kill"})  # in step 30
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(Path("killed"))] == [0, 20, 25]
    assert regular_steps(Path("killed")) == [0, 20], "nothing goes back to it"
    run, faults = run_with("killed")
    assert faults.rows == [8] * 4 * (STEPS - 25)
    assert losses(run) == losses(whole)
    assert len(halvings(run)) == 1
    assert checkpoint.state_hash(newest(run)) == checkpoint.state_hash(newest(whole))
    ran = tomllib.loads((run / "resolved.toml").read_text())
    assert ran["train"]["micro_batch"] == ran["resolved"]["micro_batch"] == 8
    assert "began with 16" in ran["resolved"]["reasons"]["micro_batch"]


def test_compiled_blocks_are_compiled_anew_for_the_smaller_size(run_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that does nothing; where it runs out of memory itself, that halves too."""
    compiled, forgotten, warmed, hidden = list[str](), list[str](), list[int](), Transformer.hidden

    def full_at_first(model: Transformer, ids: Tensor) -> Tensor:
        warmed.append(len(ids))
        if len(warmed) == 1:
            raise RuntimeError("CUDA driver error: out of memory")
        return hidden(model, ids)

    monkeypatch.setattr(resolve, "why_not_compile", lambda device: "")
    monkeypatch.setattr(Transformer, "compile_blocks", lambda model: compiled.append("blocks"))
    monkeypatch.setattr(Transformer, "hidden", full_at_first)
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append("all"))
    fields = {"train.compile": "on", "train.total_steps": 3, "train.eval_tokens": 32}
    run, faults = run_with("run", {5: "backward"}, **fields)
    assert [(record["step"], record["micro_batch"]) for record in halvings(run)] == [(0, 8), (1, 4)]
    assert faults.rows == [8] * 6 + [4] * 8 * 2
    assert (len(compiled), len(forgotten)) == (3, 2)
    assert warmed[:2] == [16, 8]


def test_what_was_halved_while_compiling_is_saved_with_the_first_step(
    run_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two regular checkpoints, where nothing else would save it; killed two steps later."""
    run_with("run", **{"train.stop_at_step": 25})
    compile_if_wanted, full = halving.compile_if_wanted, [True]

    def full_once(*arguments: Any) -> None:
        if full:
            full.clear()
            raise OutOfMemory("compiling")
        compile_if_wanted(*arguments)

    monkeypatch.setattr(halving, "compile_if_wanted", full_once)
    with pytest.raises(Killed):
        run_with("run", {4 * 2: "kill"})  # in step 28
    saved = newest(Path("run"))
    assert (checkpoint.step_of(saved), checkpoint.read_state(saved)["micro_batch"]) == (26, 8)
    _, faults = run_with("run")
    assert faults.rows == [8] * 4 * (STEPS - 26)


def test_a_run_that_goes_back_keeps_the_smaller_size(run_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 2 * 24

    class Broken(Faults):
        def __call__(self, *rest: Any, **options: Any) -> Tensor:
            loss = super().__call__(*rest, **options)
            return loss * math.nan if 61 <= self.calls < 72 else loss

    monkeypatch.setattr("test_out_of_memory.Faults", Broken)
    run, faults = run_with("run", {at: "forward"}, **{"guard.max_skips": 0})
    kinds = [record["kind"] for record in Journal.read(run / "metrics.jsonl")]
    assert "rollback" in kinds
    assert 16 not in faults.rows[at + 1 :]


def test_going_back_for_the_step_before_a_halving_keeps_the_smaller_size(
    run_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 31 is one skip too many; that is read when step 32 has been done, after memory ran out in it."""
    at = 2 * 31

    class Broken(Faults):
        def __call__(self, *rest: Any, **options: Any) -> Tensor:
            loss = super().__call__(*rest, **options)
            return loss * math.nan if self.calls == at else loss

    monkeypatch.setattr("test_out_of_memory.Faults", Broken)
    run, faults = run_with("run", {at: "forward"}, **{"guard.max_skips": 0, "train.total_steps": 40})
    back = [record for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "rollback"]
    assert [(record["from_step"], record["step"]) for record in back] == [(31, 20)]
    assert faults.rows[at + 1 :] == [8] * 4 * (1 + 20)


def test_at_one_row_it_ends_and_what_was_saved_stands(
    run_with: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = 2 * 25
    monkeypatch.setattr(step_file, "linear_cross_entropy", Faults({call: "forward" for call in range(first, 999)}))
    words = ["train", "debug", "--out", "run", "--sample.prompts", "[]"]
    flags = {name: value for name, value in FIELDS.items() if name != "sample.prompts"}
    words += [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(words) == 2
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("pocketlm: step 26: one row at once does not fit into memory (CUDA out of memory")
    assert "what was saved before stands" in last
    assert "8 rows at once instead of 16" in said
    assert checkpoint.step_of(newest(Path("run"))) == 20
    checkpoint.verify(newest(Path("run")))
    run, _ = run_with("run")  # with room again
    whole, _ = run_with("whole")
    assert losses(run) == losses(whole)


def test_other_errors_are_not_taken_for_it(run_with: Any) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_with("run", {3: "bug"})


def test_the_update_is_never_done_twice(run_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr("pocketlm.optim.optimizer.Optimizer.step", full)
    from pocketlm.errors import ConfigError

    with pytest.raises(ConfigError, match="step 1: the update does not fit into memory") as refused:
        run_with("run")
    assert str(refused.value).endswith("or give a new --out with a smaller preset"), "fewer rows would not help"
    assert halvings(Path("run")) == []
