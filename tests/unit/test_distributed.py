"""How rows and rows of matrices are dealt to ranks, and what one rank's refusal is to the others."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pocketlm import errors
from pocketlm.distributed import ALONE, Board, Ranks, Refusals, Shared, share, sizes_at_once, turns
from pocketlm.errors import ConfigError, DataError, Diverged, FileError, Interrupted, PocketError, RankLost
from pocketlm.optim.muon import Muon
from pocketlm.training.log import Silent
from pocketlm.training.run import _say_unlike
from pocketlm.training.step import _parts


@given(rows=st.integers(1, 300), size=st.integers(1, 9), micro_batch=st.integers(1, 300))
def test_the_ranks_together_take_the_rows_of_a_step(rows: int, size: int, micro_batch: int) -> None:
    """In their order, each once, in equally many micro-batches whose sizes all ranks foresee."""
    batch = torch.arange(rows)[:, None] * 10 + torch.arange(4)  # (rows, T + 1)
    taken, counts, sizes = [], set(), set()
    for rank in range(size):
        own = share(rows, rank, size)
        parts = _parts(batch[own.start : own.stop], micro_batch, turns(rows, size, micro_batch))
        counts.add(len(parts))
        for inputs, targets in parts:
            assert inputs.shape == targets.shape
            sizes.add(len(inputs))
            if (targets != -100).all():
                taken.append(torch.cat([inputs, targets[:, -1:]], 1))
            else:
                assert (targets == -100).all()
                assert inputs.min() >= 0, "no id of any vocabulary"
    assert torch.equal(torch.cat(taken), batch)
    assert len(counts) == 1
    assert sorted(sizes) == sizes_at_once(rows, size, micro_batch)
    if size == 1:
        assert [len(part) for part in torch.split(batch, micro_batch)] == [len(inputs) for inputs, _ in parts]


@given(rows=st.integers(0, 70), size=st.integers(1, 9))
def test_rows_of_tensors_are_dealt_as_chunks_are(rows: int, size: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(size)] if rows else []
    shared = [Shared(Ranks(rank, size), {}) for rank in range(size)]
    assert [len(one.own(rows)) for one in shared] == chunks + [0] * (size - len(chunks))
    assert shared[0].cuts(rows) == (*(one.own(rows).start for one in shared), rows)


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def among(self, barrier: threading.Barrier, places: dict[int, Tensor]) -> Threads:
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "places", places)
        return self

    def joined(self, own: Tensor) -> Tensor:
        self.places[self.rank] = own.clone()  # type: ignore[attr-defined]
        self.barrier.wait()  # type: ignore[attr-defined]
        whole = torch.stack([self.places[rank] for rank in range(self.size)])  # type: ignore[attr-defined]
        self.barrier.wait()  # type: ignore[attr-defined]
        return whole


SHAPES = {
    "even.q": (32, 16),
    "even.k": (32, 16),
    "odd.up": (33, 32),
    "odd.down": (32, 33),
    "few": (3, 8),
    "one": (1, 8),
}


def matrices(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.goal("R15")
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_muon_of_shared_matrices_is_that_of_whole_ones(size: int) -> None:
    """Bit for bit, where ranks share the rows evenly and where not, some of them none."""
    options: dict[str, Any] = {"num_steps": 5, "weight_decay": 0.1}
    no, clip = torch.tensor(False), torch.tensor(0.5)
    whole = Muon(matrices(0), {}, **options)
    for step in range(3):
        whole.step(matrices(1 + step), 0.02, 0.9, clip, no)

    barrier, places = threading.Barrier(size, timeout=60), dict[int, Tensor]()
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    shares = [Shared(Threads(rank, size).among(barrier, places), shapes) for rank in range(size)]

    def own(shared: Shared, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = {name: shared.own(len(tensor)) for name, tensor in tensors.items()}
        return {name: tensor[rows[name].start : rows[name].stop].clone() for name, tensor in tensors.items()}

    muons = [Muon(own(shared, matrices(0)), {}, **options, shared=shared) for shared in shares]

    def train(muon: Muon, shared: Shared) -> None:
        for step in range(3):
            muon.step(own(shared, matrices(1 + step)), 0.02, 0.9, clip, no)

    threads = [threading.Thread(target=train, args=pair) for pair in zip(muons, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in SHAPES:
        assert torch.equal(torch.cat([muon.matrices[name] for muon in muons]), whole.matrices[name]), name
        assert torch.equal(torch.cat([muon.momentum[name] for muon in muons]), whole.momentum[name]), name


@pytest.mark.parametrize(
    "error",
    [ConfigError("a", "b"), DataError("x"), FileError("y"), Diverged("z"), Interrupted("stopped", 2), PocketError("p")],
)
def test_a_refusal_is_the_same_on_another_rank(error: PocketError) -> None:
    again = errors.again(type(error).__name__, str(error), error.exit_code)
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)


@pytest.mark.parametrize("error", [DataError("no text"), Interrupted("stopped", 2), OSError(28, "full", "a")])
def test_a_refusal_of_one_rank_is_that_of_those_who_miss_it(error: Exception) -> None:
    """The first one that was left; and the first rank, whose store it is, stays until all have read."""
    store = dist.HashStore()
    refusals = [Refusals(store, rank, 4) for rank in range(4)]
    for rank, own in enumerate((RankLost("gone"), error, RankLost("gone"), FileError("later"))):
        with pytest.raises(type(own if rank in (0, 3) else error)) as raised, refusals[rank].heard():
            raise own
        assert str(raised.value) == str(own if rank in (0, 3) else error), "before it, or its own"
    with pytest.raises(type(error)) as raised, refusals[0].heard():
        raise RankLost("gone")
    assert getattr(raised.value, "exit_code", 3) == getattr(error, "exit_code", 3)
    assert store.check([Refusals.READ + f" {rank}" for rank in range(4)])
    refusals[0].stay()

    with pytest.raises(RankLost, match="gone"), Refusals(dist.HashStore(), 0, 2).heard():
        raise RankLost("gone")


def test_a_note_is_read_when_it_is_there_and_whoever_waits_may_be_told_that_none_comes() -> None:
    store = dist.HashStore()
    mine, theirs = Board(store), Board(store)
    assert [mine.topic(), mine.topic()] == [theirs.topic(), theirs.topic()]
    looks = list[int]()

    def look_on() -> None:
        looks.append(1)
        if len(looks) == 3:
            theirs.write("a", "said at last")
        if len(looks) > 9:
            raise RankLost("gone")

    assert mine.read("a", look_on) == "said at last"
    assert len(looks) == 3
    with pytest.raises(RankLost, match="gone"):
        mine.read("b", look_on)


def test_one_that_is_alone_is_answered_at_once() -> None:
    assert (ALONE.most(3), ALONE.from_first(lambda: {"a"}), ALONE.each(lambda: 5), ALONE.gather("x")) == (
        3,
        {"a"},
        5,
        ["x"],
    )
    with pytest.raises(ZeroDivisionError):
        ALONE.from_first(lambda: 1 // 0)


class Unlike(Ranks):
    """Rank 1 is on another machine."""

    def gather(self, value: Any, over: Any = "words") -> list[Any]:
        return [value, value | {"cpu": "another"}, value]


def test_a_rank_that_computes_otherwise_is_named() -> None:
    story = Story()
    _say_unlike(Unlike(0, 3), story)
    _say_unlike(ALONE, story)
    (note,) = story.notes
    assert note.startswith("rank 1 computes otherwise than rank 0, and may drift away from it: cpu is another, not ")


class Story(Silent):
    """Remembers the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
