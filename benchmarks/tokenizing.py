"""Tokenizing speed: MB/s of each library for GPT-2 and SmolLM2 on the given text, and whether the ids are equal.

    python benchmarks/tokenizing.py FILE... --smollm2 TOKENIZER [--gpt2 FOLDER] [--repeats 5] [--threads N]

FILE is what `files:` reads: .jsonl, .parquet, .txt and so on. Each figure is a process of its own that reads all
documents, then encodes them twice: the first pass is cold (nothing of this text has been seen), the second warm.
The processes of all libraries take turns, so that what else the machine does falls on each of them. A figure is the
median of the repeats with the range behind it, in MB (10^6 bytes of UTF-8) by the wall clock; `cpu` is by the CPU time
of the process, all its threads together, which the machine's other work touches less. Loading a library is not in it.

    reference    `Tokenizer.encode_batch`: tokenizers, in batches
    tokenizers   encode_batch_fast
    tiktoken     encode_to_numpy in as many threads; of SmolLM2's vocabulary it gets what `fast_encoders` makes
    gigatoken    encode_batch; of SmolLM2's vocabulary it gets what `fast_encoders` makes
    bulk         what `pocketlm data prepare` does: gigatoken with all checks, and their cost in it

The table goes to stdout as Markdown, what is being done to stderr.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("reference", "tokenizers", "tiktoken", "gigatoken", "bulk")
BATCH_CHARS = 1 << 21


def documents(files: list[str]) -> list[str]:
    from pocketlm.text.sources import open_source

    return [document.text for document in open_source(f"files:{','.join(files)}").documents()]


def encoder(library: str, tokenizer: Any, spec: str, threads: int) -> Callable[[list[str]], list[Any]]:
    """Texts to ids; one of the libraries as a user of it would write it, or as pocketlm does."""
    import numpy as np

    from pocketlm.text import bulk, fast_encoders

    if library == "reference":
        return tokenizer.encode_batch
    if library == "tokenizers":
        import tokenizers

        engine = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        engine.encode_special_tokens = True
        return lambda texts: [
            np.array(encoding.ids, dtype=np.uint32)
            for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)
        ]
    if library == "tiktoken":
        return tiktoken_encoder(tokenizer, spec, threads)
    if library == "gigatoken":
        return of_texts(fast_encoders.gigatoken_encoder(tokenizer))
    whole = bulk.BulkEncoder(tokenizer, bulk.SMALL_BYTES, lambda line: print(f"  {line}", file=sys.stderr))
    return whole.encode


def tiktoken_encoder(tokenizer: Any, spec: str, threads: int) -> Callable[[list[str]], list[Any]]:
    """tiktoken at its best: arrays, not lists, and no table behind it where the ids are its own."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    from pocketlm.text import fast_encoders

    if tokenizer.pre_tokenizer_name != "gpt-2":
        return of_texts(fast_encoders.tiktoken_encoder(tokenizer))
    if spec == "gpt2":
        engine = tiktoken.get_encoding("gpt2")
    else:
        ranks = data_gym_to_mergeable_bpe_ranks(f"{spec}/vocab.bpe", f"{spec}/encoder.json")
        pattern = fast_encoders.PATTERNS["gpt-2"]
        engine = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    encode = functools.partial(engine.encode_to_numpy, disallowed_special=())
    pool = ThreadPoolExecutor(threads)
    return lambda texts: list(pool.map(encode, texts))


def of_texts(encode: Callable[[Any], list[Any]]) -> Callable[[list[str]], list[Any]]:
    """What takes UTF-8, with the making of it."""
    from pocketlm.text.fast_encoders import Utf8

    return lambda texts: encode(Utf8.of(texts))


def batches(texts: list[str]) -> list[list[str]]:
    """As `data prepare` forms them."""
    result, held = [[]], 0
    for text in texts:
        if held >= BATCH_CHARS:
            result.append([])
            held = 0
        result[-1].append(text)
        held += len(text)
    return result


