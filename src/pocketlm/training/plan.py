"""What a run will take, before it is begun: closed forms for what can be counted, a probe for what must be measured.

counted    parameters, FLOPs, tokens, bytes of memory and of checkpoints, how often is evaluated and saved
measured   seconds of a step, of an evaluated token, of a hashed byte: on this machine, or assumed for another
left out   preparing the data, samples, and what is not known without the data: said in `left_out`
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from pocketlm import machine
from pocketlm.config import Config
from pocketlm.data.opened import mixed
from pocketlm.data.prepare import find_prepared
from pocketlm.data.shards import Dataset
from pocketlm.data.streamed import open_as_run
from pocketlm.errors import ConfigError, PocketError
from pocketlm.field_types import AttentionKernel, Dtype
from pocketlm.model import sizes
from pocketlm.text.tokenizer import Tokenizer, load_tokenizer
from pocketlm.training import slowness
from pocketlm.training.gpus import ASSUMED_MFU, Gpu
from pocketlm.training.memory import available_bytes
from pocketlm.training.micro_batch import Training, evenly
from pocketlm.training.probe import Hear, Probed, device_name, probe
from pocketlm.training.resolve import Resolved, resolve, strategy_within
from pocketlm.training.work import Work, checkpoint_bytes, work_of

PROBE_S = 12.0
PROBE_STEPS = 8
LONGEST_S = 4.0
"""Of what goes through the model at once in the probe: more is tried with fewer rows, a longer row with a shorter."""
SHORTEST_CONTEXT = 64
KERNELS_BYTES = 100 << 20
"""What a CPU's libraries take once they have computed: code and buffers, as measured."""
HASHED_PER_SAVE = {"cpu": 1.25}
"""Times that a checkpoint's bytes go through SHA-256 in the training's time, by device: while it is written; comparing
what is read again, before old ones go, takes a fourth of that. It is beside the training: it takes time of a CPU that
trains, not of a GPU."""


@dataclass(frozen=True)
class Seconds:
    """Of a run, from the command to its end."""

    start_up: float
    steps: float
    evaluations: float
    checkpoints: float

    @property
    def total(self) -> float:
        return self.start_up + self.steps + self.evaluations + self.checkpoints


@dataclass(frozen=True)
class Memory:
    """Of the device that computes."""

    by_part: sizes.TrainingMemory
    process_bytes: int
    """What the process takes beside it; 0 on a GPU."""
    available_bytes: int
    peak_bytes: int
    """The most that the run will hold: the probe's, or the closed form's."""
    by_micro_batch: list[tuple[int, int]]
    """(rows at once, bytes in closed form, the process included)."""

    def fits(self, size: int) -> bool:
        """Whether there is room for so many bytes, the process included: what it has is no longer available."""
        return size - self.process_bytes <= self.available_bytes


@dataclass(frozen=True)
class Plan:
    """What `pocketlm plan` says."""

    config: Config
    work: Work
    device: str
    team: sizes.Team
    dtype: Dtype
    threads: int | None
    micro_batch: int
    peak_flops: float
    """Of one device."""
    step_s: float
    seconds: Seconds
    memory: Memory
    checkpoint_bytes: int
    data_bytes: int | None
    joules: float | None
    assumed_mfu: float | None
    """What an estimate rests on; None where it was measured."""
    left_out: list[str]

    @property
    def tokens_per_s(self) -> float:
        return self.config.train.tokens_per_step / self.step_s

    @property
    def mfu(self) -> float:
        flops = sizes.flops_per_token(self.config.model, self.config.data.context)
        return self.tokens_per_s * flops / (self.team.ranks * self.peak_flops)

    def tree(self) -> dict[str, Any]:
        """Plain numbers: bytes, seconds, tokens, FLOPs, joules."""
        config, count, memory = self.config, sizes.parameters(self.config.model), self.memory
        return {
            "name": config.name,
            "device": self.device,
            "devices": self.team.ranks,
            "strategy": self.team.strategy,
            "dtype": self.dtype,
            "threads": self.threads,
            "peak_flops": self.peak_flops,
            "assumed_mfu": self.assumed_mfu,
            "parameters": count.total,
            "non_embedding_parameters": count.non_embedding,
            "flops_per_token": sizes.flops_per_token(config.model, config.data.context),
            **asdict(self.work),
            "context": config.data.context,
            "tokens_per_step": config.train.tokens_per_step,
            "micro_batch": self.micro_batch,
            "step_s": self.step_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "time_s": asdict(self.seconds) | {"total": self.seconds.total},
            "memory_bytes": {
                "peak": memory.peak_bytes,
                "available": memory.available_bytes,
                "process": memory.process_bytes,
                "by_part": asdict(memory.by_part) | {"total": memory.by_part.total},
                "by_micro_batch": [{"micro_batch": rows, "bytes": size} for rows, size in memory.by_micro_batch],
            },
            "disk_bytes": {
                "checkpoint": self.checkpoint_bytes,
                "checkpoints": self.checkpoint_bytes * self.work.kept,
                "peak": self.checkpoint_bytes * self.work.most_kept,
                "data": self.data_bytes,
            },
            "energy_j": self.joules,
            "left_out": self.left_out,
        }


