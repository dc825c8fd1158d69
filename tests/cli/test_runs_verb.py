"""`pocketlm runs` on runs that were trained: what it says against what the runs said themselves."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketlm.cli.main import main

STEPS = ("--train.total-steps", "20", "--train.eval-every", "4", "--train.checkpoint-every", "10")


def both(*words: str, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(list(words)) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def run_json(*words: str) -> dict[str, Any]:
    tree = json.loads(both(*words, "--json")[0])
    assert isinstance(tree, dict)
    return tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Three runs of the preset `debug`, by name: what `train --json` said of each, and where it lies."""
    home = tmp_path_factory.mktemp("home")
    others = {
        "slow": ("--optim.lr", "1e-3", "--train.log-every", "7"),
        "fast": (),
        "half": ("--train.stop-at-step", "10"),
    }
    with contextlib.chdir(home):
        said = {
            name: run_json("train", "debug", "--out", f"runs/{name}", *STEPS, *more) for name, more in others.items()
        }
    return {name: summary | {"home": home} for name, summary in said.items()}


@pytest.fixture
def home(trained: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder: Path = trained["slow"]["home"]
    monkeypatch.chdir(folder)
    return folder


def test_the_list_has_what_each_run_said_of_itself(home: Path, trained: dict[str, dict[str, Any]]) -> None:
    listed = {run["run"]: run for run in run_json("runs")["runs"]}
    assert list(listed) == ["runs/half", "runs/fast", "runs/slow"]
    for name, said in trained.items():
        run = listed[f"runs/{name}"]
        for key in ("step", "tokens", "val_loss", "bits_per_byte", "elapsed_s"):
            assert run[key] == said[key], (name, key)
        assert (run["name"], run["total_steps"], run["parameters"]) == ("debug", 20, 26_816)
    assert [run["state"] for run in listed.values()] == ["stopped", "complete", "complete"]


def test_a_line_each_for_a_person(home: Path, trained: dict[str, dict[str, Any]]) -> None:
    out, err = both("runs")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("runs/half")
    assert {"debug", "26.82k", f"{trained['half']['val_loss']:.4f}", "stopped"} <= set(lines[1].split())
    assert "10 / 20" in lines[1]
    assert err == ""
    assert both("runs", "runs/fast")[0].splitlines()[1].split()[0] == "runs/fast"


def test_a_damaged_run_is_listed_with_its_reason(home: Path, tmp_path: Path) -> None:
    shutil.copytree("runs/fast", tmp_path / "all" / "fast")
    (tmp_path / "all" / "fast" / "config.toml").write_bytes(b"\xff")
    out, err = both("runs", str(tmp_path / "all"))
    assert out.splitlines()[1].endswith("damaged")
    assert "fast is damaged: " in err
    assert "config.toml is no TOML" in err


def test_without_runs_it_says_how_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert both("runs") == ("", "no runs in runs; begin with: pocketlm train tiny\n")
    assert run_json("runs") == {"runs": []}
    Path("empty").mkdir()
    assert both("runs", "empty")[1] == "no runs in empty; begin with: pocketlm train tiny\n"
    assert "cannot read nowhere" in both("runs", "nowhere", code=3)[1]


# --- compare


def test_compare_draws_both_and_says_what_differs(home: Path, trained: dict[str, dict[str, Any]]) -> None:
    out, err = both("runs", "compare", "runs/slow", "runs/fast", "--html", "both.html")
    assert err == ""
    assert out.count("● runs/slow   ○ runs/fast") == 2
    assert {"●", "○"} <= set(out)
    assert re.search(r"^optim\.lr +0\.001 +0\.01$", out, re.MULTILINE)
    assert re.search(r"^train\.log_every +7 +5$", out, re.MULTILINE)
    losses = " +".join(f"{trained[name]['val_loss']:.4f}" for name in ("slow", "fast"))
    assert re.search(rf"^validation loss +{losses}$", out, re.MULTILINE)
    assert re.search(r"^runs/fast reaches the best of runs/slow .* times sooner in tokens", out, re.MULTILINE)
    assert "<svg" in Path("both.html").read_text()


def test_compare_as_json(home: Path, trained: dict[str, dict[str, Any]]) -> None:
    tree = run_json("runs", "compare", "runs/fast", "runs/slow")
    for run in tree["runs"]:
        said = trained[Path(run["run"]).name]
        assert {key: run[key] for key in ("step", "tokens", "val_loss", "bits_per_byte", "elapsed_s")} == {
            key: said[key] for key in ("step", "tokens", "val_loss", "bits_per_byte", "elapsed_s")
        }
    assert tree["measure"] == "loss"
    assert tree["differences"]["settings"] == {"optim.lr": [0.01, 0.001]}


def test_compare_refuses_what_is_no_run(home: Path) -> None:
    assert "compare takes 2 to 6" in both("runs", "compare", "runs/fast", code=2)[1]
    assert "runs/none is no run" in both("runs", "compare", "runs/fast", "runs/none", code=3)[1]


def test_it_needs_no_torch(home: Path) -> None:
    program = "import sys; from pocketlm.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for words in (["runs"], ["runs", "compare", "runs/fast", "runs/slow", "--html", "page.html"]):
        said = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
        assert said.stdout.splitlines()[-1] == "False"
