"""Who is measured on a GPU, each in a process of its own: pocketlm, transformers and litgpt in the same step.

Architecture, rows, tokens of a step, AdamW (fused), clipping and bf16 are the same; peers in autocast, with PyTorch's
attention. Flags: `+compile`, `+eager`, and for pocketlm `+bitwise` (else `same-data`). Each takes as many rows at once
as fit. Peers get rows from pinned memory, and no look at a loss inside a block; the Trainer has one for each step;
litgpt's loss is in chunks of 128 rows, as `litgpt pretrain` has it.

    driver                          worker
    ("warm", rows or None)  ->      builds, compiles, makes three steps               Ready
    ("block", steps)        ->      one step that is not timed, then the timed ones   Block
    the pipe is closed      ->      leaves
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from contestants import CLIP, adamw, config_of, counts, litgpt_model, transformers_model
from gpu_device import Device
from pocketlm import machine
from pocketlm.config import Config
from pocketlm.model import sizes
from pocketlm.training.micro_batch import OutOfMemory, Training, evenly, is_out_of_memory
from pocketlm.training.resolve import resolve
from pocketlm.training.run import compile_if_wanted, new_state
from pocketlm.training.step import Outcome, train_step
from worker import Task

WARM_UP_STEPS = 3
FLAGS: Mapping[str, Set[str]] = {
    "pocketlm": {"eager", "compile", "bitwise"},
    "transformers": {"compile"},
    "litgpt": {"compile"},
}


@dataclass(frozen=True)
class Ready:
    """A contestant past its first steps."""

    parameters: int
    flops_per_token: float
    rows_at_once: int
    first_s: float
    """Of the first step, compilation included."""
    step_s: float
    loss: float
    """Of the first step."""
    said_bytes: int | None
    """What pocketlm's closed form says that it takes."""


@dataclass(frozen=True)
class Block:
    """Steps between two synchronizations."""

    seconds: float
    launch_s: float
    """In which the host was giving the GPU its work, and not waiting for figures."""
    steps: int
    loss: float
    peak_bytes: int


@dataclass(frozen=True)
class Failed:
    """Why a contestant is not measured."""

    reason: str


class Rows:
    """The same rows for all, from a file (steps, rows, context + 1) int32."""

    def __init__(self, task: Task) -> None:
        self.batches = np.load(task.batches, mmap_mode="r")

    def read(self, position: int, count: int) -> Tensor:
        """(count, context + 1) int64, of the step at a position, in rows."""
        batch = self.batches[position // count % len(self.batches)]
        return torch.from_numpy(batch.astype(np.int64))


class Contestant(Protocol):
    launch_s: float
    """In all steps so far."""
    rows_at_once: int
    parameters: int
    flops: float
    said_bytes: int | None

    def compile(self) -> None:
        """Before the first step, and again after the rows at once have changed."""

    def step(self) -> None:
        """One optimizer step, not waited for."""

    def drop_gradients(self) -> None:
        """Of a step that was not finished."""

    def loss(self) -> float:
        """Of the last one."""


class Ours:
    """The step of `pocketlm train`: figures are read one step late."""

    def __init__(self, task: Task, flags: Set[str], device: Device) -> None:
        self.config = ours_of(task, flags, device)
        runtime = machine.start(self.config.train)
        self.resolved = resolve(self.config, runtime)
        self.state = new_state(self.config, self.resolved, runtime)
        self.rows, self.last, self.launch_s = Rows(task), None, 0.0
        self.parameters = sizes.parameters(self.config.model).total
        self.flops = sizes.flops_per_token(self.config.model, task.context)
        self.rows_at_once = self.resolved.micro_batch

    @property
    def said_bytes(self) -> int:
        resolved = self.resolved
        training = Training(self.config, torch.device(resolved.device), resolved.dtype, resolved.attention)
        return training.needs(self.rows_at_once).total

    def compile(self) -> None:
        self.state.progress.micro_batch = self.rows_at_once
        compile_if_wanted(self.state, self.config, self.resolved, lambda text: None)

    def drop_gradients(self) -> None:
        self.state.precision.drop_gradients()

    def step(self) -> None:
        began_at = time.perf_counter()
        outcome = train_step(self.state, self.rows, self.config, self.rows_at_once)
        self.launch_s += time.perf_counter() - began_at
        if self.last:
            self.last.told.hear()
        self.last: Outcome | None = outcome

    def loss(self) -> float:
        assert self.last
        return self.last.told.hear()[0]


class Theirs:
    """A peer's step: autocast, mean loss of each part, clipping, fused AdamW."""

    said_bytes = None

    def __init__(
        self,
        task: Task,
        device: Device,
        model: nn.Module,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        backward: Callable[[Tensor], None],
        clip: Callable[[], object],
    ) -> None:
        self.parameters, self.flops = counts(model, task)
        self.loss_of, self.optimizer, self.backward, self.clip = loss_of, optimizer, backward, clip
        self.rows, self.device, self.number, self.launch_s = Rows(task), device, 0, 0.0
        self.rows_at_once = task.rows

    def compile(self) -> None:
        """torch.compile does it at the first step."""

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        began_at = time.perf_counter()
        batch = self.rows.read(self.number * len(self.rows.batches[0]), len(self.rows.batches[0]))
        self.number += 1
        batch = self.device.moved(batch)
        total = torch.zeros((), device=self.device.torch)
        for part in torch.split(batch, self.rows_at_once):
            loss = self.loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous()) * (len(part) / len(batch))
            self.backward(loss)
            total += loss.detach()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last = total
        self.launch_s += time.perf_counter() - began_at

    def loss(self) -> float:
        return self.last.item()


