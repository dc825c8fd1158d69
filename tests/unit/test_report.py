"""The report of real, partial and hostile runs, read back by Python's own HTML parser."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pages import check_inert

from pocketlm.config import Config
from pocketlm.errors import FileError
from pocketlm.journal import Journal
from pocketlm.training import loop, report
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from pocketlm.training.report import write_curve, write_report

STEPS = 12
PROMPT = "<script>alert(1)</script>"
FIELDS = {
    "train.total_steps": STEPS,
    "train.eval_every": 4,
    "train.checkpoint_every": 4,
    "sample.every": 6,
    "sample.prompts": [PROMPT, "the "],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A debug run, with its data set under data/ of the folder that it was made in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("report"))
        return train(Config.preset("debug", FIELDS), out=Path("runs/r")).absolute()


@pytest.fixture
def at_home(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, seen from where it was made."""
    monkeypatch.chdir(run.parents[1])
    return run


def test_a_run_leaves_its_report(run: Path) -> None:
    page = check_inert((run / "report.html").read_text())
    records = Journal.read(run / "metrics.jsonl")
    last = [record for record in records if record["kind"] == "eval"][-1]
    assert f"complete: {STEPS} steps" in page.text
    headlines = ("26,816", f"{STEPS * 256:,}", f"{last['loss']:.4f}", f"{last['bits_per_byte']:.4f}")
    assert set(headlines) <= set(page.parts)
    assert "unigram entropy 2.7054" in page.text
    assert "57,991" in page.text  # tokens of the training split
    assert "256 tokens at once, of 256 a step" in page.text  # the reason for the micro-batch
    assert page.tags["svg"] == 8  # four charts, each with its plot inside
    assert page.tags["circle"] == 1 + STEPS // 4  # in the legend, and an evaluation each
    assert "pocketlm chat runs/r" in page.text


def test_samples_are_text(run: Path) -> None:
    page = check_inert((run / "report.html").read_text())
    samples = [record for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "sample"]
    assert len(samples) == 4  # two prompts at steps 6 and 12
    for sample in samples:
        assert sample["prompt"] + sample["text"] in page.text.replace("\r", "\n")
    assert page.tags["script"] == 0


def test_made_again_it_is_the_same(at_home: Path) -> None:
    before = (at_home / "report.html").read_text()
    write_report(Path("runs/r"))
    assert (at_home / "report.html").read_text() == before


def test_without_its_data_set_the_report_leaves_that_out(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    page = check_inert(write_report(run).read_text())
    assert "unigram" not in page.text
    assert "57,991" not in page.text
    assert f"complete: {STEPS} steps" in page.text


def test_a_stopped_run_says_how_it_goes_on(at_home: Path) -> None:
    """And the command that it gives does go on."""
    from pocketlm.cli.train import run as command

    train(Config.preset("debug", FIELDS | {"train.stop_at_step": 4}), out=Path("runs/stopped"))
    page = check_inert(Path("runs/stopped/report.html").read_text())
    assert f"stopped at step 4 of {STEPS}" in page.text
    line = next(line for line in page.text.splitlines() if line.startswith("pocketlm train"))
    assert command(shlex.split(line)[2:]) == 0
    assert f"complete: {STEPS} steps" in Path("runs/stopped/report.html").read_text()


def folder_of(path: Path, records: list[dict[str, Any]], **fields: Any) -> Path:
    """A run's folder with these records and nothing else."""
    path.mkdir(exist_ok=True)
    config = Config.preset("debug", {name.replace("__", "."): value for name, value in fields.items()})
    (path / "config.toml").write_text(config.to_toml())
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def train_record(step: int, **values: Any) -> dict[str, Any]:
    known = {"loss": 3.0, "lr": 0.01, "grad_norm": 1.0, "tokens": 256 * step, "tokens_per_s": 1e4, "elapsed_s": step}
    return {"kind": "train", "step": step, "mfu": 0.1, **known, **values}


def test_a_run_without_a_step(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "r", [])
    page = check_inert(write_report(folder).read_text())
    assert "no step of 60 was recorded yet" in page.text
    assert page.tags["svg"] == 0
    with pytest.raises(FileError, match="no loss to draw"):
        write_curve(folder, tmp_path / "curve.svg")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no run: it has no config\.toml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_crash_cut_and_numbers_that_are_none(tmp_path: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    records = [train_record(1), train_record(2, loss=nan, grad_norm=infinity), train_record(3, lr=None)]
    evaluation = {"kind": "eval", "step": 2, "loss": nan, "bits_per_byte": nan}
    folder = folder_of(tmp_path / "r", [*records, evaluation])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    page = check_inert(write_report(folder).read_text())
    assert "stopped at step 3 of 60" in page.text
    assert "Validation loss" not in page.text
    assert not re.search(r'points="[^"]*(nan|inf)', (folder / "report.html").read_text())


def test_whatever_a_run_holds_is_text(tmp_path: Path) -> None:
    evil = "</pre><script src='//evil.example/x.js'></script><img src=x onerror=alert(1)>"
    sample = {"kind": "sample", "step": 1, "prompt": "\x00\u202e", "text": evil + "\ud800"}
    names = {"name": evil, "data__source": f"files:{evil}", "sample__prompts": [evil]}
    folder = folder_of(tmp_path / "r", [train_record(1), sample], **names)
    reasons = f"[resolved.reasons]\ndtype = {json.dumps(evil)}\n"
    (folder / "resolved.toml").write_text(f'[resolved]\ndtype = "fp32"\n{reasons}')
    page = check_inert(write_report(folder).read_text())
    assert page.text.count(evil) == 6  # title, heading, sample, source, prompts, reason


def test_long_runs_are_thinned_to_what_is_seen(tmp_path: Path) -> None:
    records = [train_record(step, loss=2 + 100 / step + (50 if step == 7777 else 0)) for step in range(1, 10_001)]
    samples = [{"kind": "sample", "step": step, "prompt": "p", "text": f"at {step}."} for step in range(1, 101)]
    html = write_report(folder_of(tmp_path / "r", [*records, *samples], train__total_steps=10_000)).read_text()
    page = check_inert(html)
    lines = re.findall(r'<polyline class="\w+" points="([^"]*)"', html)
    assert max(len(line.split()) for line in lines) == report.CHART_POINTS
    loss = next(line for line in lines if len(line.split()) > 2)
    assert min(float(point.split(",")[1]) for point in loss.split()) < 20  # the one step that jumped is still there
    assert {"at 1.", "at 6.", "at 95.", "at 100."} == set(re.findall(r"at (?:1|6|7|94|95|100)\.", page.text))
    assert "88 steps in between are left out" in page.text


def test_a_picture_for_the_readme(run: Path, tmp_path: Path) -> None:
    write_curve(run, tmp_path / "curve.svg")
    svg = (tmp_path / "curve.svg").read_text()
    assert svg.startswith("<svg ")
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert "prefers-color-scheme: dark" in svg
    assert svg.count("<circle") == 1 + STEPS // 4


def test_a_report_that_fails_loses_no_run(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_report", full_disk)
    config = Config.preset("debug", FIELDS)
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    train(config, out=Path("runs/full"), listener=Notes())
    assert "no report: [Errno 28] No space left on device" in notes
    monkeypatch.undo()
    monkeypatch.chdir(at_home.parents[1])
    notes.clear()
    train(config, out=Path("runs/full"), listener=Notes())
    assert notes == [f"runs/full is complete: step {STEPS} of {STEPS}; --additional-steps N trains it further"]
