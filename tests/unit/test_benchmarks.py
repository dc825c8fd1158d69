"""The arithmetic of benchmarks/: hand-computed medians and ratios, groups, and the page of results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocketlm.config import DataConfig
from pocketlm.data.prepare import prepare
from pocketlm.machine import Runtime

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("worker", "peak", "tables", "rounds", "report", "contestants", "training", "saves", "engines")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of benchmarks/, which find each other by their folder; forgotten afterwards, for their names."""
    assert not set(MODULES) & set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def contestant(bench: Any, name: str, steps: list[tuple[float, float]], *, mib: float = 100.0) -> Any:
    """One whose steps took (seconds, foreign CPUs)."""
    ready = bench.worker.Ready(parameters=1000, flops_per_token=6000.0)
    made = [bench.worker.Step(seconds, 2 * seconds, foreign, 5.0, mib) for seconds, foreign in steps]
    warm_up = [bench.worker.Step(9.0, 9.0, 0.0, 5.5, mib)]
    return bench.rounds.Contestant(name, None, ready, warm_up, made)


def test_no_script_has_the_name_of_a_module_of_python() -> None:
    """Python puts a script's folder before its own library: `tokenize.py` would be everybody's `import tokenize`."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names
    assert not names & sys.stdlib_module_names


def test_a_ratio_counts_the_rounds_in_which_both_were_clean(bench: Any) -> None:
    ours = contestant(bench, "pocketlm", [(1.0, 0.0), (1.0, 0.9), (2.0, 0.1), (1.0, 0.0)])
    peer = contestant(bench, "litgpt+bf16", [(2.0, 0.0), (9.0, 0.0), (3.0, 0.1), (9.0, 0.2)])
    by_wall, by_cpu = bench.rounds.Measure(by_cpu=False), bench.rounds.Measure(by_cpu=True)
    assert bench.rounds.ratios(ours, peer, by_wall) == [2.0, 1.5]
    assert bench.rounds.ratios(ours, peer, by_cpu) == [2.0, 9.0, 1.5, 9.0]
    assert bench.rounds.clean_times(ours, by_wall) == [1.0, 2.0, 1.0]
    assert bench.rounds.clean_times(ours, by_cpu) == [2.0, 2.0, 4.0, 2.0]
    assert bench.rounds.summary([2.0, 1.5, 9.0]) == bench.rounds.Summary(2.0, 1.5, 9.0, 3)


def test_each_of_ours_is_compared_with_every_other_once(bench: Any) -> None:
    names = ("pocketlm", "pocketlm+fp32", "litgpt")
    pairs = bench.rounds.pairs_of([contestant(bench, name, []) for name in names])
    assert {(ours.name, peer.name) for ours, peer in pairs} == {
        ("pocketlm", "litgpt"),
        ("pocketlm+fp32", "litgpt"),
        ("pocketlm+fp32", "pocketlm"),
    }


def test_the_tables_say_what_was_reached(bench: Any) -> None:
    table = bench.tables.TABLES["smollm2-2048"]
    task = bench.worker.Task("smollm2-135m", 2, 2048, 2, Path("set"), Path("batches"))
    ours = contestant(bench, "pocketlm", [(2.0, 0.0)], mib=600)
    peer = contestant(bench, "transformers+bf16", [(2.6, 0.0)], mib=1000)
    measure = bench.rounds.Measure(by_cpu=False)
    row = bench.report.comparisons([[ours, peer]], table, measure)[2]
    assert row == (
        "| pocketlm | transformers+bf16 | 1.30 (1.30 to 1.30) | 1 | 1.2, 1.5: floor reached "
        "| 60%, at most 65%: reached |"
    )
    row = bench.report.figures([[ours]], task, measure, {(1, 1, 1): 24_576_000.0})[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 4,096 tokens in 2 s at 6,000 FLOPs each: 12.3 MFLOP/s
    assert cells == [
        "1",
        "pocketlm",
        "1,000",
        "2048 (2048 to 2048)",
        "1 of 1",
        "0",
        "50%",
        "600",
        "9.0",
        "5.500, 5.000",
    ]


def test_what_was_never_clean_has_no_rate_and_no_ratio(bench: Any) -> None:
    table = bench.tables.TABLES["smollm2-512"]
    task = bench.worker.Task("smollm2-135m", 2, 512, 2, Path("set"), Path("batches"))
    ours, peer = (contestant(bench, name, [(1.0, 0.5)]) for name in ("pocketlm", "litgpt+bf16"))
    measure = bench.rounds.Measure(by_cpu=False)
    cells = bench.report.figures([[ours]], task, measure, {(1, 1, 1): 1.0})[2].split(" | ")
    assert cells[3:7] == ["-", "0 of 1", "-", "-"]
    assert "| - | 0 | 1.7, 2.2: not measured |" in bench.report.comparisons([[ours, peer]], table, measure)[2]


def test_our_memory_is_that_of_the_group_where_it_was_largest(bench: Any) -> None:
    table = bench.tables.TABLES["smallm"]  # at most 2.5 GB, 2,384 MiB
    groups = [[contestant(bench, "pocketlm", [(1.0, 0.0)], mib=mib)] for mib in (2000, 2384, 1000)]
    assert bench.report.own_memory(groups, table)[0] == "Memory, at most 2.5 GB: pocketlm 2.50 GB, reached."
    groups.append([contestant(bench, "pocketlm", [(1.0, 0.0)], mib=2385)])
    assert bench.report.own_memory(groups, table)[0].endswith("missed.")
    assert bench.report.own_memory(groups, bench.tables.TABLES["debug"]) == []


@pytest.mark.parametrize(("ratio", "word"), [(1.1, "floor missed"), (1.2, "floor reached"), (1.5, "goal reached")])
def test_floor_and_goal(bench: Any, ratio: float, word: str) -> None:
    assert bench.report.verdict(bench.tables.Goal(1.2, 1.5), ratio) == f"1.2, 1.5: {word}"


def test_a_comparison_of_unequal_models_is_void(bench: Any) -> None:
    ours, peer = (contestant(bench, name, [(1.0, 0.0)]) for name in ("pocketlm", "litgpt"))
    table = bench.tables.TABLES["smollm2-512"]
    assert bench.report.problems([ours, peer], table, 245) == []  # ln 245 = 5.50
    peer.ready = bench.worker.Ready(1001, 6000.0)
    peer.rounds[0] = bench.worker.Step(1.0, 1.0, 0.0, float("nan"), 100)
    size, loss = bench.report.problems([ours, peer], table, 245)
    assert "1,001 parameters" in size
    assert "goes from 5.500 to nan" in loss
    assert len(bench.report.problems([ours], table, 900)) == 1  # ln 900 = 6.80


def test_groups_fit_and_hold_ours(bench: Any) -> None:
    table = bench.tables.TABLES["smollm2-512"]  # 5.6 GiB for ours, 5 for a peer
    packed = bench.training.packed
    assert packed(["pocketlm", "litgpt", "lightning", "transformers"], table, 16.0) == [
        ["pocketlm", "litgpt", "lightning"],
        ["pocketlm", "transformers"],
    ]
    assert packed(["pocketlm"], table, 14.0) == [["pocketlm"]]
    both = ["pocketlm+eager", "pocketlm+compile"]
    assert packed([*both, "litgpt"], table, 16.2) == [[*both, "litgpt"]]
    assert packed([*both, "litgpt"], table, 16.1) == [[both[0], "litgpt"], [both[1], "litgpt"]]
    with pytest.raises(SystemExit, match="may not fit"):
        packed(["pocketlm", "litgpt"], table, 8.0)
    with pytest.raises(SystemExit, match="name pocketlm"):
        packed(["litgpt"], table, 8.0)


def test_every_contestant_of_a_table_has_a_size_and_every_goal_a_contestant(bench: Any) -> None:
    for table in bench.tables.TABLES.values():
        assert all(table.gib_of(name) > 0 for name in table.contestants)
        assert set(table.goals) <= set(table.contestants)
        assert [bench.contestants.unknown(name) for name in table.contestants if bench.contestants.unknown(name)] == []


def test_ours_is_ready_when_it_is_compiled_and_holds_its_copies(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which it happens: what comes after `ready` would be in the time or the memory of a step."""
    contestants, events = bench.contestants, list[str]()
    folder = prepare(DataConfig(source="synthetic", tokenizer="byte", context=32), root=tmp_path, progress=print)
    task = bench.worker.Task("debug", 8, 32, 1, folder, tmp_path / "batches")

    class Boundary:
        def ready(self, parameters: int, flops: float) -> None:
            events.append("ready")

        def __call__(self, loss: float) -> None:
            raise bench.worker.Finished

    real = contestants.Copies.of

    def of(copies: Any, tensors: Any) -> Any:
        events.append("copy")
        return real(copies, tensors)

    def compiled(state: Any, config: Any, resolved: Any, note: Any) -> None:
        events.append("on" if resolved.compile else "off")

    monkeypatch.setattr(contestants.Copies, "of", of)
    monkeypatch.setattr(contestants, "compile_if_wanted", compiled)
    monkeypatch.setattr(contestants.machine, "start", lambda train: Runtime(torch.device("cpu"), 1, "off"))
    with pytest.raises(bench.worker.Finished):
        contestants.pocketlm(task, {"eager"}, Boundary())
    assert events == ["off", "copy", "copy", "ready"]
    assert contestants.config_of(task, {"compile"}).train.compile == "on"