def plan_here(config: Config, hear: Hear) -> Plan:
    """A plan for one process on this machine, probed; seconds.

    Raises:
        ConfigError: it does not fit into this machine's memory.
        KeyboardInterrupt: also when some steps were measured; what they say is no plan.
    """
    runtime = machine.start(config.train)
    available = available_bytes(runtime.device)
    dataset, left_out = _dataset(config)
    hear("measuring what this machine does")
    resolved = resolve(config, runtime)
    slowness.warn(hear, config, resolved, runtime)
    work = work_of(config, dataset)
    process = psutil.Process().memory_info().rss
    begun_s = time.time() - psutil.Process().create_time()
    trial = _try(config, resolved, runtime, hear)
    probed = trial.probed
    on_cpu = runtime.device.type == "cpu"
    beside = process + KERNELS_BYTES if on_cpu else 0
    training = Training(config, runtime.device, resolved.dtype, resolved.attention)
    memory = _memory(training, trial.micro_batch, available, beside)
    if trial.is_whole:
        # the probe saves nothing; shards are mapped, and count as taken once they were read
        beside_steps = memory.by_part.snapshot + (_data_bytes(dataset) or 0) if on_cpu else 0
        memory = replace(memory, peak_bytes=probed.peak_bytes + beside_steps)
    size = checkpoint_bytes(config, _tokenizer(dataset, left_out), resolved)
    step_s = probed.step_s * trial.factor * config.train.tokens_per_step / probed.step_tokens
    evaluation_s = (probed.evaluation_s_per_token or 0) * trial.factor
    hash_s = _hash_s_per_byte()
    seconds = Seconds(
        start_up=begun_s + (_data_bytes(dataset) or 0) * hash_s + probed.state_s + probed.extra_first_s,
        steps=work.steps * step_s,
        evaluations=work.evaluations * (work.evaluated_tokens or 0) * evaluation_s,
        checkpoints=work.checkpoints * HASHED_PER_SAVE.get(runtime.device.type, 0) * size * hash_s,
    )
    watts = probed.joules / probed.metered_s if probed.joules and on_cpu else None
    return Plan(
        config=config,
        work=work,
        device=device_name(runtime.device),
        team=sizes.ALONE,
        dtype=resolved.dtype,
        threads=resolved.threads,
        micro_batch=trial.micro_batch,
        peak_flops=resolved.peak_flops,
        step_s=step_s,
        seconds=seconds,
        memory=memory,
        checkpoint_bytes=size,
        data_bytes=_data_bytes(dataset),
        joules=watts * seconds.total if watts else None,
        assumed_mfu=None,
        left_out=left_out,
    )


