"""What a GPU must show beside its speed, each as a function of the device that gives a table and plain numbers.

    ceilings        the rate of bf16 products and the bandwidth of copies: what all else is a share of
    waiting         whether anything in a step makes the host wait for the GPU
    memory          the closed form of `pocketlm plan` beside what PyTorch's allocator counts
    out_of_memory   a limit in the middle of a run: rows at once are halved, the step is done again, the curve stays
    kernels         where the time of a step of SmolLM2-135M goes

They run in one process, for each process takes seconds to come up on a GPU.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpu_contestants import ours_of
from gpu_device import Device
from pocketlm import machine
from pocketlm.config import Config
from pocketlm.journal import Journal
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from pocketlm.training.micro_batch import Training
from pocketlm.training.probe import RandomRows
from pocketlm.training.resolve import resolve
from pocketlm.training.run import compile_if_wanted, new_state
from pocketlm.training.state import TrainState
from pocketlm.training.step import train_step
from report import markdown
from worker import Task

MEMORY_WITHIN = 0.05
CURVE_WITHIN = 1e-3  # nats
KERNELS = 25
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """Of one check."""

    name: str
    lines: list[str]
    tree: Any
    files: Mapping[str, str]
    """Texts of their own, by file name."""


def run_checks(names: Sequence[str], device: Device, folder: Path, pipe: Connection) -> None:
    """Sends the Result of each; one that fails is told, and the next is tried. In a process of its own."""
    for name in names:
        try:
            result = CHECKS[name](device, folder)
        except Exception as error:
            traceback.print_exc()
            result = Result(name, [f"FAILED: {type(error).__name__}: {error}", ""], {"failed": repr(error)}, {})
        pipe.send(result)
        device.forget()


# --- ceilings


def ceilings(device: Device, folder: Path) -> Result:
    """On random numbers: products of zeros run faster."""
    shapes = [(8192, 8192, 8192), (16384, 576, 1536), (16384, 576, 49152)] if device.is_gpu else [(64, 64, 64)]
    rates = {shape: _product_rate(device, *shape) for shape in shapes}
    size = 2**32 if device.is_gpu else 2**20
    source, target = (torch.empty(size, dtype=torch.uint8, device=device.torch).random_() for _ in range(2))
    copies = 2 * size / _seconds(device, lambda: target.copy_(source))
    sheet = device.sheet_flops()
    rows = [["", "measured", "of the data sheet"]]
    for shape, rate in rates.items():
        name = f"bf16 product {' x '.join(map(str, shape))}"
        rows.append([name, f"{rate / 1e12:,.1f} TFLOP/s", f"{rate / sheet:.0%}" if sheet else "not in the table"])
    rows.append(["copy, bytes read and written", f"{copies / 1e9:,.0f} GB/s", ""])
    named = {"x".join(map(str, shape)): rate for shape, rate in rates.items()}
    return Result("ceilings", markdown(rows), {"products": named, "copy": copies, "sheet_flops": sheet}, {})


def _product_rate(device: Device, m: int, k: int, n: int) -> float:
    left = torch.randn(m, k, device=device.torch).bfloat16()
    right = torch.randn(k, n, device=device.torch).bfloat16()
    return 2 * m * k * n / _seconds(device, lambda: left @ right)


def _seconds(device: Device, work: Callable[[], object], repeats: int = 10, groups: int = 5) -> float:
    """Of one call: the median of some groups of calls, after one to warm up."""
    times = list[float]()
    for _ in range(groups + 1):
        device.synchronize()
        began_at = time.perf_counter()
        for _ in range(repeats):
            work()
        device.synchronize()
        times.append((time.perf_counter() - began_at) / repeats)
    return statistics.median(times[1:])


# --- waiting


WAITING: Mapping[str, Fields] = {
    "bf16, AdamW": {},
    "two micro-batches": {"train.micro_batch": 4},
    "fp32": {"train.dtype": "fp32"},
    "fp16 with its scale": {"train.dtype": "fp16"},
    "Muon": {"optim.kind": "muon"},
    "document masks": {"data.document_masks": True},
    "learned positions": {"model.position": "learned"},
    "gradient checkpointing": {"train.gradient_checkpointing": True},
    "bitwise": {"train.determinism": "bitwise"},
    "compiled": {"train.compile": "on"},
}
"""Steps of a small model, each of which takes another way through the code."""
REHEARSED = ("two micro-batches", "Muon", "document masks")


def waiting(device: Device, folder: Path) -> Result:
    """A step after two others, from reading its rows to telling its figures."""
    fields = {"train.micro_batch": 8, "train.dtype": "bf16", "train.device": device.kind}
    cases = WAITING if device.is_gpu else {name: WAITING[name] for name in REHEARSED}
    found = {name: _waits_at(device, Config.preset("debug", fields | each)) for name, each in cases.items()}
    rows = [["a step with", "the host waits"], *([name, at or "nowhere"] for name, at in found.items())]
    return Result("waiting", markdown(rows), found, {})


def _waits_at(device: Device, config: Config) -> str:
    """The line of pocketlm that waits for the GPU; empty if none does."""
    try:
        state, micro_batch = begun(config)
        rows = RandomRows(config)
        for _ in range(2):
            train_step(state, rows, config, micro_batch)
        device.synchronize()
        with device.never_waiting():
            train_step(state, rows, config, micro_batch)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "pocketlm" in frame.filename]
        last = frames[-1]
        return f"{Path(last.filename).name}:{last.lineno} `{last.line}`: {str(error).splitlines()[0]}"
    return ""


def begun(config: Config) -> tuple[TrainState, int]:
    """A state before its first step, with what `pocketlm train` resolves and compiles, and its rows at once."""
    runtime = machine.start(config.train)
    resolved = resolve(config, runtime)
    state = new_state(config, resolved, runtime)
    compile_if_wanted(state, config, resolved, lambda text: None)
    return state, resolved.micro_batch


# --- memory


def memory(device: Device, folder: Path) -> Result:
    """Peaks of steps of two micro-batches, and of one that is the preset's whole step."""
    heads = ["preset", "rows at once", "rows a step", "", "state: said, MiB", "counted", "peak: said, MiB", "counted"]
    rows, tree = [[*heads, "said / counted", f"within {MEMORY_WITHIN:.0%}"]], []
    for preset, at_once, a_step, fields in memory_cases(device):
        context = Config.preset(preset).data.context
        changes = {"train.micro_batch": at_once, "train.tokens_per_step": a_step * context, "train.dtype": "bf16"}
        config = Config.preset(preset, changes | {"train.device": device.kind, "train.compile": "off"} | fields)
        device.forget()
        try:
            got = _counted(device, config)
        except Exception as error:  # the other cases are still worth knowing
            rows.append([preset, str(at_once), str(a_step), f"{type(error).__name__}: {error}", *["-"] * 5, "NO"])
            continue
        ratio = got["said_peak"] / got["peak"]
        what = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in fields.items())
        numbers = [f"{got[name] / 2**20:,.0f}" for name in ("said_state", "state", "said_peak", "peak")]
        word = "yes" if abs(ratio - 1) <= MEMORY_WITHIN else "NO"
        rows.append([preset, str(at_once), str(a_step), what, *numbers, f"{ratio:.3f}", word])
        tree.append({"preset": preset, "rows_at_once": at_once, "rows": a_step, "fields": dict(fields), **got})
    return Result("memory", markdown(rows), tree, {})


