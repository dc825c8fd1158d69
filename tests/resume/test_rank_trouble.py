"""What happens to one rank happens to the run: all leave together, in time, with one reason and nothing lost."""

from __future__ import annotations

import signal
import time
from typing import Any

import oracle
import pytest
from rig import Rig, flags

FIELDS = {"train.total_steps": 20, "train.micro_batch": 4, "train.threads": 1, "sample.max_new_tokens": 1}


def words(out: str, strategy: str, *fields: dict[str, Any]) -> list[str]:
    given = [word for tree in (FIELDS, *fields) for word in flags(tree)]
    return ["train", "debug", "--out", out, *given, "--train.strategy", strategy]


@pytest.mark.parametrize("call", [7, 8, 9])
def test_memory_that_one_rank_has_not(call: int, rig: Rig) -> None:
    """In each of a step's three turns: all of them do the step again with half of the rows at once."""
    three_turns = {"train.tokens_per_step": 24 * 32, "train.eval_every": 0}
    ranks = rig.start_ranks(2, words("run", "ddp", three_turns), only_breaks={1: [("forward", call)]})
    assert ranks.wait() == [0, 0], ranks.said()
    halved = [record for record in oracle.journal(rig.folder / "run") if record["kind"] == "micro_batch"]
    assert [(record["step"], record["micro_batch"], record["reason"]) for record in halved] == [
        (2, 2, "on another rank")
    ]
    rig.run_ranks(2, words("whole", "ddp", three_turns))
    assert oracle.losses(rig.folder / "run") == pytest.approx(oracle.losses(rig.folder / "whole"), abs=1e-3)


@pytest.mark.parametrize("call", [3, 4])
def test_memory_that_ran_out_where_ranks_share_each_block(call: int, rig: Rig) -> None:
    """The step cannot be done again: the run ends, and says which rank had none."""
    ranks = rig.start_ranks(2, words("run", "fsdp", {"train.micro_batch": 2}), only_breaks={1: [("forward", call)]})
    codes = ranks.wait()
    assert "a step of rank 1 does not fit into memory" in ranks[0].stderr
    assert_refused(ranks, codes, 2)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_memory_that_runs_out_on_one_rank_while_blocks_are_compiled(strategy: str, rig: Rig) -> None:
    compiled = {"train.compile": "on", "train.total_steps": 4}
    ranks = rig.start_ranks(2, words("run", strategy, compiled), only_breaks={1: [("forward", 1)]})
    codes = ranks.wait()
    if strategy == "fsdp":
        assert "a step of rank 1 does not fit into memory" in ranks[0].stderr
        assert_refused(ranks, codes, 2)
        return
    assert codes == [0, 0], ranks.said()
    halved = [record for record in oracle.journal(rig.folder / "run") if record["kind"] == "micro_batch"]
    assert [(record["step"], record["micro_batch"]) for record in halved] == [(0, 2)]


