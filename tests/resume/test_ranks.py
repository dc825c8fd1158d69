"""Several processes of one run: the batches, gradients and losses of one, on any number of them."""

from __future__ import annotations

import json
import shutil
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from rig import Rig, flags

World = tuple[int, str]
"""How many ranks, and by which strategy they hold the state."""
WORLDS: list[World] = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]
QUIET = {"train.eval_every": 0, "sample.max_new_tokens": 1}


def words(out: str, world: World, *fields: dict[str, Any]) -> list[str]:
    given = [word for tree in (QUIET, *fields) for word in flags(tree)]
    return ["train", "debug", "--out", out, *given, "--train.strategy", world[1]]


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.goal("R15")
@pytest.mark.parametrize(
    ("rows", "micro_batch", "worlds"),
    [
        (96, 96, [(2, "ddp"), (2, "fsdp"), (4, "fsdp")]),
        (96, 16, [(2, "fsdp"), (4, "ddp")]),
        (248, 42, [(3, "ddp"), (3, "fsdp")]),  # 83, 83 and 82 rows: two turns of 42 or less, the last ones unequal
        (1, 1, [(2, "ddp"), (2, "fsdp")]),  # a rank without any
        (3, 1, [(2, "fsdp")]),  # and one with a turn less
    ],
)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_gradient_is_that_of_one_process(
    rows: int, micro_batch: int, worlds: list[World], kind: str, rig: Rig
) -> None:
    """After one step the first moment is the gradient times a constant, tensor by tensor."""
    fields = {"train.total_steps": 1, "train.tokens_per_step": rows * 32, "train.micro_batch": micro_batch}
    fields |= {"optim.kind": kind, "train.threads": 1}
    if kind == "muon" and (2, "fsdp") not in worlds:
        pytest.skip("one sharded world is enough for the other optimizer")
    rig.run(words("one", (1, "ddp"), fields))
    alone = oracle.moments(oracle.newest(rig.folder / "one"))
    for world in worlds if kind == "adamw" else [(2, "fsdp")]:
        out = "{}-{}".format(*world)
        rig.run_ranks(world[0], words(out, world, fields))
        together = oracle.moments(oracle.newest(rig.folder / out))
        assert together.keys() == alone.keys()
        first = [name for name in alone if name.startswith(("exp_avg.", "momentum."))]
        far = {name: error for name in first if (error := relative(together[name], alone[name])) > 1e-6}
        assert not far, world
        assert oracle.losses(rig.folder / out) == pytest.approx(oracle.losses(rig.folder / "one"), rel=1e-6)


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
def test_blocks_that_are_shared_compiled_and_recomputed(rig: Rig) -> None:
    """All three at once: FSDP2 puts a block together around what is compiled, and again where it is recomputed."""
    fields = {"train.total_steps": 6, "train.micro_batch": 2, "train.gradient_checkpointing": "true"}
    rig.run(words("one", (1, "ddp"), fields))
    compiled = fields | {"train.compile": "on"}
    rig.run_ranks(2, words("two", (2, "fsdp"), compiled), fresh=True)
    assert oracle.state(oracle.newest(rig.folder / "two"))["resolved.compile"] == "true"
    mine, theirs = oracle.losses(rig.folder / "two"), oracle.losses(rig.folder / "one")
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert mine != theirs, "nothing was compiled"


def test_ranks_evaluate_and_write_as_one_process(rig: Rig) -> None:
    """The same weights give the same validation loss, bit for bit, and the same samples; only rank 0 says anything."""
    fields = {"train.total_steps": 4, "train.eval_every": 2, "sample.every": 2, "train.threads": 1}
    fields |= {"sample.max_new_tokens": 12}
    for strategy, dtype in [("ddp", "fp32"), ("fsdp", "fp32"), ("fsdp", "bf16")]:  # of 257 ids, no multiple of 64
        out = f"{strategy}-{dtype}"
        ranks = rig.run_ranks(2, words(out, (2, strategy), fields, {"train.dtype": dtype}))
        assert ranks[1].stderr == ""
        assert "ranks: 2 processes, each with" in ranks[0].stderr
        measured = [record for record in oracle.journal(rig.folder / out) if record["kind"] == "eval"]
        assert [record["step"] for record in measured] == [2, 4]
        evaluated = json.loads(rig.run(["eval", out, "--json"]).stdout)
        assert evaluated["loss"] == measured[-1]["loss"]
        samples = [record for record in oracle.journal(rig.folder / out) if record["kind"] == "sample"]
        assert [record["step"] for record in samples] == [2, 4]
        as_drawn = ["--max-new-tokens", "12", "--seed", "4"]  # the run's seed, 0, and the step
        spoken = rig.run(["generate", out, "--prompt", samples[-1]["prompt"], *as_drawn])
        assert spoken.stdout == samples[-1]["text"]


# What `make test` tries stands first.
PAIRS = [((1, "ddp"), (4, "fsdp")), ((4, "fsdp"), (2, "ddp")), ((2, "fsdp"), (4, "fsdp"))]
PAIRS += [pair for pair in product(WORLDS, WORLDS) if pair not in PAIRS and pair[0] != pair[1]]


@pytest.mark.goal("R5")
def test_saved_on_some_ranks_and_resumed_on_others(proof: Any, rig: Rig) -> None:
    """20 steps after the resume the losses are those of one process."""
    fields = {"train.total_steps": 24, "train.tokens_per_step": 96 * 32, "train.threads": 1}
    rig.run(words("one", (1, "ddp"), fields))
    alone = oracle.losses(rig.folder / "one")
    for world in WORLDS:
        rig.run_ranks(world[0], words("{}-{}".format(*world), world, fields, {"train.stop_at_step": 4}))
    for case in proof.cases(3, len(PAIRS)):
        saved_on, loaded_on = PAIRS[case]
        run = rig.folder / str(case)
        shutil.copytree(rig.folder / "{}-{}".format(*saved_on), run)
        ranks = rig.run_ranks(loaded_on[0], words(str(case), loaded_on, fields))
        assert "next steps may differ in the last bits: it had" in ranks[0].stderr
        assert len(alone) == 24
        assert oracle.losses(run) == pytest.approx(alone, rel=1e-5), PAIRS[case]
