"""Stopped at any step, and at every boundary that a step can have, the run goes on as if it had not been."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import oracle
import pytest
from rig import Child, Hold, Rig, Zygote, flags
from world import EVERY, MICRO_BATCHES, STEPS, TRAIN, Whole, trained

SHORT = (1, 5, 27, 57, 59, 60)  # the first, one with a checkpoint, one without, the epoch's end, the last two


def stop_at(step: int) -> list[str]:
    return [*TRAIN, "--train.stop-at-step", str(step)]


def stopped_in(rig: Rig, *hold: Any, words: list[str] = TRAIN, phases: tuple[str, ...] = ()) -> Child:
    """A run that was in the nth of a phase when SIGTERM came; it left politely."""
    child = rig.start(words, phases=phases, holds=[hold])
    child.reach(*hold)
    child.kill(signal.SIGTERM)
    child.release()
    assert child.wait() == 143, child.stderr
    oracle.assert_whole(rig.folder / "run")
    return child


def records(run: Path, kind: str, step: int) -> int:
    return sum((record["kind"], record["step"]) == (kind, step) for record in oracle.journal(run))


@pytest.mark.goal("R3")
def test_stopped_at_every_step(proof: Any, zygote: Zygote, tmp_path: Path, whole: Whole) -> None:
    for case in proof.cases(len(SHORT), STEPS):
        step = case + 1 if proof.long else SHORT[case]
        folder = tmp_path / str(step)
        folder.mkdir()
        with Rig(zygote, folder) as rig:
            rig.run(stop_at(step))
            assert oracle.steps(folder / "run")[-1] == trained(folder / "run") == step
            rig.run(TRAIN)
        oracle.assert_equal(folder / "run", whole.run)
        shutil.rmtree(folder)


@pytest.mark.goal("R3")
def test_stopped_where_an_epoch_ends(rig: Rig) -> None:
    rows, context = 151, 32
    words = ["train", "debug", *flags({"train.tokens_per_step": rows * context, "train.total_steps": 16})]
    first = rig.run([*words, "--out", "run", "--train.stop-at-step", "12"])
    assert re.search(rf"; {12 * rows:,} rows of {context},", first.stderr), "no epoch ends after step 12"
    rig.run([*words, "--out", "run"])
    rig.run([*words, "--out", "whole"])
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R3")
def test_stopped_in_the_last_step(rig: Rig, whole: Whole) -> None:
    stopped_in(rig, "step", STEPS)
    assert oracle.steps(rig.folder / "run")[-1] == trained(rig.folder / "run") == STEPS - 1
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R3")
def test_stopped_before_the_first_step_is_done(rig: Rig, whole: Whole) -> None:
    stopped_in(rig, "step", 1)
    assert trained(rig.folder / "run") == 0
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R3")
@pytest.mark.parametrize("hold", [("evaluation", 1), ("forward", EVERY * MICRO_BATCHES + 2)])
def test_an_evaluation_is_abandoned_and_done_again_once(hold: Hold, rig: Rig, whole: Whole) -> None:
    child = stopped_in(rig, *hold, phases=("evaluation",))
    assert "evaluation" in {event.phase for event in child.events}, "the signal came before"
    assert trained(rig.folder / "run") == oracle.steps(rig.folder / "run")[-1] == EVERY
    assert records(rig.folder / "run", "eval", EVERY) == 0
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R3")
@pytest.mark.parametrize("hold", [("sample", 1), ("forward", 6 * MICRO_BATCHES + 2), ("record", 6 + 1)])
def test_a_sample_is_abandoned_and_drawn_again_once(hold: Hold, rig: Rig) -> None:
    """The last hold is between the first prompt's record and the second prompt."""
    fields = {"train.total_steps": 12, "train.eval_every": 0, "sample.every": 6, "sample.prompts": '["the ", "a "]'}
    words = [*TRAIN, *flags(fields)]
    child = stopped_in(rig, *hold, words=words, phases=("sample",))
    assert "sample" in {event.phase for event in child.events}, "the signal came before"
    assert trained(rig.folder / "run") == oracle.steps(rig.folder / "run")[-1] == 6
    rig.run(words)
    rig.run([*words, "--out", "whole"])
    assert records(rig.folder / "run", "sample", 6) == 2
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R3")
def test_stopped_in_the_middle_of_an_accumulation(rig: Rig, whole: Whole) -> None:
    stopped_in(rig, "forward", 3 * MICRO_BATCHES + 1)
    assert trained(rig.folder / "run") == oracle.steps(rig.folder / "run")[-1] == 3
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R3", "R14")
def test_stopped_after_a_skipped_step(rig: Rig) -> None:
    """A rate so high that the loss soon leaps."""
    fields = {"train.total_steps": 12, "optim.lr": 0.3, "optim.clip": "none"}
    guard = {"guard.window": 4, "guard.spike_sigma": 0.5, "guard.max_skips": 4}
    words = ["train", "debug", *flags(fields | guard)]
    rig.run([*words, "--out", "run", "--train.stop-at-step", "5"])
    run = rig.folder / "run"
    assert records(run, "skip", 5) == 1
    assert records(run, "train", 1) == 1
    rig.run([*words, "--out", "run"])
    rig.run([*words, "--out", "whole"])
    assert oracle.steps(run)[-1] == 12
    oracle.assert_equal(run, rig.folder / "whole")


@pytest.mark.goal("R3")
def test_goes_on_with_other_free_fields(rig: Rig, whole: Whole) -> None:
    free = {"train.log_every": 1, "train.keep_last": 5, "train.keep_best": 0, "train.checkpoint_every": 3}
    rig.run([*stop_at(23), *flags(free)])
    assert oracle.steps(rig.folder / "run") == [12, 15, 18, 21, 23]
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R3")
def test_stopped_twice_in_a_row(rig: Rig, whole: Whole) -> None:
    """Also where the second process has not done a step: its state stands already."""
    for step in (21, 22):
        rig.run(stop_at(step))
    for _ in range(2):
        stopped_in(rig, "step", 1)
        assert oracle.steps(rig.folder / "run")[-1] == 22
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R3")
def test_a_finished_run_is_left_alone(rig: Rig, whole: Whole) -> None:
    shutil.copytree(whole.run, rig.folder / "run")
    before = contents(rig.folder / "run")
    again = rig.run(TRAIN, phases=("step", "save"))
    assert f"run is complete: step {STEPS} of {STEPS}" in again.stderr
    assert again.events == []
    assert contents(rig.folder / "run") == before


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.goal("R3")
def test_goes_on_from_a_named_checkpoint(rig: Rig, whole: Whole) -> None:
    keep = ["--train.keep-last", "9"]
    rig.run([*stop_at(18), *keep])
    run = rig.folder / "run"
    rig.run([*TRAIN, *keep, "--resume", "run/checkpoints/step-00000010"])
    oracle.assert_equal(run, whole.run)
    for step in (15, 18):
        assert (run / f"checkpoints/step-{step:08d}.set-aside/manifest.json").exists(), "nothing is lost"


@pytest.mark.goal("R3")
def test_goes_on_from_the_one_before_a_damaged_one(rig: Rig, whole: Whole) -> None:
    rig.run(stop_at(18))
    damaged = oracle.newest(rig.folder / "run") / "training" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    child = rig.run(TRAIN)
    assert str(damaged.relative_to(rig.folder)) in child.stderr
    assert "going on from step 15" in child.stderr
    oracle.assert_equal(rig.folder / "run", whole.run)
