"""The engine of Lightning makes the runs that the plain one makes, and each goes on with what the other began."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from inside import poison
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from rig import Rig, environments, flags
from world import STEPS, TRAIN, Whole
from world import trained as trained_steps

import pocketlm
from pocketlm.errors import FileError, UsageError
from pocketlm.training import lightning, resolve
from pocketlm.training.run import Run

SEEDS: dict[str, dict[str, Any]] = {
    "smallm": {"model.num_key_value_heads": 1, "model.num_attention_heads": 4},
    "smollm2-135m": {"model.num_key_value_heads": 3, "model.num_attention_heads": 9},
}
"""Their heads; blocks, positions, norms, initialisation, decay and schedule are the presets' own."""
SMALL = {
    "model.vocab_size": 257,
    "model.hidden_size": 36,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 2,
    "model.head_dim": 8,
    "model.max_position_embeddings": 32,
    "data.source": "synthetic",
    "data.tokenizer": "byte",
    "data.context": 32,
    "data.val_fraction": 0.05,
    "data.segment_pieces": 0,
    "optim.lr": 1e-2,
    "schedule.warmup_steps": 2,
    "train.total_steps": 60,
    "train.tokens_per_step": 6 * 32,
    "train.dtype": "fp32",
    "train.attention": "sdpa",
    "train.fp32_matmul": "highest",
    "train.compile": "off",
    "train.threads": 1,
    "train.eval_every": 15,
    "train.eval_tokens": 1024,
    "train.checkpoint_every": 20,
    "sample.prompts": (),
}
LEGS = (20, 40, None)
T, L = "torch", "lightning"
CROSSED = {1: (T, L, T), 3: (L, T, L)}
"""By accumulation."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "PROBE_S", 0.01)  # of the machine's speed, for the shares of it that a run tells


def trained(
    out: str,
    preset: str,
    fields: dict[str, Any],
    engines: Sequence[str],
    legs: Sequence[int | None] = LEGS,
    **options: Any,
) -> Path:
    """A run whose legs, by default up to its end, are driven by one engine each."""
    for engine, stop in zip(engines, legs[-len(engines) :], strict=True):
        config = pocketlm.Config.preset(preset, SMALL | SEEDS[preset] | fields | {"train.engine": engine})
        config = config.build(config.tree(), {"train.stop_at_step": stop})
        run = pocketlm.train(config, out=Path(out), **options)
    return run


@pytest.mark.parametrize("accumulation", CROSSED)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("preset", SEEDS)
def test_both_engines_make_the_same_run_and_go_on_with_each_others(preset: str, kind: str, accumulation: int) -> None:
    fields = {"optim.kind": kind, "train.micro_batch": 6 // accumulation}
    whole = trained("whole", preset, fields, [T])
    records = oracle.journal(whole)
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 61))
    assert records[0]["loss"] > records[-2]["loss"] + 1, "it learns nothing: the states may not differ"
    oracle.assert_equal(trained("lightning", preset, fields, [L]), whole)
    oracle.assert_equal(trained("crossed", preset, fields, CROSSED[accumulation]), whole)


HOOKS = {
    **dict.fromkeys(("setup", "on_fit_start", "on_train_start", "on_train_end", "on_fit_end", "teardown"), 1),
    **dict.fromkeys(("on_train_epoch_start", "on_train_epoch_end"), 3),
    **dict.fromkeys(("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"), 40),
}
"""How often each is called in the last 40 of 60 steps, with evaluations after 30, 45 and 60."""


class Seen(Callback):
    """What a callback is told."""

    def __init__(self) -> None:
        self.calls = Counter[str]()
        self.steps, self.epochs = list[tuple[int, float, float]](), list[tuple[int, int, float]]()

    def __getattribute__(self, name: str) -> Any:
        if name in HOOKS:
            self.calls[name] += 1
        return super().__getattribute__(name)

    def on_train_batch_end(self, trainer: Trainer, _: LightningModule, outputs: Any, *__: Any) -> None:
        self.steps.append((trainer.global_step, outputs["loss"].item(), outputs["lr"]))

    def on_train_epoch_end(self, trainer: Trainer, _: LightningModule) -> None:
        self.epochs.append((trainer.current_epoch, trainer.global_step, trainer.callback_metrics["val_loss"].item()))


def records(run: Path, kind: str, after: int = 0) -> list[dict[str, Any]]:
    return [record for record in oracle.journal(run) if record["kind"] == kind and record["step"] > after]


def test_its_hooks_and_loggers_are_told_what_the_run_does(caplog: pytest.LogCaptureFixture) -> None:
    """And count on from where the other engine has stopped; nothing lies where the command was typed."""
    trained("run", "smallm", {}, [T], legs=[20])
    seen, rates = Seen(), LearningRateMonitor("step")
    callbacks = [seen, rates, EarlyStopping("val_loss", patience=3), Timer("00:01:00:00"), ModelSummary()]
    run = trained("run", "smallm", {}, [L], callbacks=callbacks, loggers=[CSVLogger("logs", name="", version="")])
    train, evaluated = records(run, "train", 20), records(run, "eval", 20)
    assert {hook: seen.calls[hook] for hook in HOOKS} == HOOKS
    assert seen.steps == [(record["step"], record["loss"], record["lr"]) for record in train]
    losses = [np.float32(record["loss"]).item() for record in evaluated]
    assert seen.epochs == [(1, 30, losses[0]), (2, 45, losses[1]), (3, 60, losses[2])]
    with Path("logs/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {int(row["step"]) + 1: row for row in rows if row["loss"]}
    assert list(logged) == [30, 40, 50, 60], "train.log_every is 10; Lightning's own steps begin at 0"
    assert [float(row["loss"]) for row in logged.values()] == [record["loss"] for record in train[9::10]]
    assert [float(row["val_loss"]) for row in rows if row["val_loss"]] == pytest.approx(losses, abs=0)
    assert rates.lrs == {"lr-NextStep/adamw": [record["lr"] for record in train[9::10]]}
    assert "optim" in Path("logs/hparams.yaml").read_text()
    assert "| model | Transformer |" in caplog.text, "what a callback says"
    assert {path.name for path in Path().iterdir()} == {"run", "logs", "data"}
    oracle.assert_equal(run, trained("whole", "smallm", {}, [T]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [5, 10, 15, 17]),
        ({"train.eval_every": 0}, [17]),
        ({"train.stop_at_step": 10}, [5, 10]),
        ({"train.stop_at_step": 3}, [3]),
        ({"schedule.continued_at": (7,), "schedule.continued_to": (0.5,)}, [5, 7, 10, 15, 17]),
    ],
)
def test_an_epoch_of_its_ends_where_the_run_evaluates(fields: dict[str, Any], expected: list[int]) -> None:
    config = pocketlm.Config.preset("debug", {"train.total_steps": 17} | fields)
    last = config.train.stop_at_step or 17
    assert Run.stretches(cast(Run, SimpleNamespace(config=config, last_step=last))) == expected


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


class Breaks(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 34:
            raise ZeroDivisionError("a mistake in a callback")


def test_a_callback_stops_the_run_and_the_same_command_goes_on() -> None:
    fields = {"optim.kind": "muon"}
    for stop, step in ((StopAt(7), 7), (EarlyStopping("val_loss", stopping_threshold=9.0), 15)):
        run = trained("run", "smollm2-135m", fields, [L], callbacks=[stop])
        assert oracle.steps(run)[-1] == step
    with pytest.raises(ZeroDivisionError, match="a mistake in a callback"):
        trained("run", "smollm2-135m", fields, [L], callbacks=[Breaks()])
    assert oracle.steps(run)[-1] == 20
    oracle.assert_equal(trained("run", "smollm2-135m", fields, [T]), trained("whole", "smollm2-135m", fields, [L]))


def test_what_its_start_changes_is_put_back() -> None:
    """Its handlers of signals; with several ranks it may also set seeds and threads, as a callback does here."""

    class Changes(Callback):
        def on_fit_start(self, *_: Any) -> None:
            random.seed(1)
            np.random.seed(1)
            torch.manual_seed(1)
            torch.set_num_threads(2)

    handler = signal.getsignal(signal.SIGTERM)
    run = trained("run", "smallm", {}, [L], callbacks=[Changes()])
    assert torch.get_num_threads() == 1
    assert signal.getsignal(signal.SIGTERM) == handler
    assert logging.getLogger("lightning.pytorch.utilities.rank_zero").getEffectiveLevel() == logging.INFO
    oracle.assert_equal(run, trained("whole", "smallm", {}, [T]))


def test_trouble_leads_back_and_a_new_trainer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"guard.window": 8, "guard.max_skips": 1, "train.checkpoint_every": 10}
    poison(monkeypatch, {6 * 24, 6 * 26})
    seen = Seen()
    run = trained("run", "smallm", fields, [L], callbacks=[seen])
    assert [record["step"] for record in records(run, "rollback")] == [20]
    assert seen.calls["on_train_start"] == 2
    assert [step for step, *_ in seen.steps] == [*range(1, 28), *range(21, 61)]
    oracle.assert_equal(run, trained("whole", "smallm", fields, [T]))


@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        (
            T,
            {"callbacks": [StopAt(1)]},
            "callbacks and loggers are Lightning's: train.engine is torch, needed is lightning",
        ),
        (
            L,
            {"callbacks": [ModelCheckpoint()]},
            "ModelCheckpoint would save, or change what is trained, which only the run does; leave it out",
        ),
        (L, {"callbacks": [print]}, "given builtin_function_or_method, allowed is a Callback of lightning.pytorch"),
        (L, {"loggers": [StopAt(1)]}, "given StopAt, allowed is a Logger of lightning.pytorch"),
    ],
)
def test_what_has_no_place_is_refused(engine: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        trained("run", "smallm", {}, [engine], **options)
    assert not Path("run").exists()


def test_a_device_that_it_does_not_know_is_refused() -> None:
    assert lightning.accelerator(torch.device("cuda", 1)) == "cuda"
    with pytest.raises(UsageError, match="given xpu, Lightning knows cpu, cuda and mps; add --engine torch"):
        lightning.accelerator(torch.device("xpu"))


def test_where_it_is_not_installed_it_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pocketlm import training
    from pocketlm.cli.main import main

    monkeypatch.delattr(training, "lightning")
    monkeypatch.delitem(sys.modules, "pocketlm.training.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert main(["train", "debug", "--engine", "lightning"]) == 2
    said = capsys.readouterr().err
    assert "train.engine is lightning, which cannot be imported here" in said
    assert said.count("\n") == 1
    assert "type: pip install 'lightning>=2.6.6'; or train with --engine torch" in said


def test_no_checkpoint_of_its_own_is_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job of SLURM's it would look for one by its name in the run's folder, and unpickle it."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint("x.ckpt")

    with pytest.raises(UsageError, match="Lightning's own checkpoints are pickles, and are not written"):
        trained("run", "smallm", {}, [L], callbacks=[Saves()])
    assert not Path("x.ckpt").exists()
    for name in ("SLURM_NTASKS", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    Path("run/hpc_ckpt_1.ckpt").write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    with pytest.raises(FileError, match=r"run/hpc_ckpt_1\.ckpt is a checkpoint of Lightning's, a pickle"):
        trained("run", "smallm", {}, [L])
    assert not Path("unpickled").exists()


def test_its_settings_are_not_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_FAST_DEV_RUN", "1")
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "1")
    trained("run", "smallm", {"train.total_steps": 4}, [L])
    assert oracle.steps(Path("run"))[-1] == 4


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_its_bar_is_on_a_terminals_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pocketlm.cli.main import main

    shown = io.BytesIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stderr", Terminal(shown, encoding="utf-8", write_through=True))
    assert main(["train", "debug", "--engine", "lightning", "--out", "run", "--json"]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*\w", "", shown.getvalue().decode())
    assert re.search(r"Epoch 11/11 .* 5/5 .* smoothed_loss: 2\.\d{3} val_loss: 2\.", text)
    assert "train loss" not in text, "our panel has its own bar"
    assert json.loads(capsys.readouterr().out)["step"] == 60
    shown.seek(0)
    shown.truncate()
    trained("own", "smallm", {}, [L], callbacks=[TQDMProgressBar()])
    assert b"Epoch" not in shown.getvalue(), "a bar of the user's own takes its place"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_ranks_make_the_same_run(strategy: str, rig: Rig) -> None:
    """Under Lightning's own strategies, with the process group that is there; and one rank's signal stops all."""
    fields = {"train.total_steps": 12, "train.tokens_per_step": 6 * 32, "optim.kind": "muon"}
    words = ["train", "debug", *flags(fields | {"train.strategy": strategy})]
    rig.run_ranks(2, [*words, "--out", "whole"])
    words += ["--out", "run"]
    ranks = rig.start_ranks(2, [*words, "--engine", L], only_holds={1: [("step", 4)]})
    ranks[1].reach("step", 4)
    ranks[1].kill(signal.SIGTERM)
    ranks[1].ping()
    ranks[1].release()
    assert ranks.wait() == [143, 143], ranks.said()
    assert oracle.steps(rig.folder / "run")[-1] == 3
    rig.run_ranks(2, [*words, "--train.stop-at-step", "7"])
    rig.run_ranks(2, [*words, "--engine", L])
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


ITS_CLOCK_HAS_STOPPED = """
import os, sys
from lightning.pytorch import Callback
from pocketlm.config import Config
from pocketlm.training.loop import train