def memory_cases(device: Device) -> list[tuple[str, int, int, Fields]]:
    """(preset, rows at once, rows of a step, other fields)."""
    if not device.is_gpu:
        return [("debug", 8, 16, {}), ("debug", 8, 8, {"train.gradient_checkpointing": True})]
    return [
        ("smollm2-135m", 16, 16, {}),
        ("smollm2-135m", 8, 16, {}),
        ("smollm2-135m", 2, 4, {}),
        ("smollm2-135m", 16, 16, {"train.gradient_checkpointing": True}),
        ("smollm2-135m", 2, 4, {"train.dtype": "fp32"}),
        ("smallm", 248, 248, {}),
        ("smallm", 62, 248, {}),
        ("tiny", 32, 32, {}),
        ("smollm2-360m", 8, 16, {}),
    ]


def _counted(device: Device, config: Config) -> dict[str, int]:
    """Bytes that are said and counted: of what is there between steps, and at the most."""
    state, micro_batch = begun(config)
    dtype, kernel = config.train.dtype, "sdpa"
    assert dtype != "auto"
    said = Training(config, torch.device("cuda"), dtype, kernel).needs(micro_batch)
    between = device.allocated()
    for _ in range(2):
        outcome = train_step(state, RandomRows(config), config, micro_batch)
    outcome.told.hear()
    held = said.weights + said.moments + said.compute_copy // 2  # between steps there is no gradient
    return {"said_state": held, "state": between, "said_peak": said.total, "peak": device.peak()} | {
        f"said_{name}": size for name, size in vars(said).items()
    }


# --- out of memory


SMALL = {"train.total_steps": 100, "train.eval_every": 0, "train.checkpoint_every": 50, "sample.prompts": []}
LARGER = {
    "model.hidden_size": 512,
    "model.intermediate_size": 2048,
    "model.num_hidden_layers": 6,
    "model.num_attention_heads": 8,
    "model.num_key_value_heads": 4,
    "model.head_dim": 64,
    "model.max_position_embeddings": 256,
    "data.context": 256,
    "train.tokens_per_step": 64 * 256,
    "optim.lr": 3e-4,
}
"""`debug` as large as that an allocator's blocks are nothing beside its activations."""
SQUEEZED_AT = 30