def plan_for(config: Config, gpu: Gpu, devices: int = 1) -> Plan:
    """A plan for GPUs that are not here: closed forms, and a share of their rate that is assumed.

    What several of them say to one another takes no time in it.

    Raises:
        ConfigError: it does not fit into the GPU's memory, or the GPU has no bf16.
    """
    dtype = gpu.dtype if config.train.dtype == "auto" else config.train.dtype
    if dtype == "bf16" != gpu.dtype:
        raise ConfigError(f"{gpu.name} has no bf16; type: --train.dtype fp16")
    attention: AttentionKernel = "folded" if config.train.attention == "folded" else "sdpa"
    team = sizes.Team(devices)
    team = replace(team, strategy=strategy_within(config, team, gpu.memory_bytes)[0])
    training = Training(config, torch.device("cuda"), dtype, attention, team)
    micro_batch, _ = training.chosen(gpu.memory_bytes)
    dataset, left_out = _dataset(config)
    work = work_of(config, dataset)
    rate = gpu.rate(dtype)
    per_token = sizes.flops_per_token(config.model, config.data.context)
    tokens = training.rows * config.data.context
    # an update reads and writes weights, moments, sums and the copy
    moved = 30 * sizes.parameters(config.model).total // (devices if team.shares else 1)
    step_s = tokens * per_token / (ASSUMED_MFU * rate) + moved / gpu.bytes_per_s
    resolved = Resolved(
        dtype=dtype,
        attention=attention,
        fp32_matmul="highest",
        compile=config.train.compile != "off",
        micro_batch=micro_batch,
        threads=1,
        device="cuda",
        determinism="same-data",
        peak_flops=rate,
        ranks=devices,
        strategy=team.strategy,
        reasons={},
    )
    evaluated = work.evaluations * (work.evaluated_tokens or 0) * per_token / 3 / devices
    left_out += ["start-up", "checkpoints: they depend on the disk"]
    left_out += ["what the devices say to one another"] if devices > 1 else []
    return Plan(
        config=config,
        work=work,
        device=gpu.name,
        team=team,
        dtype=dtype,
        threads=None,
        micro_batch=micro_batch,
        peak_flops=rate,
        step_s=step_s,
        seconds=Seconds(0.0, work.steps * step_s, evaluated / (ASSUMED_MFU * rate), 0.0),
        memory=_memory(training, micro_batch, gpu.memory_bytes, 0),
        checkpoint_bytes=checkpoint_bytes(config, _tokenizer(dataset, left_out), resolved),
        data_bytes=_data_bytes(dataset),
        joules=None,
        assumed_mfu=ASSUMED_MFU,
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Trial:
    """A probe, and what it stands for."""

    probed: Probed
    micro_batch: int
    """Of the run."""
    factor: float
    """Seconds of a token of the run, in those of a token of the probe."""
    is_whole: bool
    """Whether as much went through the model at once as will in the run: then its memory is the run's."""


def _try(config: Config, resolved: Resolved, runtime: machine.Runtime, hear: Hear) -> _Trial:
    """Probes the run's own steps; where they would take too long, with fewer rows at once, or shorter ones.

    The seconds of shorter rows are scaled by their FLOPs: a little too low, for the attention of a long row is slower
    than its products.
    """
    context = config.data.context
    while _row_s(config, context, resolved) > LONGEST_S and context > SHORTEST_CONTEXT:
        context //= 2
    at_once = min(resolved.micro_batch, max(1, int(LONGEST_S / _row_s(config, context, resolved))))
    if context < config.data.context:
        hear(f"rows of {context} tokens instead of {config.data.context}, for a whole one would take too long")
    train = config.train.model_copy(update={"tokens_per_step": config.rows_per_step * context})
    data = config.data.model_copy(update={"context": context})
    short, fewer = config.model_copy(update={"data": data, "train": train}), {"micro_batch": at_once}
    probed = probe(short, resolved.model_copy(update=fewer), runtime, seconds=PROBE_S, steps=PROBE_STEPS, hear=hear)
    if probed.interrupted:
        raise KeyboardInterrupt
    whole, tried = (sizes.flops_per_token(config.model, length) for length in (config.data.context, context))
    halved = probed.micro_batch < at_once  # memory ran out: it will in the run
    micro_batch = probed.micro_batch if halved else resolved.micro_batch
    is_whole = context == config.data.context and probed.micro_batch == micro_batch
    return _Trial(probed, micro_batch, whole / tried, is_whole)


def _row_s(config: Config, context: int, resolved: Resolved) -> float:
    """About how long one row takes."""
    return context * sizes.flops_per_token(config.model, context) / (ASSUMED_MFU * resolved.peak_flops)


def _memory(training: Training, micro_batch: int, available: int, process: int) -> Memory:
    rows, by_part = training.rows, training.needs(micro_batch)
    shown = sorted({1, micro_batch, rows, *(evenly(rows, 1 << power) for power in range(0, rows.bit_length(), 2))})
    by_micro_batch = [(each, process + training.needs(each).total) for each in shown]
    return Memory(by_part, process, available, process + by_part.total, by_micro_batch)


def _dataset(config: Config) -> tuple[Dataset | None, list[str]]:
    """The prepared data where they are, and what is not known without them."""
    try:
        paths = [find_prepared(part) for part in config.data.parts]
        if all(paths):
            parts = [open_as_run(path, part) for path, part in zip(paths, config.data.parts, strict=True) if path]
            return mixed(parts, config.data) if config.data.sources else parts[0], ["samples"]
        why = "the data are not prepared yet"
    except PocketError as error:
        why = str(error)
    unknown = [] if config.train.eval_tokens else [f"evaluations: {why}"]
    return None, ["preparing the data", "samples", *unknown]


def _tokenizer(dataset: Dataset | None, left_out: list[str]) -> Tokenizer:
    """That of the data; without them one whose file is as good as nothing."""
    if dataset:
        return dataset.tokenizer
    left_out.append("the tokenizer's file in each checkpoint")
    return load_tokenizer("byte")


def _data_bytes(dataset: Dataset | None) -> int | None:
    return sum(int(entry["bytes"]) for entry in dataset.files.values()) if dataset else None


def _hash_s_per_byte() -> float:
    data = bytes(16 << 20)
    began_at = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - began_at) / len(data)
