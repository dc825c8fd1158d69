"""A model as a Hugging Face folder with a manifest: what `import` makes of any model, and `export hf` of our own.

`pocketlm verify` checks it byte for byte, and every verb takes it for a MODEL.
"""

from __future__ import annotations

import os
from pathlib import Path

from pocketlm.checkpoint import WEIGHTS
from pocketlm.errors import UsageError
from pocketlm.files import commit_folder
from pocketlm.formats.release import Release, folder_texts
from pocketlm.tensors import serialize


def write_folder(out: Path, release: Release) -> None:
    """Writes a model folder, whole or not at all.

    Raises:
        UsageError: something stands there.
        OSError: the disk refused.
    """
    refuse_what_stands(out)
    with commit_folder(out) as commit:
        for name, data in folder_texts(release).items():
            commit.write(name, data)
        commit.write(WEIGHTS, serialize(release.weights))


def refuse_what_stands(out: Path) -> None:
    """
    Raises:
        UsageError: something stands at a path where a folder is to be made; an empty folder is nothing.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {out} exists already; give another one, or remove it first")