class Squeeze(Silent):
    """Limits the memory of the process in the middle of a run."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, size

    def record(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == SQUEEZED_AT:
            self.device.limit(self.size)


def out_of_memory(device: Device, folder: Path) -> Result:
    """Three runs: undisturbed; with half the rows at once, for its peak; and one that is limited to between both."""
    base = (
        SMALL | (LARGER if device.is_gpu else {}) | {"data.dir": str(folder / "data-oom"), "train.device": device.kind}
    )
    rows = Config.preset("debug", base).rows_per_step

    def run(name: str, at_once: int, steps: int, listener: Silent | None = None) -> tuple[Path, int]:
        device.forget()
        config = Config.preset("debug", base | {"train.micro_batch": at_once, "train.stop_at_step": steps})
        path = train(config, out=folder / name, listener=listener)
        return path, device.peak_reserved()

    undisturbed, most = run("undisturbed", rows, 100)
    _, half = run("half", rows // 2, 3)
    try:
        squeezed, _ = run("squeezed", rows, 100, Squeeze(device, (most + half) // 2))
    finally:
        device.limit(None)
    ours, theirs = losses(squeezed), losses(undisturbed)
    furthest = max(abs(mine - yours) for mine, yours in zip(ours, theirs, strict=True))
    halvings = [each for each in Journal.read(squeezed / "metrics.jsonl") if each["kind"] == "micro_batch"]
    reached = len(halvings) == 1 and len(ours) == 100 and furthest <= CURVE_WITHIN
    told = "; ".join(f"{each['before']} -> {each['micro_batch']} rows after step {each['step']}" for each in halvings)
    limit, most, half = (f"{size / 2**20:,.0f}" for size in ((most + half) / 2, most, half))
    lines = [
        f"Limited to {limit} MiB after step {SQUEEZED_AT} (the allocator took {most}, with half the rows {half}): "
        f"{told or 'NOTHING WAS HALVED'}. Largest difference of the loss over {len(ours)} steps: {furthest:.1e} nats, "
        f"at most {CURVE_WITHIN:.0e}: {'reached' if reached else 'MISSED'}.",
        "",
    ]
    return Result("out_of_memory", lines, {"halvings": halvings, "furthest": furthest, "reached": reached}, {})


def losses(run: Path) -> list[float]:
    """Of each step, by a run's journal."""
    return [record["loss"] for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "train"]


# --- kernels


def kernels(device: Device, folder: Path) -> Result:
    """One step of the preset's own size, eager and compiled."""
    preset = "smollm2-135m" if device.is_gpu else "debug"
    plain = Config.preset(preset)
    task = Task(preset, plain.rows_per_step, plain.data.context, 1, folder, folder)
    lines, tree, files = list[str](), dict[str, Any](), dict[str, str]()
    for flag in ("eager", "compile") if device.is_gpu else ("eager",):
        found, step_s = _profile(device, ours_of(task, {flag}, device))
        busy = sum(microseconds for _, _, microseconds in found) / 1e6
        rows = [["kernel", "calls", "us", "share of the kernels"]]
        rows += [
            [_short(name), str(calls), f"{us:,.0f}", f"{us / 1e6 / busy:.1%}"] for name, calls, us in found[:KERNELS]
        ]
        said = f"{preset}, {flag}: a step takes {step_s * 1e3:.1f} ms, its kernels {busy * 1e3:.1f} ms"
        files[f"kernels-{flag}.md"] = "\n".join([f"# {said}", "", *markdown(rows)])
        lines += [f"{said}; the longest of {len(found)}, all in kernels-{flag}.md:", "", *markdown(rows[:9])]
        tree[flag] = {"step_s": step_s, "busy_s": busy, "kernels": found[: 2 * KERNELS]}
        device.forget()
    return Result("kernels", lines, tree, files)


def _profile(device: Device, config: Config) -> tuple[Sequence[tuple[str, int, float]], float]:
    """The kernels of a step, and the seconds of one that is not looked at."""
    state, micro_batch = begun(config)
    rows = RandomRows(config)

    def step() -> None:
        train_step(state, rows, config, micro_batch)

    for _ in range(3):
        step()
    step_s = _seconds(device, step, repeats=5)
    return device.profiled(step), step_s


def _short(name: str) -> str:
    """A kernel's name without what it is a template of."""
    return name.replace("|", "/")[:110]


CHECKS: Mapping[str, Callable[[Device, Path], Result]] = {
    "ceilings": ceilings,
    "waiting": waiting,
    "memory": memory,
    "out_of_memory": out_of_memory,
    "kernels": kernels,
}
