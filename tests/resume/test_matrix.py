"""The ways to compute a step, each stopped and taken up again; and each the same thing on every run."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import oracle
import psutil
import pytest
from rig import Rig, Zygote, flags

# 96 rows a step of 1,812: an epoch ends inside step 19. Stopped at 4 and 13: five steps and more after each.
BASE = {"train.total_steps": 20, "train.tokens_per_step": 96 * 32, "train.eval_every": 4, "sample.every": 10}
STOPS = (4, 13)
CELLS = list(product(["adamw", "muon"], ["fp32", "bf16"], [1, 3]))
# What `auto` takes on a CPU, where the preset pins what is the same everywhere.
FAST = {"train.attention": "folded", "train.fp32_matmul": "medium"}
# 16 rows of 128 and 32,768 weights in a matrix: enough for the threads to be given work.
WIDE = {
    "model.hidden_size": 128,
    "model.intermediate_size": 256,
    "model.num_attention_heads": 4,
    "model.head_dim": 32,
    "model.max_position_embeddings": 128,
    "data.context": 128,
    "train.tokens_per_step": 16 * 128,
    "train.total_steps": 8,
    "train.eval_every": 4,
    "train.eval_tokens": 1024,
}


def words(out: str, *fields: dict[str, Any]) -> list[str]:
    return ["train", "debug", "--out", out, *(word for tree in fields for word in flags(tree))]


def stopped_equals_whole(rig: Rig, *fields: dict[str, Any], ranks: int = 1) -> None:
    rig.run_ranks(ranks, words("whole", *fields))
    for stop in STOPS:
        rig.run_ranks(ranks, words("run", *fields, {"train.stop_at_step": stop}))
    rig.run_ranks(ranks, words("run", *fields))
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R4")
@pytest.mark.parametrize(("kind", "dtype", "accumulation"), CELLS)
def test_stopped_and_resumed_equals_uninterrupted(kind: str, dtype: str, accumulation: int, rig: Rig) -> None:
    cell = {"optim.kind": kind, "train.dtype": dtype, "train.micro_batch": 96 // accumulation}
    stopped_equals_whole(rig, BASE, cell)
    assert f"{accumulation} micro-batch(es)" in rig.children[0].stderr
    assert (rig.children[0].stderr.count(f"computation: {dtype}"), rig.children[0].stderr.count(f"; {kind}")) == (1, 1)


# The other 40 cells. What `make test` tries stands first: each engine in each world, and each other value with both.
OTHERS: list[tuple[Any, ...]] = [
    ("adamw", "bf16", 1, 2, "ddp", "torch"),
    ("muon", "fp32", 3, 2, "fsdp", "torch"),
    ("muon", "bf16", 3, 1, "ddp", "lightning"),
    ("muon", "fp32", 1, 2, "ddp", "lightning"),
    ("adamw", "bf16", 3, 2, "fsdp", "lightning"),
]
WORLDS = [(1, "ddp"), (2, "ddp"), (2, "fsdp")]
EVERY = [(*cell, *world, engine) for cell, world, engine in product(CELLS, WORLDS, ["torch", "lightning"])]
OTHERS += [cell for cell in EVERY if cell not in OTHERS and cell[3:] != (1, "ddp", "torch")]
assert len(OTHERS) + len(CELLS) == 48


@pytest.mark.goal("R4")
def test_stopped_and_resumed_on_ranks_and_with_the_other_engine(proof: Any, zygote: Zygote, tmp_path: Path) -> None:
    for case in proof.cases(5, len(OTHERS)):
        kind, dtype, accumulation, ranks, strategy, engine = OTHERS[case]
        cell = {"optim.kind": kind, "train.dtype": dtype, "train.micro_batch": 96 // accumulation // ranks}
        cell |= {"train.strategy": strategy, "train.engine": engine}
        folder = tmp_path / str(case)
        folder.mkdir()
        with Rig(zygote, folder) as rig:
            stopped_equals_whole(rig, BASE, cell, ranks=ranks)
            said = rig.children[0].stderr
            assert f"{accumulation} micro-batch(es)" in said
            assert said.count(f"ranks: {ranks} processes") == said.count(f"({strategy}): as given") == (ranks > 1)
        shutil.rmtree(folder)


@pytest.mark.goal("R4")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stopped_and_resumed_on_the_fast_path(dtype: str, rig: Rig) -> None:
    cell = FAST | {"train.dtype": dtype, "train.micro_batch": 32}
    stopped_equals_whole(rig, BASE, cell)
    for plan in ("attention: folded (as given)", "fp32 products: medium (as given)", "of up to 32 (as given)"):
        assert plan in rig.children[0].stderr, plan
    state = oracle.state(oracle.newest(rig.folder / "run"))
    assert (state["resolved.attention"], state["resolved.fp32_matmul"]) == ('"folded"', '"medium"')


@pytest.mark.goal("R4")
@pytest.mark.parametrize(
    "cell", [FAST | {"train.dtype": "bf16"}, {"model.position": "learned"}], ids=["fast", "learned"]
)
def test_stopped_and_resumed_with_document_masks(cell: dict[str, Any], rig: Rig) -> None:
    """And `pocketlm eval` reads documents as the training did, unless it is told otherwise."""
    stopped_equals_whole(rig, BASE, cell, {"data.document_masks": "true", "train.micro_batch": 36})
    assert " inside each document (as given)" in rig.children[0].stderr
    measured = [record for record in oracle.journal(rig.folder / "run") if record["kind"] == "eval"][-1]["loss"]
    said = [
        json.loads(rig.run(["eval", "run", "--json", *words]).stdout)
        for words in ([], ["--document-masks", "on"], ["--document-masks", "off"])
    ]
    assert [each["document_masks"] for each in said] == [True, True, False]
    assert [each["loss"] for each in said[:2]] == [measured] * 2
    assert said[2]["loss"] != measured, "documents are read otherwise"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_eval_in_another_process_gives_what_training_measured(dtype: str, threads: int, rig: Rig) -> None:
    """With the run's own threads and kernels, and 257 ids, which are no multiple of anything."""
    rig.run(words("run", WIDE, FAST, {"train.dtype": dtype, "train.threads": threads, "train.eval_tokens": 0}))
    measured = [record for record in oracle.journal(rig.folder / "run") if record["kind"] == "eval"][-1]
    child = rig.run(["eval", "run", "--json"], fresh=True, environment={"OMP_NUM_THREADS": str(3 - threads)})
    evaluated = json.loads(child.stdout)
    names = ("loss", "bits_per_byte", "perplexity", "tokens", "bytes")
    assert {name: evaluated[name] for name in names} == {name: measured[name] for name in names}


