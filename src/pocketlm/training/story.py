"""What the folder of a run holds, read as one value: for its report, and for a comparison. Torch is not loaded."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.config import Config
from pocketlm.errors import FileError
from pocketlm.journal import Journal
from pocketlm.reading import read_text
from pocketlm.training.log import Record


@dataclass(frozen=True)
class Story:
    """What the folder of a run holds."""

    folder: Path
    config: Config
    resolved: Mapping[str, Any]
    """The table [resolved] of resolved.toml; empty before the first step."""
    versions: Mapping[str, str]
    records: Mapping[str, list[Record]]
    """By kind, in the order of their steps."""

    @property
    def step(self) -> int:
        return int(self.records["train"][-1]["step"]) if self.records["train"] else 0


def read_story(folder: Path) -> Story:
    """The files of a run.

    Raises:
        FileError: there is no config.toml, or a file that is damaged.
    """
    if not (folder / "config.toml").is_file():
        raise FileError(f"{folder} is no run: it has no config.toml; give a folder that pocketlm train made")
    ran = folder / "resolved.toml"
    resolved = tomllib.loads(read_text(ran)) if ran.is_file() else {}
    records: dict[str, list[Record]] = {"train": [], "eval": [], "sample": []}
    for record in Journal.read(folder / "metrics.jsonl"):
        records.setdefault(record["kind"], []).append(record)
    config = Config.from_toml(folder / "config.toml")
    return Story(folder, config, resolved.get("resolved", {}), resolved.get("versions", {}), records)
