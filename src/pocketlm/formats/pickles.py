"""What is an old pickle, known by its name and first bytes. Nothing here reads more of one.

Such a file is a program of its own: whoever unpickles it runs what stands in it. pocketlm does that for `import
--allow-pickle` alone, in a process of its own (unpickle.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from pocketlm.errors import FileError

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch.save begins: as a zip file, or before PyTorch 1.6 with a number that is its mark."""
SUFFIXES = (".pth", ".pt", ".ckpt", ".pkl", ".pickle")
WHOLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.bin")
INSTEAD = ("model.safetensors", "model.safetensors.index.json")


def is_pickled(path: Path) -> bool:
    """Whether a path is such a file, or a Hugging Face folder with no other weights."""
    if path.is_dir():
        there = {name for name in (WHOLE, INDEX, *INSTEAD) if (path / name).exists()}
        return bool(there) and not there & set(INSTEAD)
    return path.is_file() and (path.suffix in SUFFIXES or is_of_torch(path))


def is_of_torch(path: Path) -> bool:
    """Whether a file begins as those of torch.save do."""
    return _start(path).startswith((ZIP, LEGACY))


def refuse_others(path: Path) -> None:
    """
    Raises:
        FileError: no file, or none that torch.save has made.
    """
    if not path.is_file():
        raise FileError(
            f"{path} {'is no file' if path.exists() else 'does not exist'}; give a checkpoint of torch.save"
        )
    if not is_of_torch(path):
        raise FileError(f"{path} is no file of torch.save: it begins with {_start(path)[:8]!r}")


def ask(path: Path) -> str:
    """What to say where one was given and not allowed."""
    what = "has its weights in a pickle" if path.is_dir() else "is a pickle"
    return (
        f"{path} {what}, which can run code when it is read; if you know where it is from, make a safe folder of it: "
        f"pocketlm import {path} --allow-pickle --out DIR"
    )


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(LEGACY))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
