"""A run that gets more steps becomes the run that was begun with them, killed and taken up anywhere on the way."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from inside import Dead, Killed
from rig import Rig, flags

from pocketlm import checkpoint, files
from pocketlm.config import Config
from pocketlm.errors import ConfigError, FileError
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from proof import Proof

# 20 steps, 4 of them warm-up; wsd decays from step 14. Checkpoints at the multiples of 3: no end is one of them.
BASE = {"train.total_steps": 20, "train.checkpoint_every": 3, "train.eval_every": 5, "train.eval_tokens": 320}
BRIEF = {"sample.max_new_tokens": 4}
SHAPE = {"schedule.warmup_fraction": 0.2, "schedule.decay_fraction": 0.3}
KINDS = ("cosine", "linear", "wsd", "constant")


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pocketlm.training.resolve.PROBE_S", 0.001)


def fields_of(kind: str, **fields: Any) -> dict[str, Any]:
    return (
        BASE
        | BRIEF
        | SHAPE
        | {"schedule.kind": kind}
        | {name.replace("__", "."): value for name, value in fields.items()}
    )


def config_of(kind: str, **fields: Any) -> Config:
    return Config.preset("debug", fields_of(kind, **fields))


def begun_with_all(kind: str, *ends: int, **fields: Any) -> Path:
    """The undisturbed run of the last of these steps, which knew from its beginning where it would end before."""
    again = {"cosine": 0.1, "linear": 0.1, "constant": 1.0}
    plan: dict[str, Any] = {"train__total_steps": ends[-1]}
    if kind == "wsd":  # no more than a run of so many steps, with the warm-up and the momentum of the shorter one
        plan |= {"schedule__begun_with": ends[0]}
    else:
        plan |= {"schedule__continued_at": ends[:-1], "schedule__continued_to": [again[kind]] * (len(ends) - 1)}
    return train(config_of(kind, **plan | fields), out=Path(f"whole-{kind}"))


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def rates(run: Path) -> list[float]:
    return [record["lr"] for record in oracle.journal(run) if record["kind"] == "train"]


# --- continued


@pytest.mark.goal("R3")
@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [("cosine", "muon"), ("linear", "adamw"), ("wsd", "adamw"), ("wsd", "muon"), ("constant", "adamw")],
)
def test_continued_twice_it_is_the_run_that_was_begun_so(kind: str, optimizer: str) -> None:
    """20 steps, then 10 more, then 6 more. With Muon, the momentum rises over the first two steps alone."""
    whole = begun_with_all(kind, 20, 30, 36, optim__kind=optimizer)
    config = config_of(kind, optim__kind=optimizer)
    run = train(config, out=Path("run"))
    train(config, out=run, additional_steps=10)
    assert oracle.steps(run)[-1] == 30
    train(config, out=run, additional_steps=6)
    oracle.assert_equal(run, whole)


def test_the_rates_of_a_continued_run_by_hand() -> None:
    """A hundredth, ten steps to nothing: then up to a tenth of it over two of five steps, and down in three."""
    fields = {"schedule__warmup_steps": 4, "train__total_steps": 10, "optim__lr": 0.01}
    run = train(config_of("linear", **fields), out=Path("run"))
    train(config_of("linear", **fields), out=run, additional_steps=5)
    first = [0.001, 0.00325, 0.0055, 0.00775, 0.01, 0.01 * 5 / 6, 0.01 * 4 / 6, 0.005, 0.01 * 2 / 6, 0.01 / 6]
    assert rates(run) == pytest.approx([*first, 0, 0.0005, 0.001, 0.001 * 2 / 3, 0.001 / 3])


@pytest.mark.goal("R3")
@pytest.mark.parametrize(("kind", "step"), [("cosine", 8), ("wsd", 8), ("wsd", 17)])
def test_steps_may_be_added_before_the_end(kind: str, step: int) -> None:
    """Under cosine the end comes where it was to come, and then the continuation; wsd decays once, later."""
    whole = begun_with_all(kind, 20, 30)
    run = train(config_of(kind, train__stop_at_step=step), out=Path("run"))
    train(config_of(kind), out=run, additional_steps=10)
    oracle.assert_equal(run, whole)


@pytest.mark.goal("R3")
@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_typed_again_it_goes_on_and_only_after_its_end_adds_anew(kind: str) -> None:
    config, whole = config_of(kind), begun_with_all(kind, 20, 30, 40)
    run = train(config, out=Path("run"))
    for stop in (21, 25, 30):
        train(config_of(kind, train__stop_at_step=stop), out=run, additional_steps=10)
    before = contents(run)
    train(config, out=run)
    assert contents(run) == before, "the first command is that of a complete run"
    train(config_of(kind, train__stop_at_step=35), out=run, additional_steps=10)
    with pytest.raises(ConfigError, match=r"at step 35 of 40, 10 of them additional: .* --additional-steps 10"):
        train(config, out=run, additional_steps=7)
    train(config, out=run)
    oracle.assert_equal(run, whole)


def killed_continuing(rig: Rig, kind: str, step: int) -> list[str]:
    """A run of 20 steps; then with ten more it is killed in the nth step of its process."""
    words = ["train", "debug", "--out", "run", *flags(fields_of(kind))]
    rig.run(words)
    child = rig.start([*words, "--additional-steps", "10"], holds=[("step", step)])
    child.reach("step", step)
    child.kill(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    return words


@pytest.mark.goal("R1")
@pytest.mark.parametrize(("kind", "again"), [("cosine", []), ("wsd", ["--additional-steps", "10"]), ("wsd", [])])
def test_killed_in_its_continuation(kind: str, again: list[str], rig: Rig) -> None:
    """First before it has made a checkpoint, and then after."""
    whole = begun_with_all(kind, 20, 30)
    words = killed_continuing(rig, kind, 1)
    child = rig.start([*words, *again], holds=[("step", 9)])
    child.reach("step", 9)
    child.kill(signal.SIGKILL)
    child.wait()
    last = rig.run([*words, *again])
    oracle.assert_equal(rig.folder / "run", whole)
    said = last.stderr
    assert said.index("the run has 30 steps, not 20: begun with 20, 10 more after step 20") < said.index("schedule: ")
    assert said.index(f"schedule: {kind}, from 0.001 to 0.01 over 4 steps") < said.index("\nstep ")


@pytest.mark.goal("R2")
@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_killed_at_any_operation_of_a_continuation(kind: str, proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second one, of as many steps as the first: what is under way must not be taken for what is done."""
    config, whole = config_of(kind), begun_with_all(kind, 20, 30, 40)
    before = train(config, out=Path("before"))
    train(config, out=before, additional_steps=10)

    def command() -> None:
        train(config, out=Path("run"), additional_steps=10)

    for _ in killed_anywhere(command, "before", proof, monkeypatch):
        command()
        oracle.assert_equal(Path("run"), whole)