def measure(library: str, spec: str, threads: int, files: list[str]) -> None:
    """The work of one process; prints one line of JSON."""
    from pocketlm.text.tokenizer import load_tokenizer

    if hasattr(os, "sched_setaffinity"):  # every library asks for it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    texts = documents(files)
    encode = encoder(library, load_tokenizer(spec), spec, threads)
    size = sum(len(text.encode()) for text in texts) / 1e6
    result: dict[str, Any] = {"mb": size}
    for name in ("cold", "warm"):
        wall, cpu, digest, count = 0.0, 0.0, hashlib.sha256(), 0
        for batch in batches(texts):
            began, began_cpu = time.perf_counter(), time.process_time()
            ids = encode(batch)
            wall, cpu = wall + time.perf_counter() - began, cpu + time.process_time() - began_cpu
            for own in ids:
                digest.update(own.tobytes())
                count += len(own)
        result[name] = {"wall": size / wall, "cpu": size / cpu}
        result["ids"], result["tokens"] = digest.hexdigest()[:12], count
    print(json.dumps(result))


def run(library: str, spec: str, threads: int, files: list[str]) -> dict[str, Any] | None:
    """One process; None where the library is not installed."""
    command = [sys.executable, __file__, "--one", library, spec, "--threads", str(threads), *files]
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        if "No module named" in done.stderr:
            return None
        sys.exit(f"{library} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout))


def figure(runs: list[dict[str, Any]], name: str, clock: str) -> str:
    values = sorted(run[name][clock] for run in runs)
    return f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"


def times(runs: list[dict[str, Any]], others: list[dict[str, Any]], clock: str) -> str:
    """The ratio of the cold passes, turn by turn: its median and range."""
    ratios = sorted(mine["cold"][clock] / other["cold"][clock] for mine, other in zip(runs, others, strict=True))
    return f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})" if ratios else ""


def table(name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    first = next(iter(runs.values()))[0]
    print(f"\n{name}: {first['mb']:.1f} MB, {first['tokens']:,} tokens\n")
    print("| library | cold MB/s | warm MB/s | cold MB/s cpu | x tokenizers | x tiktoken | ids |")
    print("|-|-|-|-|-|-|-|")
    for library, own in runs.items():
        cells = [figure(own, "cold", "wall"), figure(own, "warm", "wall"), figure(own, "cold", "cpu")]
        cells += [times(own, runs[other], "wall") if other in runs else "" for other in ("tokenizers", "tiktoken")]
        print(f"| {library} | {' | '.join(cells)} | {', '.join(sorted({one['ids'] for one in own}))} |")
    equal = len({one["ids"] for own in runs.values() for one in own}) == 1
    print(f"\nids equal: {'yes' if equal else 'NO'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "TOKENIZER"), help=argparse.SUPPRESS)
    parser.add_argument("--gpt2", default="gpt2", help="GPT-2's tokenizer: gpt2, or the folder of its files")
    parser.add_argument("--smollm2", help="SmolLM2's tokenizer.json or its folder, or a Hub id")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="which, with commas between")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("files", nargs="+", metavar="FILE")
    options = parser.parse_args()
    if options.one:
        return measure(*options.one, options.threads, options.files)
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {options.threads} threads, {versions()}")
    names = ", ".join(Path(file).name for file in options.files)
    print(f"{names}; medians of {options.repeats}, with the range")
    for name, spec in (("GPT-2", options.gpt2), ("SmolLM2", options.smollm2)):
        runs: dict[str, list[dict[str, Any]]] = {}
        for turn in range(options.repeats if spec else 0):
            for library in options.libraries.split(","):
                print(f"{name} {turn + 1}/{options.repeats} {library}", file=sys.stderr)
                if found := run(library, spec, options.threads, options.files):
                    runs.setdefault(library, []).append(found)
        if runs:
            table(name, runs)


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> str:
    found = []
    for name in ("tokenizers", "tiktoken", "gigatoken"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"without {name}")
    return ", ".join([f"Python {platform.python_version()}", *found])


if __name__ == "__main__":
    main()
