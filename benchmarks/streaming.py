"""Training on text that streams over a slow line: how soon the first step is, and whether training waits after it.

    python benchmarks/streaming.py TEXTS [--gpt2 FOLDER] [--mbit 20] [--steps 36] [--cases first segments killed memory]

TEXTS is a folder of .jsonl.gz files with web text (fineweb-sample, openwebtext-sample, c4-sample). They are served as
Parquet by tests/stand_in.py, at so many Mbit/s: `000_00000` in groups of 1,000 rows, `000_00001` with 210 MB of text in
one row group, the same texts again and again behind a number. The real client reads them in

    first      `pocketlm train smallm` with its own sizes of pieces; seconds from the command to the first step
    segments   smallm with small pieces: at least three segments pass; seconds waited for data, and the most that was on
               the disk
    killed     the same again, killed while it trains, then while it fetches, then its feeder while it writes tokens:
               whether the weights at the end are those of `segments`, byte for byte
    memory     `pocketlm data prepare` of the second file, without a limit of the rate; the largest resident size
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from stand_in import StandIn

NAME, CONFIG = "HuggingFaceFW/fineweb", "sample-10BT"
FILES = ("fineweb-sample", "openwebtext-sample", "c4-sample")
LARGE_BYTES = 210_000_000
SMALL_SEGMENTS = {
    "data.piece_documents": 50,
    "data.segment_pieces": 1,
    "data.val_tokens": 2000,
    "data.val_fraction": 0.05,
}


def texts(folder: Path) -> Iterator[str]:
    for name in FILES:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def parquet(rows: list[str], group: int, compression: str) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": rows, "url": [f"https://example.com/{number}" for number in range(len(rows))]})
    pq.write_table(table, sink, row_group_size=group, compression=compression)
    return sink.getvalue()


def repository(folder: Path) -> dict[str, bytes]:
    rows = list(texts(folder))
    many, size = list[str](), 0
    while size < LARGE_BYTES:
        number = len(many)
        many.append(f"{number}: {rows[number % len(rows)]}")
        size += len(many[-1].encode())
    large = parquet(many, len(many), "none")
    assert pq.ParquetFile(io.BytesIO(large)).num_row_groups == 1
    return {"sample/10BT/000_00000.parquet": parquet(rows, 1000, "zstd"), "sample/10BT/000_00001.parquet": large}


def served(hub: StandIn) -> dict[str, str]:
    names = {"HF_ENDPOINT": hub.url, "no_proxy": "127.0.0.1,localhost", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | names


def words_of(work: Path, name: str, options: argparse.Namespace, steps: int, fields: dict[str, object]) -> list[str]:
    flags = {"data.tokenizer": options.gpt2, "data.dir": work / f"{name}-data", "train.tokens_per_step": 7936, **fields}
    words = ["train", "smallm", "--out", str(work / name), "--total-steps", str(steps)]
    return words + [word for field, value in flags.items() for word in (f"--{field}", str(value))]


def started(hub: StandIn, words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pocketlm.cli.main", *words]
    return subprocess.Popen(command, env=served(hub), stderr=subprocess.PIPE, text=True)


def trained(hub: StandIn, words: list[str]) -> list[str]:
    """A run; prints what it took and returns what it said."""
    began_at, first_s, most_bytes, most_rss = time.monotonic(), None, 0, 0
    said, data = list[str](), Path(words[words.index("--data.dir") + 1])
    with started(hub, words) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip())
            if first_s is None and line.startswith("step "):
                first_s = time.monotonic() - began_at
            most_bytes = max(most_bytes, sum(path.stat().st_size for path in data.glob("train-*.tokens")))
            for child in psutil.Process(process.pid).children():
                most_rss = max(most_rss, child.memory_info().rss)
    assert process.returncode == 0, "\n".join(said)
    assert first_s is not None
    sent = sum(size for path, size in hub.sent.items() if path)
    print(
        f"  first step after {first_s:.1f} s; the whole {time.monotonic() - began_at:.1f} s; {sent / 1e6:.1f} MB sent"
    )
    print(f"  most tokens on the disk {most_bytes / 1e6:.2f} MB; feeder's memory {most_rss / 2**20:.0f} MiB")
    return said


def first(hub: StandIn, work: Path, options: argparse.Namespace) -> None:
    fields: dict[str, object] = {"train.checkpoint_every": 1000, "train.eval_tokens": 8192}
    said = trained(hub, words_of(work, "first", options, 2, fields))
    print("\n".join(f"  {line}" for line in said if line.startswith(("the first", "tokenized", "training waited"))))


def segmented(work: Path, name: str, options: argparse.Namespace) -> list[str]:
    return words_of(work, name, options, options.steps, SMALL_SEGMENTS | {"train.eval_every": 0, "sample.every": 0})


def segments(hub: StandIn, work: Path, options: argparse.Namespace) -> None:
    said = trained(hub, segmented(work, "segments", options))
    entered = [line for line in said if re.match(r"saved .*step-0*[1-9]", line)]
    print(f"  {len(entered)} checkpoints after the first; {next(line for line in said if 'training waited' in line)}")


def weights(run: Path) -> str:
    return hashlib.sha256(max(run.glob("checkpoints/step-*")).joinpath("model.safetensors").read_bytes()).hexdigest()


def killed(hub: StandIn, work: Path, options: argparse.Namespace) -> None:
    """One run, taken up after each kill. What a feeder has in memory dies with it, so each new one fetches."""
    words = segmented(work, "killed", options)
    run, data = work / "killed", work / "killed-data"
    with started(hub, words) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("saved") and "step-00000000" not in line:
                process.kill()
    print(f"  killed while it trains, behind {newest(run)}", flush=True)
    with started(hub, words) as process:
        hub.fault = lambda request: process.kill() if request.range and list(data.glob("piece-*")) else None
        process.communicate()
    hub.fault = lambda request: None
    print(f"  killed while it fetches, behind {newest(run)}", flush=True)
    with started(hub, words) as process:
        while process.poll() is None and not kill_at_half_a_piece(process, data):
            pass
        _, said = process.communicate()
    assert process.returncode == 0, said
    print(f"  the feeder killed while it writes: {said.count('it is begun anew')} time(s) begun anew")
    print(f"  {'the same' if weights(run) == weights(work / 'segments') else 'OTHER'} weights at {newest(run)}")


def newest(run: Path) -> str:
    return max(path.name for path in run.glob("checkpoints/step-*"))


def kill_at_half_a_piece(process: subprocess.Popen[str], data: Path) -> bool:
    """Kills the feeder if it is writing tokens."""
    if not any(data.glob("train-*.tokens.tmp-*")):
        return False
    for child in psutil.Process(process.pid).children():
        child.kill()
    return True


def memory(hub: StandIn, work: Path, options: argparse.Namespace) -> None:
    hub.rate = None
    hub.add(
        "someone/one-group",
        {"large.parquet": hub.repositories[NAME].commits[hub.repositories[NAME].main]["sample/10BT/000_00001.parquet"]},
    )
    words = [
        "data",
        "prepare",
        "--source",
        "hf:someone/one-group",
        "--tokenizer",
        options.gpt2,
        "--out",
        str(work / "set"),
    ]
    began_at, largest = time.monotonic(), 0
    with subprocess.Popen(
        [sys.executable, "-m", "pocketlm.cli.main", *words],
        env=served(hub),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            largest = max(largest, watched.memory_info().rss)
            time.sleep(0.05)
    assert process.returncode == 0
    print(f"  {time.monotonic() - began_at:.1f} s; largest resident size {largest / 2**20:.0f} MiB")


CASES = {"first": first, "segments": segments, "killed": killed, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--gpt2", default="gpt2", help="GPT-2's tokenizer: gpt2, or the folder of its files")
    parser.add_argument("--mbit", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    train = [{"split": "train", "path": "sample/10BT/*"}]
    with StandIn() as hub, tempfile.TemporaryDirectory() as folder:
        hub.add(NAME, repository(options.texts), {"configs": [{"config_name": CONFIG, "data_files": train}]})
        for case in options.cases:
            hub.rate = options.mbit * 1e6 / 8
            hub.forget()
            print(f"{case}:", flush=True)
            CASES[case](hub, Path(folder), options)


if __name__ == "__main__":
    main()
