"""The processes of a run, its ranks: who each is, and what they say to one another.

torchrun starts them, and tells each by its environment who it is; alone, a process is the only rank of its run, every
method here answers at once, and nothing is sent. What they say is of two kinds:

    numbers of the computation   tensors, over the device's own backend (NCCL on a GPU, gloo on a CPU)
    words of the run             stop, save, refuse: over gloo between the hosts, so that they never wait for a GPU

Threads that save leave each other notes on a board, the store in which the ranks have met: a disk is waited for longer
than a rank.

Every rank must say the same things in the same order. A rank that has ended, or that says nothing for
`train.rank_timeout_s`, makes all others raise `RankLost`. What only one rank learns - a signal, a full disk - is made
known to all at the next word, so that they leave the same step together. A rank that must leave without such a word
writes why into the store over which the ranks have met, before it goes; who misses it then looks there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pocketlm import errors, torchrun
from pocketlm.errors import PocketError, RankLost, UsageError, one_line

T = TypeVar("T")
Floats = NDArray[np.float64]
Group = Literal["words", "patient"]
"""What words go over: the one that they may not be long in coming on, and one that they may."""

PLACE = re.compile(r"^\[[^]]*\] |\. This is typically caused.*")
"""What gloo says before and after what has happened."""

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5
"""Between two looks at the board."""

PATIENCE = datetime.timedelta(days=30)
"""For another that prepares data. One that has ended is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its host."""
    local_size: int = 1
    """Ranks on its host."""
    groups: Mapping[Group, Any] = field(default_factory=dict, repr=False)
    """What words go over."""
    board: Board | None = field(default=None, repr=False)
    """Where threads leave notes; alone, there is none to leave them for."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes, and speaks to the person."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    # --- words

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers, the same on all of them."""
        if self.alone:
            return number
        word = torch.tensor([number], dtype=torch.int64)
        with _another_may_be_gone():
            dist.all_reduce(word, dist.ReduceOp.MAX, group=self.groups["words"])
        return int(word.item())

    def from_first(self, make: Callable[[], T], over: Group = "words") -> T:
        """What rank 0 makes, a JSON value, on every rank; what it refuses is refused on every rank."""
        if self.alone:
            return make()
        said, refusal = "", None
        if self.is_first:
            said, refusal = _said(make)
        said = self.say(said, over)
        if refusal:
            raise refusal
        value: T = _heard(said)
        return value

    def each(self, do: Callable[[], T], over: Group = "words") -> T:
        """What each rank does for itself. What one of them refuses is refused on all: that of the first such rank."""
        if self.alone:
            return do()
        result, refusal = None, None
        try:
            result = do()
        except (PocketError, OSError) as error:
            refusal = error
        flags = torch.zeros(self.size, dtype=torch.int64)
        flags[self.rank] = refusal is not None
        with _another_may_be_gone():
            dist.all_reduce(flags, group=self.groups[over])
        if flags.any():
            first = int(flags.argmax())
            said = self.say(_said(lambda: _raise(refusal))[0] if self.rank == first else "", over, first)
            _heard(said)
        return result  # type: ignore[return-value]

    def gather(self, value: Any, over: Group = "words") -> list[Any]:
        """Each rank's JSON value, in the order of the ranks, on all of them."""
        if self.alone:
            return [value]
        return [
            json.loads(self.say(json.dumps(value) if self.rank == one else "", over, one)) for one in range(self.size)
        ]

    def say(self, text: str, over: Group, source: int = 0) -> str:
        """The text of one rank, by default rank 0's, on all of them."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        size = torch.tensor([len(data)], dtype=torch.int64)
        group = self.groups[over]
        with _another_may_be_gone():
            dist.broadcast(size, source, group=group)
            data = data if self.rank == source else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, source, group=group)
        return bytes(data.numpy()).decode()

    # --- numbers

    def add(self, tensor: Tensor) -> None:
        """Sums a tensor over the ranks, in place; every rank has the same bits."""
        if not self.alone:
            with _another_may_be_gone():
                dist.all_reduce(tensor)

    def spread(self, tensor: Tensor) -> None:
        """Overwrites a tensor with rank 0's."""
        if not self.alone:
            with _another_may_be_gone():
                dist.broadcast(tensor, 0)

    def joined(self, own: Tensor) -> Tensor:
        """Every rank's tensor of one shape, stacked: (ranks, *shape) on all of them."""
        if self.alone:
            return own[None]
        parts = own.new_empty((self.size, *own.shape))
        with _another_may_be_gone():
            dist.all_gather(list(parts), own.contiguous())
        return parts

    def gather_floats(self, own: Floats) -> list[Floats]:
        """Each rank's numbers, (any,) float64, in the order of the ranks, on all of them."""
        if self.alone:
            return [own]
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        with _another_may_be_gone():
            dist.all_reduce(sizes, group=self.groups["words"])
            padded = torch.zeros(int(sizes.max()), dtype=torch.float64)
            padded[: len(own)] = torch.from_numpy(own)
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self.groups["words"])
        return [part[:size].numpy() for part, size in zip(parts, sizes.tolist(), strict=True)]

    # --- work

    def share(self, rows: int, rank: int | None = None) -> range:
        """The rows of a step that are a rank's own: a stretch, as even as can be, the longer ones first."""
        return share(rows, self.rank if rank is None else rank, self.size)