@pytest.mark.goal("R4")
def test_stopped_and_resumed_in_an_order_of_pieces(rig: Rig) -> None:
    """The last micro-batch of a step is smaller than the others, too."""
    pieces = {"data.shuffle": "piece", "data.piece_documents": 50, "train.micro_batch": 36}
    stopped_equals_whole(rig, BASE, pieces)


@pytest.mark.goal("R18")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_run_is_the_same_for_a_number_of_threads(threads: int, rig: Rig) -> None:
    fields = WIDE | {"train.threads": threads}
    hashes = set()
    for name in "abc":
        child = rig.start(words(name, fields), holds=[("save", 1)])
        child.reach("save", 1)
        assert psutil.Process(child.pid).num_threads() >= threads, "the threads are not there"
        child.release()
        assert child.wait() == 0, child.stderr
        hashes.add(oracle.state_hash(oracle.newest(rig.folder / name)))
        assert oracle.journal(rig.folder / name) == oracle.journal(rig.folder / "a")
    assert len(hashes) == 1


@pytest.mark.goal("R18")
def test_the_environment_of_a_resume_changes_nothing(rig: Rig) -> None:
    """OpenMP reads its variable when it is loaded: only a new Python has another one."""
    fields = WIDE | {"train.threads": 2}
    rig.run(words("whole", fields))
    rig.run(words("run", fields, {"train.stop_at_step": 4}))
    child = rig.run(
        words("run", fields), fresh=True, environment={"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"}
    )
    assert "going on from step 4" in child.stderr
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R18")
def test_two_equal_runs_write_byte_equal_model_folders(rig: Rig) -> None:
    for name in "ab":
        rig.run(words(name, BASE, {"name": name}))
    first, second = (oracle.newest(rig.folder / name) for name in "ab")
    names = {path.name for path in first.iterdir() if path.is_file()} - {"manifest.json"}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