def killed_anywhere(command: Callable[[], None], before: str, proof: Proof, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yields where a command was killed at an operation of the disk, of the saves or of all else, each in turn.

    Not after its last checkpoint: what is typed then is another command.
    """
    last = {beside: operations(command, before, monkeypatch, beside) for beside in (True, False)}
    ways = [(at, beside) for beside, count in last.items() for at in range(count)]
    for case in proof.cases(4, len(ways)):
        at, beside = ways[case] if proof.long else proof.random(case).choice(ways)
        die_in(command, before, monkeypatch, Dead(at, beside=beside))
        yield case


def operations(command: Callable[[], None], before: str, monkeypatch: pytest.MonkeyPatch, beside: bool) -> int:
    """How many there are, up to the checkpoint of the last step."""
    disk, counted = Dead(10_000, beside=beside), list[int]()
    save = checkpoint.save

    def noted(folder: Path, snapshot: checkpoint.Snapshot) -> Path:
        counted.append(disk.left)
        return save(folder, snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", noted)
        die_in(command, before, monkeypatch, disk)
    return 10_000 - counted[-1]


def die_in(command: Callable[[], None], before: str, monkeypatch: pytest.MonkeyPatch, disk: Dead) -> None:
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(before, "run")
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(files, "DISK", disk)
        command()
    disk.bury()


# --- what is kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_had_ended_is_not_lost(kind: str) -> None:
    run = train(config_of(kind), out=Path("run"))
    ended, records = oracle.state(oracle.newest(run)), (run / "metrics.jsonl").read_bytes()
    train(config_of(kind), out=run, additional_steps=20)
    if kind == "wsd":
        assert oracle.state(run / "checkpoints" / "step-00000020.set-aside") == ended
        assert (run / "metrics-00000020.jsonl").read_bytes() == records
        with pytest.raises(FileError, match="set-aside is no checkpoint of run"):
            train(config_of(kind), out=run, resume="run/checkpoints/step-00000020.set-aside")
    else:
        assert oracle.state(run / "checkpoints" / "step-00000020") == ended
    assert len(oracle.steps(run)) <= 2 + 1 + 1, "the newest, the best and one more"


def test_wsd_keeps_one_checkpoint_before_the_decay() -> None:
    run = train(config_of("wsd", train__keep_best=0), out=Path("run"))
    assert oracle.steps(run) == [14, 18, 20]
    kept = json.loads((run / "checkpoints/step-00000014/training/state.json").read_text())
    assert kept["regular"] is False, "trouble would lead back to it, and not to the same one as before"
    train(config_of("wsd", train__keep_best=0), out=run, additional_steps=10)
    assert oracle.steps(run) == [21, 27, 30]


def test_wsd_goes_on_from_an_older_one_where_it_must() -> None:
    whole = begun_with_all("wsd", 20, 30)
    run = train(config_of("wsd", train__keep_last=9), out=Path("run"))
    damaged = run / "checkpoints/step-00000014/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    heard = Notes()
    train(config_of("wsd"), out=run, additional_steps=10, listener=heard)
    assert any(f"{damaged} is damaged" in note for note in heard.notes)
    assert any("back from step 20 to step 12, before the decay" in note for note in heard.notes)
    oracle.assert_equal(run, whole)


def test_wsd_without_any_says_so_and_changes_nothing() -> None:
    run = train(config_of("wsd"), out=Path("run"))
    shutil.rmtree(run / "checkpoints/step-00000014")
    before = contents(run)
    with pytest.raises(FileError, match="no whole checkpoint from before the decay, which began at step 14") as caught:
        train(config_of("wsd"), out=run, additional_steps=10)
    assert "--resume weights-only" in str(caught.value)
    assert contents(run) == before


# --- another end


@pytest.mark.goal("R3")
@pytest.mark.parametrize(
    ("kind", "stop", "total"),
    [("wsd", 8, 30), ("wsd", 14, 30), ("wsd", 8, 12), ("constant", 17, 30), ("constant", 17, 18), ("cosine", 4, 30)],
)
def test_another_end_that_changes_no_step_done_is_taken(kind: str, stop: int, total: int) -> None:
    """And taken up again once more, with the same flag."""
    whole = train(config_of(kind, train__total_steps=total, schedule__warmup_steps=4), out=Path("whole"))
    run = train(config_of(kind, train__stop_at_step=stop), out=Path("run"))
    changed = {"train__total_steps": total}
    train(config_of(kind, **changed, train__stop_at_step=stop + 1), out=run)
    train(config_of(kind, **changed), out=run)
    oracle.assert_equal(run, whole)


@pytest.mark.parametrize(
    ("kind", "stop", "total"),
    [("cosine", 5, 30), ("linear", 20, 30), ("wsd", 15, 30), ("wsd", 12, 14), ("constant", 17, 16)],
)
def test_another_end_that_would_change_the_past_is_refused(kind: str, stop: int, total: int) -> None:
    run = train(config_of(kind, train__stop_at_step=stop), out=Path("run"))
    before = contents(run)
    with pytest.raises(ConfigError) as caught:
        train(config_of(kind, train__total_steps=total), out=run)
    assert f"run has 20 steps, given are {total}: the {stop} done so far" in str(caught.value)
    assert "--additional-steps N" in str(caught.value)
    assert contents(run) == before


def test_a_continued_run_has_its_end() -> None:
    run = train(config_of("constant"), out=Path("run"))
    train(config_of("constant"), out=run, additional_steps=5)
    with pytest.raises(ConfigError, match="a continued run gets more steps, and no others"):
        train(config_of("constant", train__total_steps=22), out=run)
    train(config_of("constant", train__total_steps=25), out=run)


@pytest.mark.parametrize(("additional", "resume"), [(0, "auto"), (5, "weights-only"), (5, "auto")])
def test_steps_that_cannot_be_added(additional: int, resume: str) -> None:
    with pytest.raises(ConfigError, match=r"--additional-steps: given 0|give one of them|begin one with --total-steps"):
        train(config_of("cosine"), out=Path("run"), additional_steps=additional, resume=resume)


# --- nothing but the weights

OTHER = {"optim__lr": 0.003, "train__total_steps": 12}


def test_weights_only_takes_the_weights_and_nothing_else() -> None:
    run = train(config_of("cosine", train__keep_last=4), out=Path("run"))
    old, records = oracle.newest(run), (run / "metrics.jsonl").read_bytes()
    weights, files_before = oracle.state(old), {path.name for path in (run / "checkpoints").iterdir()}
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003, 0\.01; .*--resume weights-only"):
        train(config_of("cosine", **OTHER), out=run)
    train(config_of("cosine", **OTHER, train__stop_at_step=1, train__keep_last=9), out=run, resume="weights-only")
    begun = oracle.state(run / "checkpoints/step-00000000")
    names = {name for name in begun if name.startswith("model.safetensors:")}
    assert {begun[name] for name in names} == {weights[name] for name in names}
    assert (begun["step"], begun["position"], begun["updates"], begun["records"]) == ("0", "0", "0", "1")
    assert len({value for name, value in begun.items() if "exp_avg.model.embed" in name}) == 1
    assert rates(run) == [pytest.approx(0.0003)], "the schedule begins at its beginning"
    assert {f"{name}.set-aside" for name in files_before} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert (run / "metrics.jsonl.set-aside").read_bytes() == records
    assert oracle.journal(run)[0] == {"kind": "weights", "step": 0, "from_step": 20}
    oracle.assert_whole(run)


@pytest.mark.goal("R3")
@pytest.mark.parametrize("resume", ["weights-only", "auto"])
def test_begun_with_weights_only_it_goes_on(resume: str) -> None:
    before = train(config_of("cosine"), out=Path("whole"))
    shutil.copytree(before, "run")
    train(config_of("cosine", **OTHER), out=Path("whole"), resume="weights-only")
    train(config_of("cosine", **OTHER, train__stop_at_step=5), out=Path("run"), resume="weights-only")
    train(config_of("cosine", **OTHER), out=Path("run"), resume=resume)
    oracle.assert_equal(Path("run"), Path("whole"))


@pytest.mark.goal("R2")
@pytest.mark.parametrize("other", [OTHER, {}], ids=["another configuration", "the same"])
def test_killed_at_any_operation_of_a_beginning_with_weights(
    other: dict[str, Any], proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("cosine", **other)
    shutil.copytree(train(config_of("cosine"), out=Path("before")), "whole")
    train(config, out=Path("whole"), resume="weights-only")

    def command() -> None:
        train(config, out=Path("run"), resume="weights-only")

    for _ in killed_anywhere(command, "before", proof, monkeypatch):
        command()
        oracle.assert_equal(Path("run"), Path("whole"))
        assert Path("run/checkpoints/step-00000020.set-aside").is_dir(), "nothing is lost"


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FileError, match="run has no valid checkpoint whose weights could be taken"):
        train(config_of("cosine"), out=Path("run"), resume="weights-only")
    run = train(config_of("cosine", train__total_steps=4), out=Path("run"))
    before = contents(run)
    with pytest.raises(ConfigError, match=r"other shapes \(given, there\): model.num_hidden_layers: 3, 2"):
        train(config_of("cosine", model__num_hidden_layers=3), out=run, resume="weights-only")
    bpe = {"data__tokenizer": "bpe:257", "optim__lr": 0.1}
    with pytest.raises(FileError, match=r"has another tokenizer; add --data\.tokenizer .*/tokenizer\.json"):
        train(config_of("cosine", **bpe), out=run, resume="weights-only")
    assert contents(run) == before
