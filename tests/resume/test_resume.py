"""A run that is stopped and taken up again is the run that was never stopped: every loss and every bit.

The oracle is the uninterrupted run itself. Compared are all records of the journal but their clocks, and the bytes
of the last checkpoint's weights, moments and state.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.files import Journal, sha256_of
from pocketlm.training.loop import train

CLOCKS = {"elapsed_s", "tokens_per_s", "mfu"}
STEPS = 16
# 256 rows a step of 1,812: epochs end inside a step, at about steps 7.1 and 14.2
BASE = {"train.total_steps": STEPS, "train.tokens_per_step": 8192, "train.eval_every": 4, "sample.every": 8}
CASES = {
    "adamw-fp32": {"optim.kind": "adamw"},
    "muon-fp32": {"optim.kind": "muon"},
    "adamw-bf16-accumulation": {"train.dtype": "bf16", "train.micro_batch": 100},
    "muon-bf16-accumulation-pieces": {
        "optim.kind": "muon",
        "train.dtype": "bf16",
        "train.micro_batch": 100,
        "data.shuffle": "piece",
        "data.piece_documents": 50,
    },
}


def config_of(case: str, **fields: Any) -> Config:
    return Config.preset(
        "debug", BASE | CASES[case] | {name.replace("__", "."): value for name, value in fields.items()}
    )


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must be equal."""
    records = [{k: v for k, v in r.items() if k not in CLOCKS} for r in Journal.read(run / "metrics.jsonl")]
    newest = checkpoint.list_checkpoints(run)[-1]
    state = json.loads((newest / checkpoint.STATE).read_text())
    state["resolved"].pop("peak_flops")
    return {
        "records": records,
        "weights": sha256_of(newest / checkpoint.WEIGHTS),
        "optimizer": sha256_of(newest / checkpoint.OPTIMIZER),
        "state": {key: value for key, value in state.items() if key not in CLOCKS},
    }


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_equals_uninterrupted(case: str, workdir: Path) -> None:
    whole = outcome(train(config_of(case), out=Path("whole")))
    assert [r["step"] for r in whole["records"] if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert whole["records"][0]["loss"] > whole["records"][-3]["loss"]
    for stop in (1, 4, 8, 15):
        run = Path(f"stopped-{stop}")
        train(config_of(case, train__stop_at_step=stop), out=run)
        assert outcome(run)["state"]["step"] == stop
        train(config_of(case), out=run)
        assert outcome(run) == whole, f"stopped at step {stop}"


@pytest.mark.parametrize("case", ["adamw-fp32", "muon-bf16-accumulation-pieces"])
def test_resumed_again_and_again_in_new_processes(case: str, workdir: Path) -> None:
    def pocketlm(*words: str) -> None:
        flags = [word for name, value in (BASE | CASES[case]).items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "pocketlm.cli.main", "train", "debug", *flags, *words], check=True)

    pocketlm("--out", "whole")
    for stop in (1, 7, 9, 15):
        pocketlm("--out", "parts", "--train.stop-at-step", str(stop))
    pocketlm("--out", "parts")
    assert outcome(Path("parts")) == outcome(Path("whole"))


def test_a_resume_never_probes_again(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketlm.training import resolve

    fields: dict[str, Any] = {"train__dtype": "auto", "train__micro_batch": "auto"}
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: {4: 1e9, 2: 3e9}[dtype.itemsize])
    train(config_of("adamw-fp32", **fields, train__stop_at_step=3), out=Path("run"))
    assert outcome(Path("run"))["state"]["resolved"]["dtype"] == "bf16"
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: {4: 3e9, 2: 1e9}[dtype.itemsize])
    monkeypatch.setattr(resolve, "MICRO_BATCH_TOKENS", 32)
    train(config_of("adamw-fp32", **fields), out=Path("run"))
    state = outcome(Path("run"))["state"]
    assert (state["step"], state["resolved"]["dtype"], state["resolved"]["micro_batch"]) == (STEPS, "bf16", 256)


def test_a_resume_from_a_named_checkpoint_goes_the_same_way(workdir: Path) -> None:
    case = "adamw-fp32"
    run = train(config_of(case, train__checkpoint_every=4, train__keep_last=9), out=Path("run"))
    before = outcome(run)
    train(config_of(case, train__checkpoint_every=4, train__keep_last=9), out=run)
    assert outcome(run) == before, "a finished run is left alone"
    named, *later = checkpoint.list_checkpoints(run)
    train(config_of(case, train__checkpoint_every=4, train__keep_last=9), out=run, resume=str(named))
    assert outcome(run) == before
    assert all(path.with_name(f"{path.name}.set-aside").is_dir() for path in later), "nothing is lost"


def test_two_equal_runs_write_byte_equal_model_folders(workdir: Path) -> None:
    first, second = (
        checkpoint.list_checkpoints(train(config_of("adamw-fp32", name=name), out=Path(name)))[-1] for name in "ab"
    )
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
