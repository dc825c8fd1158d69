"""What makes a run slower than it should be: a line each on invented facts, and the facts of invented machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pocketlm import machine
from pocketlm.config import Config
from pocketlm.training.log import RunInfo, Silent
from pocketlm.training.loop import train
from pocketlm.training.slowness import Facts, slower_than_it_should_be

FINE = Facts(threads=8, cores=8)
NVIDIA = {"has_nvidia": True}
NO_BF16 = {"has_bf16": False, "dtype": "fp32"}
OLD_GPU = {"device": "cuda", "has_bf16": False, "dtype": "fp16"}
NO_COMPILER = {"why_not_compiled": "no g++"}


def test_nothing_is_said_of_a_machine_that_lacks_nothing() -> None:
    assert slower_than_it_should_be(FINE) == []


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (NVIDIA, ["NVIDIA GPU is here", "2.13.0+cpu is built without CUDA", "install a build", "--device cpu"]),
        (NVIDIA | {"built_for_cuda": True, "torch_build": "2.13.0+cu130"}, ["+cu130 cannot use it", "nvidia-smi"]),
        (NO_BF16, ["CPU has no bf16", "run in fp32", "smaller preset"]),
        (NO_BF16 | {"dtype": "bf16", "dtype_wanted": "bf16"}, ["CPU", "emulates it", "--train.dtype auto"]),
        (OLD_GPU, ["GPU has no bf16", "fp16, with a loss scale", "Ampere"]),
        (OLD_GPU | {"dtype": "bf16", "dtype_wanted": "bf16"}, ["GPU", "emulates it", "--train.dtype auto"]),
        ({"threads": 64, "threads_wanted": 64}, ["64 threads wait for one another on 8", "leave out --train.threads"]),
        ({"threads": 64, "goes_on": True}, ["began with 64 threads and keeps them", "only 8 cores"]),
        ({"omp_threads": 2}, ["OMP_NUM_THREADS=2", "8 threads", "--train.threads 2"]),
        (NO_COMPILER, ["nothing compiles here (no g++)", "install a C++ compiler"]),
        (NO_COMPILER | {"device": "cuda"}, ["nothing compiles here (no g++)", "install Triton"]),
    ],
)
def test_each_lack_is_one_line_with_what_helps(facts: Mapping[str, object], told: list[str]) -> None:
    [line] = slower_than_it_should_be(replace(FINE, **facts))  # type: ignore[arg-type]
    assert "\n" not in line
    for words in told:
        assert words in line


@pytest.mark.parametrize(
    "facts",
    [
        NVIDIA | {"device_wanted": "cpu"},
        NVIDIA | {"device": "cuda"},
        NO_BF16 | {"dtype_wanted": "fp32"},
        {"omp_threads": 2, "threads": 4, "threads_wanted": 4},
        {"omp_threads": 2, "goes_on": True},
        {"omp_threads": 8},
        {"omp_threads": 64},
    ],
)
def test_nothing_is_said_of_what_was_asked_for_or_cannot_be_changed(facts: Mapping[str, object]) -> None:
    assert slower_than_it_should_be(replace(FINE, **facts)) == []  # type: ignore[arg-type]


def test_all_that_lacks_is_said_at_once() -> None:
    lacking = NVIDIA | NO_BF16 | NO_COMPILER | {"threads": 64, "cores": 2, "omp_threads": 1}
    assert len(slower_than_it_should_be(Facts(**lacking))) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("file", machine.NVIDIA_FILES)
def test_a_gpu_is_known_by_the_files_of_its_driver(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not machine.has_nvidia(tmp_path)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert machine.has_nvidia(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.has_nvidia(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not machine.has_nvidia(tmp_path), "it is hidden on purpose"


def test_the_environment_asks_for_threads_where_a_person_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for text, threads in (("", None), ("3", 3), ("4,2", None), ("all", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert machine.omp_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert machine.omp_threads() is None, "torchrun has set it"


def test_a_run_says_it_once_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Heard(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

        def started(self, info: RunInfo) -> None:
            self.lines.append("started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "has_nvidia", lambda: True)
    monkeypatch.setattr("pocketlm.devices.present", lambda: ["cpu"])
    heard = Heard()
    fields = {"train.device": "auto", "train.total_steps": 2, "sample.prompts": []}
    train(Config.preset("debug", fields), out=Path("run"), listener=heard)
    [place] = [place for place, line in enumerate(heard.lines) if "NVIDIA GPU is here" in line]
    assert place < heard.lines.index("started")