class Board:
    """Notes between threads of the ranks, of which nobody is made to wait: who looks for one, looks now and then."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._topics = 0

    def topic(self) -> str:
        """A name that was not used before; every rank asks for as many."""
        self._topics += 1
        return f"topic {self._topics}"

    def write(self, name: str, text: str) -> None:
        with _another_may_be_gone():
            self._store.set(name, text)

    def read(self, name: str, look_on: Callable[[], None]) -> str:
        """The note of this name, when it is there.

        Args:
            look_on: called before each look, perhaps for days; it raises where none is to be waited for any more.
        """
        pause_s = SHORTEST_PAUSE_S
        while True:
            look_on()
            with _another_may_be_gone():
                if self._store.check([name]):
                    return self._store.get(name).decode()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


ALONE = Ranks()


@dataclass(frozen=True)
class Shared:
    """How the ranks share each tensor of a model: each holds a stretch of its rows (its first dimension).

    As FSDP2 cuts them: ceil(rows / ranks) for each, and the last ones have what is left, or nothing.
    """

    ranks: Ranks
    shapes: Mapping[str, torch.Size]
    """Of the whole parameters, by name."""

    def own(self, rows: int, rank: int | None = None) -> range:
        """A rank's stretch of so many rows; by default this one's."""
        each = -(-rows // self.ranks.size)
        start = min(rows, each * (self.ranks.rank if rank is None else rank))
        return range(start, min(rows, start + each))

    def cuts(self, rows: int) -> tuple[int, ...]:
        """Where each rank's stretch begins, and where the last one ends."""
        return (*(self.own(rows, rank).start for rank in range(self.ranks.size)), rows)

    def whole(self, own: Tensor, rows: int) -> Tensor:
        """A tensor of so many rows, on all ranks, of which each gives its own: (own rows, ...) -> (rows, ...)."""
        each = -(-rows // self.ranks.size)
        padded = own.new_zeros((each, *own.shape[1:]))
        padded[: len(own)] = own
        return self.ranks.joined(padded).flatten(0, 1)[:rows]


def share(count: int, rank: int, size: int) -> range:
    """A rank's stretch of `count` things: as even as can be, the longer ones first. 7 on 3 ranks are 3, 2 and 2."""
    least, longer = divmod(count, size)
    start = rank * least + min(rank, longer)
    return range(start, start + least + (rank < longer))


def turns(rows: int, size: int, micro_batch: int) -> int:
    """How many micro-batches each rank makes of a step: as many as the one with the most rows needs."""
    return -(-len(share(rows, 0, size)) // micro_batch)


def sizes_at_once(rows: int, size: int, micro_batch: int) -> list[int]:
    """How many rows a micro-batch of any rank has: the same list on all of them."""
    shares = {len(share(rows, rank, size)) for rank in range(size)}
    count = turns(rows, size, micro_batch)
    nothing = {1 for own in shares if -(-own // micro_batch) < count}
    each = {min(own, micro_batch) for own in shares} | {own % micro_batch for own in shares}
    return sorted((nothing | each) - {0})


@contextlib.contextmanager
def join(timeout_s: float) -> Iterator[Ranks]:
    """This process among those that torchrun started, until the context ends; alone where it started none.

    Args:
        timeout_s: after which a rank that says nothing is given up.

    Raises:
        RankLost: the others do not come.
        UsageError: another part of the program has begun torch.distributed, or the environment does not say where the
            ranks meet.
    """
    size = torchrun.world_size()
    if size == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise UsageError("torch.distributed is initialised already, and a run begins it itself; leave that out")
    limit = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _another_may_be_gone():
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        groups_store = dist.PrefixStore("groups", store)
        dist.init_process_group(backend, store=groups_store, rank=rank, world_size=size, timeout=limit)
    refusals, board = Refusals(store, rank, size), Board(dist.PrefixStore("board", store))
    try:
        with _another_may_be_gone():
            limits: dict[Group, datetime.timedelta] = {"words": limit, "patient": PATIENCE}
            groups = {over: dist.new_group(backend="gloo", timeout=timeout) for over, timeout in limits.items()}
        local_rank, local_size = (int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE"))
        ranks = Ranks(rank, size, local_rank, max(1, local_size), groups, board)
        with refusals.heard(), _another_may_be_gone():
            yield ranks
    finally:
        dist.destroy_process_group()
        refusals.stay()


class Refusals:
    """Why a rank leaves the others, in the store where they have met. The first rank has that store, as a rule."""

    WHY, READ = "refusal", "read by"
    STAYS_S = 10.0

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._all_read = [f"{self.READ} {one}" for one in range(size)]
        self._must_stay = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """While entered, a refusal is left for the others, and who misses another raises what that one has left.

        Where none has left anything it stays `RankLost`.
        """
        try:
            yield
        except RankLost:
            self._look()
            raise
        except (PocketError, OSError) as error:
            self._leave(error)
            raise

    def _leave(self, error: Exception) -> None:
        with contextlib.suppress(RuntimeError):  # whoever has the store is gone
            self._store.compare_set(self.WHY, "", _said(lambda: _raise(error))[0])
            self._say_read()

    def _look(self) -> None:
        word = b""
        with contextlib.suppress(RuntimeError):
            if self._store.check([self.WHY]):
                word = self._store.get(self.WHY)
                self._say_read()
        if word:
            _heard(word.decode())

    def _say_read(self) -> None:
        self._store.set(self._all_read[self._rank], "")
        self._must_stay = self._rank == 0

    def stay(self) -> None:
        """The store goes with the first rank, which stays until the others have read; not for long: one may be dead."""
        if self._must_stay:
            with contextlib.suppress(RuntimeError):
                self._store.wait(self._all_read, datetime.timedelta(seconds=self.STAYS_S))


@contextlib.contextmanager
def _another_may_be_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise lost(error) from None


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank has ended or is silent: one of torch's, or a text of gloo's."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def lost(error: BaseException) -> RankLost:
    """What to say of it."""
    text = PLACE.sub("", one_line(str(error).splitlines()[0] if str(error) else type(error).__name__))
    silent = "imed out" in text or "imeout" in text
    what = "has said nothing for train.rank_timeout_s" if silent else "has ended"
    return RankLost(f"another rank {what} ({text}); the same command goes on from the newest checkpoint")


def _said(make: Callable[[], Any]) -> tuple[str, Exception | None]:
    """What a rank makes, or refuses, as a line for the others; and the refusal itself."""
    try:
        return json.dumps({"value": make()}), None
    except PocketError as error:
        tree = {"refused": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
        return json.dumps(tree), error
    except OSError as error:
        return json.dumps(
            {"refused": error.strerror or str(error), "errno": error.errno, "file": error.filename}
        ), error


def _heard(said: str) -> Any:
    tree = json.loads(said)
    if "errno" in tree:
        raise OSError(tree["errno"], tree["refused"], tree["file"])
    if "refused" in tree:
        raise errors.again(tree["kind"], tree["refused"], tree["exit_code"])
    return tree["value"]


def _raise(error: Exception | None) -> None:
    assert error is not None
    raise error
