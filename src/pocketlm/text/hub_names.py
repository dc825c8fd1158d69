"""What a `hf:` source says, and which files of a data set it means. Nothing here asks the network.

CONFIG is a config of the data set's card, as FineWeb's `sample-10BT`; where a card has none, it is a folder. Without
CONFIG it is the default config, else all files of one kind that do not lie in a test or validation split.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pocketlm.errors import DataError
from pocketlm.text.documents import COMPRESSIONS

FORM = "hf:OWNER/NAME[/CONFIG][@REVISION]"
SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[^@]+))?(?:@(?P<revision>\S+))?")
KINDS = (".parquet", ".jsonl", ".json", ".txt")
HELD_OUT = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
NO_ROWS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}  # of a data set as a whole
MOST_NAMES = 20  # in a message


class Address(NamedTuple):
    """A SOURCE on the Hub."""

    spec: str
    repo: str
    config: str | None
    revision: str | None

    @classmethod
    def parse(cls, spec: str) -> Address:
        if (match := SPEC.fullmatch(spec)) is None:
            raise DataError(
                f"source {spec!r} is not of the form {FORM}; for example hf:HuggingFaceFW/fineweb/sample-10BT"
            )
        config = (match["config"] or "").strip("/")
        return cls(spec, match["repo"], config or None, match["revision"])

    @property
    def name(self) -> str:
        words = f"{self.repo.split('/')[1]}-{self.config or ''}".lower()
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:60]


Choice = list[str] | str
"""Patterns of the train split; or a folder, whose files say by their names what they are."""


def configs_of(entries: Any) -> dict[str, Choice]:
    """The `configs` of a card by name. "default" is also a name of the default one."""
    configs: dict[str, Choice] = {}
    named = [
        entry for entry in _listed(entries) if isinstance(entry, dict) and isinstance(entry.get("config_name"), str)
    ]
    for entry in named:
        configs[entry["config_name"]] = train_files(entry)
    first = [entry["config_name"] for entry in named if entry.get("default") is True or len(named) == 1]
    return ({"default": configs[first[0]]} | configs) if first else configs


def train_files(entry: Mapping[str, Any]) -> Choice:
    """A config's train split, in the forms that a card may give it. Patterns without splits are all train."""
    files, folder = entry.get("data_files"), str(entry.get("data_dir") or "").strip("/")
    if files is None:
        return folder
    if isinstance(files, dict):
        files = [{"split": split, "path": paths} for split, paths in files.items()]
    chosen: list[Any] = []
    for item in _listed(files):
        chosen += _listed(item if isinstance(item, str) else item.get("path") if _is_train(item) else [])
    patterns = (pattern.removeprefix("/") for pattern in chosen if isinstance(pattern, str))
    return [str(PurePosixPath(folder, pattern)) for pattern in patterns]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_train(item: Any) -> bool:
    return isinstance(item, dict) and item.get("split", "train") == "train"


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A glob over paths: `*` and `?` stay inside a folder, `**` does not, `[...]` is one of these characters."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", pattern)
    return re.compile(
        "".join(words.get(part) or (_class(part) if part[:1] == "[" else re.escape(part)) for part in parts)
    )


def _class(part: str) -> str:
    return part.replace("\\", "\\\\").replace("[!", "[^")


def fixed_folder(pattern: str) -> str:
    """The folder that holds all that a pattern can match."""
    plain = pattern[: next((at for at, char in enumerate(pattern) if char in "*?["), len(pattern))]
    return plain.rpartition("/")[0]


def kind(path: str) -> str:
    """The suffix of what a file holds; nothing for a hidden file and for what holds no rows or text."""
    parts = PurePosixPath(path)
    suffixes = [suffix.lower() for suffix in parts.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != ".parquet":
        suffixes.pop()
    hidden = any(part.startswith((".", "_")) for part in parts.parts) or parts.name in NO_ROWS
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS and not hidden else ""


def held_out(path: str) -> bool:
    """Whether a path's name says that it is not of the train split."""
    return bool(HELD_OUT & set(re.split(r"[^a-z]+", path.lower())))


def which_config(address: Address, names: Sequence[str]) -> DataError:
    """What to say where a source names none of the configs that there are."""
    near = difflib.get_close_matches(address.config or "", names, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    given = f"has no config {address.config!r}{hint}" if address.config else "has several configs"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    there = ", ".join(names[:MOST_NAMES]) + more
    return DataError(f"source {address.spec!r}: {address.repo} {given}; there are {there}")


def none_of(address: Address, patterns: Sequence[str]) -> DataError:
    """What to say where no file that can be read is one of these."""
    return DataError(
        f"source {address.spec!r}: none of its files is {', '.join(patterns) or 'in a train split'} "
        f"and ends in one of {', '.join(KINDS)}, then perhaps .gz or .zst; give another CONFIG ({FORM})"
    )