def test_a_flag_that_nobody_reads_is_refused(bench: Any) -> None:
    assert bench.contestants.unknown("litgpt+bf16+fused") is None
    assert "flags of transformers" in bench.contestants.unknown("transformers+bf16+fused")
    assert "no contestant 'nobody'" in bench.contestants.unknown("nobody+bf16")


def test_a_section_replaces_the_one_of_its_heading(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nWords.\n")
    monkeypatch.setattr(bench.report, "RESULTS", page)
    bench.report.write(["## one", "", "| a |", ""])
    bench.report.write(["## two", "", "| b |"])
    bench.report.write(["## one", "", "| c |"])
    assert page.read_text() == "# Results\n\nWords.\n\n## one\n\n| c |\n\n## two\n\n| b |\n"


def test_a_save_costs_what_its_window_took_beyond_its_quiet_steps(bench: Any) -> None:
    """Steps of 1 s; after step 4 training stands still for 0.5 s and one step takes 1.5 s; after step 8 nothing."""
    at = [1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]
    elapsed = [1.0, 2.0, 3.0, 4.0, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5, 11.5, 12.5]
    assert bench.saves.costs(at, elapsed, 4) == [1.0, 0.0]


def test_what_an_engine_adds_is_taken_round_by_round(bench: Any) -> None:
    """Ten steps warm up; then a step takes 2 ms, one of five 9."""
    at = [0.0] * 10 + [1.0, 1.002, 1.004, 1.013, 1.015, 1.017]
    assert bench.engines.step_ms(at) == pytest.approx(2.0)
    rounds = [(2.0, 3.0), (4.0, 4.5), (10.0, 12.0)]
    assert bench.engines.row("x", rounds) == "| x | 3 | 4.00 | 4.50 | 1.00 (0.50 to 2.00) | 1.200 (1.125 to 1.500) |"
