"""`pocketlm bench`: how fast this machine trains, in tokens/s and MFU, with a line to paste."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketlm.cli.arguments import Parser, print_json, print_table, say
from pocketlm.cli.fields import parse_overrides
from pocketlm.config import Config
from pocketlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from pocketlm.training.probe import Probed
    from pocketlm.training.resolve import Resolved

DEFAULT: dict[str, dict[str, Any]] = {
    "tiny": {},
    "smallm": {"train.tokens_per_step": 31 * 256},
    "smollm2-135m": {"data.context": 512, "train.tokens_per_step": 2 * 512, "train.dtype": "auto"},
}
"""What is measured when nothing is named, the smallest first: memory that was taken once counts for those after it."""
SECONDS = 30.0
INTERRUPTED = 130


def run(argv: list[str]) -> int:
    parser = Parser(
        "bench",
        "How fast this machine trains a preset: tokens/s, MFU and memory, over real steps on random tokens.\n\n"
        f"Without a preset: {', '.join(DEFAULT)}.",
        usage="pocketlm bench [PRESET|FILE.toml] [--steps N] [--section.field VALUE ...] [--json]",
    )
    parser.add_argument("preset", nargs="?", metavar="PRESET|FILE.toml", help="what is trained")
    parser.add_argument(
        "--steps", default="10", metavar="N", help="steps to measure, warm-up not counted (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, or without a preset a list of them")
    arguments, fields = parser.parse_with_fields(argv)
    if not arguments.steps.isdecimal() or int(arguments.steps) < 1:
        raise UsageError(f"--steps: given {arguments.steps!r}, allowed is a number from 1 on")
    configs = _configs(arguments.preset, parse_overrides(fields))

    results: list[dict[str, Any]] = []
    interrupted = False
    for config in configs:
        try:
            results.append(measured(config, int(arguments.steps)))
        except KeyboardInterrupt:
            interrupted = True
        except ConfigError as error:
            if arguments.preset:
                raise
            say(str(error))  # the others may fit
            continue
        if interrupted := interrupted or results[-1]["interrupted"]:
            break
    if not results and not interrupted:
        raise ConfigError(f"none of {', '.join(DEFAULT)} fits; type: pocketlm bench debug")
    if arguments.json and (results or not interrupted):
        print_json(results[0] if arguments.preset and results else results)
    elif results:
        _print(results)
    return INTERRUPTED if interrupted else 0


def _configs(preset: str | None, overrides: dict[str, Any]) -> list[Config]:
    from pocketlm.cli.train import load_config

    if preset:
        return [load_config(preset, overrides)]
    return [Config.preset(name, fields | overrides) for name, fields in DEFAULT.items()]


def measured(config: Config, steps: int) -> dict[str, Any]:
    """One result: what `--json` prints of a preset."""
    from pocketlm import machine
    from pocketlm.training import slowness
    from pocketlm.training.probe import device_name, probe
    from pocketlm.training.resolve import resolve

    runtime = machine.start(config.train)
    resolved = resolve(config, runtime)
    slowness.warn(say, config, resolved, runtime)
    rows = f"{resolved.micro_batch} row(s) of {config.data.context} at once"
    say(f"{config.name}: {resolved.dtype}, {runtime.threads} thread(s), {rows}, {steps} steps")
    probed = probe(config, resolved, runtime, seconds=SECONDS, steps=steps)
    return _result(config, resolved, probed) | {"device": device_name(runtime.device), "threads": runtime.threads}


def _result(config: Config, resolved: Resolved, probed: Probed) -> dict[str, Any]:
    import torch

    from pocketlm import __version__
    from pocketlm.model import sizes
    from pocketlm.training.gpus import gpu_by_name
    from pocketlm.training.probe import device_name

    rates = sorted(probed.rates)
    rate = probed.step_tokens / probed.step_s
    per_token = sizes.flops_per_token(config.model, config.data.context)
    sheet = gpu_by_name(device_name(torch.device("cuda"))) if resolved.device == "cuda" else None
    peak = sheet.rate(resolved.dtype) if sheet else resolved.peak_flops
    return {
        "preset": config.name,
        "tokens_per_s": rate,
        "tokens_per_s_lowest": rates[0],
        "tokens_per_s_highest": rates[-1],
        "mfu": rate * per_token / peak,
        "peak_memory_bytes": probed.peak_bytes,
        "peak_flops": peak,
        "steps": len(rates),
        "step_tokens": probed.step_tokens,
        "tried_tokens": min(probed.long * probed.micro_batch * config.data.context, probed.step_tokens),
        "context": config.data.context,
        "micro_batch": probed.micro_batch,
        "dtype": resolved.dtype,
        "first_step_s": probed.first_s,
        "parameters": sizes.parameters(config.model).total,
        "interrupted": probed.interrupted,
        "torch": torch.__version__,
        "pocketlm": __version__,
    }


def _print(results: list[dict[str, Any]]) -> None:
    heads = ("", "tokens/s", "lowest", "highest", "MFU", "memory", "first step")
    print_table([heads, *map(_row, results)])
    first = results[0]
    rates = ", ".join(f"{r['preset']} {r['tokens_per_s']:,.0f} tok/s ({100 * r['mfu']:.0f} % MFU)" for r in results)
    dtypes = "/".join(sorted({r["dtype"] for r in results}))
    where = f"{first['device']}, {first['threads']} thread(s), torch {first['torch']}, {dtypes}"
    print(f"\npocketlm {first['pocketlm']} on {where}: {rates}")


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    rows, tried = (result[name] // result["context"] for name in ("step_tokens", "tried_tokens"))
    return (
        f"{result['preset']} {rows} x {result['context']}" + (f", tried with {tried}" if tried < rows else ""),
        f"{result['tokens_per_s']:,.0f}",
        f"{result['tokens_per_s_lowest']:,.0f}",
        f"{result['tokens_per_s_highest']:,.0f}",
        f"{100 * result['mfu']:.0f} %",
        f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        f"{result['first_step_s']:.2f} s",
    )
