"""benchmarks/gpu.py, rehearsed on a CPU, and its arithmetic with hand-computed figures. No GPU was here."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("gpu", "gpu_device", "gpu_contestants", "gpu_speed", "gpu_checks", "gpu_resume", "worker")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its modules, which find each other by their folder; forgotten afterwards, for their names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def entry(bench: Any, name: str, seconds: list[float], *, flops: float = 1e9) -> Any:
    """A contestant whose blocks of 10 steps took so long."""
    ready = bench.gpu_contestants.Ready(26_816, flops, 4, 9.0, 0.1, math.log(257), 2**30)
    blocks = [bench.gpu_contestants.Block(each, each / 4, 10, 5.0, 2**31) for each in seconds]
    return bench.gpu_speed.Entry(name, None, lambda: None, ready, blocks)


def test_mfu_and_the_ratio_over_the_better_peer(bench: Any, tmp_path: Path) -> None:
    """256 tokens a step: 10 steps in 1 s are 2,560 tokens/s, at 1e9 FLOPs each 2.56e12 FLOP/s, of 5.12e12 half."""
    speed, task = bench.gpu_speed, bench.worker.Task("debug", 8, 32, 1, tmp_path, tmp_path)
    ours = entry(bench, "pocketlm+compile", [1.0, 2.0, 1.0])
    slow, fast = entry(bench, "transformers", [9.0, 9.0, 9.0]), entry(bench, "litgpt+compile", [2.0, 3.0, 4.0])
    assert speed.better_peer([ours, slow, fast], task.tokens) is fast
    assert speed.ratios(ours, fast, task.tokens).median == 2.0  # 2, 1.5, 4
    cells = [cell.strip() for cell in speed.table([ours], task, 5.12e12)[2].strip("|").split("|")]
    assert cells == [
        *("pocketlm+compile", "4 of 8", "2560 (1280 to 2560)", "50.0%", "25%", "2.00", "1.00", "9.0"),
        *("5.549, 5.000", "26,816"),
    ]
    row = speed.comparison([ours, slow, fast], task, 5.12e12, has_goal=True)[2]
    assert row.endswith("| 2.00 (1.50 to 4.00) over litgpt+compile | MFU 35%, 50%: goal reached; 2 times: reached |")
    assert "floor missed; 2 times: not measured" in speed.verdict(0.34, None)
    assert "floor reached; 2 times: missed" in speed.verdict(0.35, 1.99)
    assert speed.problems([ours], task) == []
    ours.ready, fast.blocks[-1] = SimpleNamespace(parameters=27_085, loss=9.0), fast.blocks[-1]
    size, loss = speed.problems([ours], task)
    assert "27,085 parameters, debug 26,816" in size
    assert "from 9.000 to 5.000" in loss


def test_flops_of_the_two_seeds_are_those_of_the_formula(bench: Any, tmp_path: Path) -> None:
    """6 N + 6 L T h d with N the matrices and the head: SmolLM2 135M 134,479,872 + 30 x 2,048 x 9 x 64, by hand."""
    config = bench.gpu_contestants.ours_of(
        bench.worker.Task("smollm2-135m", 16, 2048, 1, tmp_path, tmp_path), {"bitwise"}, bench.gpu_device.Device("cpu")
    )
    assert (config.train.micro_batch, config.train.dtype, config.train.determinism) == ("auto", "bf16", "bitwise")
    block = 576 * (576 + 192 + 192 + 576 + 3 * 1536)
    flops = bench.gpu_speed.sizes.flops_per_token(config.model, config.data.context)
    assert flops == 6 * (30 * block + 49152 * 576) + 6 * 30 * 2048 * 9 * 64


def test_what_lacks_time_or_a_part_is_told_and_the_rest_goes_on(bench: Any, tmp_path: Path) -> None:
    """A part that fails is a line; what stood on the disk before stays there."""
    results = bench.gpu.Results(tmp_path, ["## head"])
    session = bench.gpu.Session(bench.gpu_device.Device("cpu"), ["pocketlm+eager"], tmp_path, results, 0.0)
    results.add("ceilings", ["| a |", ""], {"products": {"x": 2e12}})
    bench.gpu.run(session, "smallm", ["smallm"])
    assert bench.gpu.peak_flops(session)[0] == 2e12
    page, tree = (tmp_path / "gpu.md").read_text(), json.loads((tmp_path / "gpu.json").read_text())
    assert "| a |" in page
    assert "- pocketlm+eager: left out, the time was over" in page
    assert tree["smallm"]["missing"]
    with pytest.raises(SystemExit, match="given 'litgpt\\+bitwise'; allowed are pocketlm with"):
        bench.gpu.contestants(["litgpt+bitwise"], True)


def test_the_rehearsal_goes_through_every_part(tmp_path: Path) -> None:
    """As a person calls it: on the CPU, with a tiny model, through processes of its own and the command line."""
    parts = ("ceilings", "waiting", "smollm2-135m", "memory", "out_of_memory", "resume", "kernels")
    words = ["--rehearse", "--out", "out", "--contestants", "pocketlm+eager", "--parts", *parts]
    ran = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert ran.stdout.strip() == page.strip()
    assert "FAILED" not in page
    assert {line[4:].replace(" ", "_") for line in page.splitlines() if line.startswith("### ")} == set(parts)
    tree = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert set(tree["waiting"].values()) == {""}
    ours = tree["smollm2-135m"]["contestants"]["pocketlm+eager"]
    assert len(ours["blocks"]) == 3
    assert ours["ready"]["parameters"] == 26_816
    assert ours["mfu"] == pytest.approx(ours["tokens_per_s"] * ours["ready"]["flops_per_token"] / tree_peak(tree))
    [halving] = tree["out_of_memory"]["halvings"]
    assert (halving["before"], halving["micro_batch"], tree["out_of_memory"]["reached"]) == (8, 4, True)
    resumed = tree["resume"]["bitwise"]
    assert resumed["equal"]
    assert resumed["reached"]
    assert int(resumed["went_on_from"]) >= 120
    assert "aten::mm" in (tmp_path / "out" / "kernels-eager.md").read_text()


def tree_peak(tree: Any) -> float:
    """On a CPU no data sheet is asked: the best product."""
    return float(max(tree["ceilings"]["products"].values()))


def test_without_a_gpu_one_line_says_what_to_type(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no GPU that torch .* can use; see nvidia-smi, or add --rehearse"):
        bench.gpu.main(["--out", "nowhere"])