def ours_of(task: Task, flags: Set[str], device: Device) -> Config:
    """The task as pocketlm's configuration: the benchmark's, with the rows at once left to it."""
    changes = {
        "train.micro_batch": "auto",
        "train.dtype": "bf16",
        "train.device": device.kind,
        "train.determinism": "bitwise" if "bitwise" in flags else "same-data",
        "train.compile": "on" if "compile" in flags else "off",
    }
    return Config.build(config_of(task).tree(), changes)


def transformers(task: Task, flags: Set[str], device: Device) -> Theirs:
    network = transformers_model(config_of(task).model).to(device.torch)
    model = torch.compile(network) if "compile" in flags else network

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with device.autocast():
            loss: Tensor = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        return loss

    def clip() -> Tensor:
        return nn.utils.clip_grad_norm_(network.parameters(), CLIP)

    return Theirs(task, device, network, loss_of, adamw(network, fused=True), lambda loss: loss.backward(), clip)


def litgpt(task: Task, flags: Set[str], device: Device) -> Theirs:
    from lightning.fabric import Fabric
    from litgpt.utils import chunked_cross_entropy

    network = litgpt_model(config_of(task).model, task)
    fabric = Fabric(accelerator=device.kind, devices=1, precision="bf16-mixed")
    fabric.launch()
    model = fabric.setup(torch.compile(network) if "compile" in flags else network)
    optimizer = fabric.setup_optimizers(adamw(model, fused=True))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = chunked_cross_entropy(model(inputs), targets)
        return loss

    def clip() -> object:
        return fabric.clip_gradients(model, optimizer, max_norm=CLIP)

    return Theirs(task, device, network, loss_of, optimizer, fabric.backward, clip)


MAKERS: Mapping[str, Callable[[Task, Set[str], Device], Contestant]] = {
    "pocketlm": Ours,
    "transformers": transformers,
    "litgpt": litgpt,
}


def split(name: str) -> tuple[str, Set[str]]:
    """`litgpt+compile` as peer and flags.

    Raises:
        SystemExit: there is no such contestant.
    """
    peer, *flags = name.split("+")
    if peer not in FLAGS or not set(flags) <= FLAGS[peer]:
        allowed = "; ".join(f"{each} with +{', +'.join(sorted(flags))}" for each, flags in FLAGS.items())
        raise SystemExit(f"--contestants: given {name!r}; allowed are {allowed}")
    return peer, set(flags)


def work(name: str, task: Task, device: Device, pipe: Connection) -> None:
    """Runs in the worker process."""
    warnings.simplefilter("ignore")  # what peers say of an interface is not the subject
    try:
        _serve(name, task, device, pipe)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(Failed(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))


def _serve(name: str, task: Task, device: Device, pipe: Connection) -> None:
    peer, flags = split(name)
    verb, number = pipe.recv()
    contestant = MAKERS[peer](task, flags, device)
    while True:
        if verb == "warm":
            contestant.rows_at_once = number or contestant.rows_at_once
            pipe.send(warmed_up(contestant, task, device))
        else:
            pipe.send(block(contestant, number, device))
        device.forget()  # while others have their turn
        verb, number = pipe.recv()


def warmed_up(contestant: Contestant, task: Task, device: Device) -> Ready:
    """Makes the first steps, with half as many rows at once for as long as they do not fit."""
    while True:
        try:
            seconds, losses = _first_steps(contestant, device)
            break
        except (OutOfMemory, RuntimeError, MemoryError) as error:
            if contestant.rows_at_once == 1 or not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
                raise
        contestant.rows_at_once = evenly(task.rows, contestant.rows_at_once // 2)
        contestant.drop_gradients()
        torch.compiler.reset()
        device.forget()
    c = contestant
    return Ready(c.parameters, c.flops, c.rows_at_once, seconds[0], seconds[-1], losses[0], c.said_bytes)


def _first_steps(contestant: Contestant, device: Device) -> tuple[list[float], list[float]]:
    """Seconds and losses."""
    seconds, losses = list[float](), list[float]()
    for number in range(WARM_UP_STEPS):
        began_at = time.perf_counter()
        if number == 0:
            contestant.compile()
        contestant.step()
        device.synchronize()
        seconds.append(time.perf_counter() - began_at)
        losses.append(contestant.loss())
    return seconds, losses


def block(contestant: Contestant, steps: int, device: Device) -> Block:
    """Times so many steps, after one that makes its memory again."""
    contestant.step()
    device.synchronize()
    launched_s, began_at = contestant.launch_s, time.perf_counter()
    for _ in range(steps):
        contestant.step()
    device.synchronize()
    seconds = time.perf_counter() - began_at
    return Block(seconds, contestant.launch_s - launched_s, steps, contestant.loss(), device.peak())