class Stop(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if os.environ["RANK"] == "1" and trainer.global_step == 3:
            trainer.should_stop = True

fields = {"train.engine": "lightning", "train.total_steps": 10, "train.threads": 1, "train.rank_timeout_s": 20}
print(train(Config.preset("debug", fields), callbacks=[Stop()]))
"""


def test_a_callback_of_one_rank_stops_all(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-c", ITS_CLOCK_HAS_STOPPED]
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env=os.environ | world, stderr=subprocess.PIPE, text=True)
        for world in environments(store, 2)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert oracle.steps(tmp_path / "runs/debug")[-1] == 3


LIGHTNING = [*TRAIN, "--engine", "lightning"]


@pytest.mark.goal("R19")
@pytest.mark.parametrize(("place", "occurrence"), [("lightning", 1), ("step", 8), ("evaluation", 3)])
def test_a_signal_stops_it_and_the_other_engine_goes_on(place: str, occurrence: int, rig: Rig, whole: Whole) -> None:
    child = rig.start(LIGHTNING, phases=("signal",), holds=[(place, occurrence)])
    child.reach(place, occurrence)
    child.kill(signal.SIGTERM)
    child.ping()
    child.release()
    assert child.wait() == 143, child.stderr
    assert sum(event.phase == "signal" for event in child.events) == 2, "once entered and left"
    assert "Traceback" not in child.stderr
    oracle.assert_whole(rig.folder / "run")
    done = trained_steps(rig.folder / "run")
    assert f"stopped by SIGTERM at step {done}, saved; the same command goes on" in child.stderr
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R20")
def test_a_second_signal_ends_it_at_once_also_in_its_last_save(rig: Rig, whole: Whole) -> None:
    """When it is left, Lightning puts back the handlers that it found: by the system's own the process ends."""
    child = rig.start(LIGHTNING, phases=("signal",), holds=[("step", 3), ("save", 2)])
    child.reach("step", 3)
    child.kill(signal.SIGTERM)
    child.ping()
    child.release()
    child.reach("save", 2)
    child.kill(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM, child.stderr
    oracle.assert_whole(rig.folder / "run")
    child = rig.run([*LIGHTNING, "--json"])
    assert json.loads(child.stdout)["step"] == STEPS
    assert not re.search("available|Tip|INFO|Warning", child.stderr), "what it says of itself at its start"
    oracle.assert_equal(rig.folder / "run", whole.run)