@pytest.mark.goal("R19")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(strategy: str, rig: Rig) -> None:
    rig.run_ranks(2, words("whole", strategy))
    ranks = rig.start_ranks(2, words("run", strategy), only_holds={1: [("step", 7)]})
    ranks[1].reach("step", 7)
    ranks[1].kill(signal.SIGTERM)
    ranks[1].ping()
    ranks[1].release()
    assert_refused(ranks, ranks.wait(20), 143)
    assert "stopped by SIGTERM at step 6, saved" in ranks[0].stderr
    assert oracle.steps(rig.folder / "run")[-1] == 6
    rig.run_ranks(2, words("run", strategy))
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R20")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(strategy: str, rig: Rig) -> None:
    rig.run_ranks(2, words("whole", strategy))
    for rank in (1, 0):
        ranks = rig.start_ranks(2, words("run", strategy), only_holds={rank: [("step", 8)]})
        ranks[rank].reach("step", 8)
        ranks[rank].kill()
        codes = ranks.wait(20)
        assert codes[rank] == -9
        assert codes[1 - rank] == 1, "a crash: torchrun is to start all anew"
        assert "another rank has ended" in ranks[1 - rank].stderr
    rig.run_ranks(2, words("run", strategy))
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R20")
def test_a_rank_that_stalls_is_waited_for_and_given_up_after_the_stated_time(rig: Rig) -> None:
    rig.run_ranks(2, words("whole", "ddp"))
    ranks = rig.start_ranks(2, words("run", "ddp"), only_holds={1: [("step", 7)]})
    ranks[1].reach("step", 7)
    ranks[1].release()
    assert ranks.wait() == [0, 0], "it was only late"
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")

    limit = {"train.rank_timeout_s": 3}
    ranks = rig.start_ranks(2, words("stalled", "ddp", limit), only_holds={1: [("step", 7)]})
    ranks[1].reach("step", 7)
    assert ranks[0].wait(30) == 1
    assert "another rank has said nothing for train.rank_timeout_s" in ranks[0].stderr
    ranks[1].release()
    assert ranks[1].wait(30) == 1
    rig.run_ranks(2, words("stalled", "ddp", limit))
    oracle.assert_equal(rig.folder / "stalled", rig.folder / "whole")


@pytest.mark.goal("R20")
@pytest.mark.parametrize(
    ("strategy", "rank", "phase", "occurrence"), [("ddp", 0, "save", 5), ("fsdp", 0, "save", 2), ("fsdp", 1, "rows", 2)]
)
def test_a_disk_may_be_slower_than_a_rank(strategy: str, rank: int, phase: str, occurrence: int, rig: Rig) -> None:
    """A save, the last one too, may take longer than a rank may be silent."""
    limit = {"train.rank_timeout_s": 2}
    rig.run_ranks(2, words("whole", strategy, limit))
    ranks = rig.start_ranks(2, words("run", strategy, limit), only_holds={rank: [(phase, occurrence)]})
    ranks[rank].reach(phase, occurrence)
    time.sleep(4)  # what is tested: this long, a silent rank would be given up
    ranks[rank].release()
    assert ranks.wait() == [0, 0], ranks.said()
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


@pytest.mark.goal("R20")
def test_a_rank_that_stalls_in_a_save_does_not_hold_the_others(rig: Rig) -> None:
    limit = {"train.rank_timeout_s": 2}
    ranks = rig.start_ranks(2, words("run", "fsdp", limit), only_holds={1: [("rows", 2)]})
    ranks[1].reach("rows", 2)
    ranks[1].kill(signal.SIGSTOP)
    assert ranks[0].wait(30) == 1
    assert "another rank has said nothing for train.rank_timeout_s" in ranks[0].stderr
    ranks[1].kill()
    ranks[1].wait()
    assert oracle.steps(rig.folder / "run") == [0]


@pytest.mark.goal("R11", "R20")
def test_a_disk_that_refuses_the_rows_of_one_rank(rig: Rig) -> None:
    """Never a checkpoint that lacks them; every rank leaves at the same step, or all go on."""
    rig.run_ranks(2, words("whole", "fsdp"))
    ranks = rig.start_ranks(2, words("run", "fsdp"), only_breaks={1: [("rows", 2)]})
    assert_refused(ranks, ranks.wait(30), 3)
    assert "cannot save step 5" in ranks[0].stderr
    assert "No space left on device (rank 1)" in ranks[0].stderr
    assert oracle.steps(rig.folder / "run") == [0]
    oracle.assert_whole(rig.folder / "run")
    rig.run_ranks(2, words("run", "fsdp"))
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")

    going_on = {"train.on_save_error": "go-on"}
    ranks = rig.run_ranks(2, words("on", "fsdp", going_on), only_breaks={1: [("rows", 2)]})
    assert "cannot save step 5" in ranks[0].stderr
    oracle.assert_equal(rig.folder / "on", rig.folder / "whole")


def assert_refused(ranks: Any, codes: list[int], code: int) -> None:
    """For a reason, which is not said twice."""
    assert codes == [code, code], ranks.said()
