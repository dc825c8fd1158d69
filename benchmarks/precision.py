"""What the fast path costs in loss: validation after some steps, beside fp32 and fp32's own spread.

    python benchmarks/precision.py                          tiny, 300 steps, seeds 0, 1, 2: minutes
    python benchmarks/precision.py --steps 50 --seeds 0

Four runs for each seed, equal but for their arithmetic. The last two compute the model in fp32: how far they are from
each other is what rounding alone does to a loss, and what the first two must not exceed by much. Muon, which `tiny`
takes, makes its updates orthogonal in bf16 in all four; `--kind adamw` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from pocketlm.config import Config
from pocketlm.training.loop import train

PLAIN = {"train.dtype": "fp32", "train.attention": "sdpa", "train.fp32_matmul": "highest", "train.compile": "off"}
RUNS = {
    "bf16 copy, folded attention": PLAIN | {"train.dtype": "bf16", "train.attention": "folded"},
    "fp32, folded attention, medium": PLAIN | {"train.attention": "folded", "train.fp32_matmul": "medium"},
    "fp32": PLAIN,
    "fp32, another micro-batch": PLAIN | {"train.micro_batch": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--kind", choices=("muon", "adamw"), help="another optimizer than the preset's")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    kind = {"optim.kind": arguments.kind} if arguments.kind else {}
    losses = {
        name: [_loss(arguments.preset, arguments.steps, seed, run | kind) for seed in arguments.seeds]
        for name, run in RUNS.items()
    }
    base = losses["fp32"]
    print(f"\n{arguments.preset}, validation loss in nats after {arguments.steps} steps, seeds {arguments.seeds}\n")
    print("| | mean | minus fp32 | each minus fp32 |\n|-|-:|-:|-|")
    for name, values in losses.items():
        gaps = [mine - theirs for mine, theirs in zip(values, base, strict=True)]
        each = ", ".join(f"{gap:+.4f}" for gap in gaps)
        print(f"| {name} | {statistics.mean(values):.4f} | {statistics.mean(gaps):+.4f} | {each} |")


def _loss(preset: str, steps: int, seed: int, run: dict[str, object]) -> float:
    fields = {"train.total_steps": steps, "train.seed": seed, "train.eval_every": 0, "sample.prompts": []}
    with tempfile.TemporaryDirectory() as folder:
        train(Config.preset(preset, {"train.checkpoint_every": steps} | fields | run), out=Path(folder) / "run")
        lines = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (loss,) = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "eval"]
    print(f"seed {seed}: {loss:.4f}  {run}", flush=True)
    return float(loss)


if __name__ == "__main__":
    main()
