"""Text on the Hugging Face Hub: `hf:OWNER/NAME[/CONFIG][@REVISION]`, read by byte ranges.

    1. pin      the revision is resolved to a commit, once; whatever is asked for after that names the commit
    2. choose   the data set's card says which files of the train split CONFIG has, the commit's tree which there are
    3. read     of a Parquet file its footer and the chunks of the text column, of other files everything, in sequence;
                one request brings at most BLOCK_BYTES, so no file is ever whole on the disk or in memory

Nothing is asked for before the documents or the fingerprint are. What an earlier preparation recorded takes the place
of step 1, and step 2 must then lead to the same files. How a request is made, and repeated, is in hub_requests.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pocketlm.errors import DataError
from pocketlm.text.documents import BEGINNING, Document, Place, read_files
from pocketlm.text.hub_names import (
    KINDS,
    Address,
    Choice,
    fixed_folder,
    held_out,
    kind,
    none_of,
    pattern_regex,
    which_config,
)
from pocketlm.text.hub_requests import Hub, HubFile, Patience, Say

PATIENCE = Patience()


@dataclass
class HubSource:
    """A data set at one commit."""

    address: Address
    hub: Hub
    record: Mapping[str, Any]
    """What an earlier preparation recorded of it; empty for the first."""
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        return self.address.spec

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def remote(self) -> HubSource:
        return self

    @property
    def pin(self) -> Mapping[str, str]:
        if "revision" in self.record:
            return {"revision": self.record["revision"]}
        return {"revision": str(self.hub.revision)} if self.files else {}

    def fingerprint(self) -> str:
        return str(self.record["fingerprint"]) if self.record else _fingerprint(self.hub, self.files)

    def documents(self, start: Place = BEGINNING) -> Iterator[Document]:
        return read_files(self.files, start)

    def status(self) -> str:
        if "files" not in vars(self):
            return "nothing fetched"
        return f"{self.hub.fetched_bytes / 1e6:,.1f} MB fetched; {len(self.files)} files have {_megabytes(self.files)}"

    def outlook(self, documents: int) -> tuple[int, bool]:
        about = documents * _size(self.files) // max(1, self.hub.fetched_bytes)
        return about, any(kind(file.path) == ".parquet" for file in self.files)  # its other columns are not fetched

    @cached_property
    def files(self) -> tuple[HubFile, ...]:
        """Those of the train split, in the order of the patterns and by name inside each.

        Raises:
            DataError: there are none, or others than were recorded.
        """
        self.hub.revision = self.record.get("revision", self.address.revision)
        self.hub.revision, configs = self.hub.info()
        files = self._chosen(configs)
        if self.record and _fingerprint(self.hub, files) != self.record["fingerprint"]:
            raise DataError(
                f"source {self.spec!r}: commit {self.hub.revision} has other files than when this data set was begun; "
                "delete its folder, or give another one"
            )
        self.hub.say(f"{self.spec} at commit {self.hub.revision:.12}: {len(files)} files, {_megabytes(files)}")
        return files

    def _chosen(self, configs: dict[str, Choice]) -> tuple[HubFile, ...]:
        config = self.address.config
        if configs and (config or "default") not in configs:
            raise which_config(self.address, sorted(configs))
        choice = configs[config or "default"] if configs else config or ""
        if not isinstance(choice, str):
            return self._matching(choice)
        tree = [file for file in self.hub.tree(choice) if not held_out(file.path.removeprefix(choice))]
        kinds = {kind(file.path) for file in tree}
        first = next((one for one in KINDS if one in kinds), None)
        if first is None:
            raise none_of(self.address, [f"training text in {choice or 'it'}"]) if configs else self._nothing(config)
        return tuple(file for file in tree if kind(file.path) == first)

    def _matching(self, patterns: Sequence[str]) -> tuple[HubFile, ...]:
        chosen: dict[str, HubFile] = {}
        folders = {folder: self.hub.tree(folder) for folder in sorted({fixed_folder(pattern) for pattern in patterns})}
        for pattern in patterns:
            regex = pattern_regex(pattern)
            matches = (file for file in folders[fixed_folder(pattern)] if regex.fullmatch(file.path))
            chosen |= {file.path: file for file in matches if kind(file.path) and file.path not in chosen}
        if not chosen:
            raise none_of(self.address, patterns)
        return tuple(chosen.values())

    def _nothing(self, config: str | None) -> DataError:
        if config is None:
            why = f"has no file that ends in one of {', '.join(KINDS)}, outside of test and validation"
            return DataError(f"source {self.spec!r}: {self.address.repo} {why}; give files:GLOB")
        folders = sorted({file.path.rpartition("/")[0] for file in self.hub.tree("") if kind(file.path)} - {""})
        if not folders:
            return DataError(f"source {self.spec!r}: {self.address.repo} has no configs; leave out /{config}")
        return which_config(self.address, folders)


def _size(files: Sequence[HubFile]) -> int:
    """Bytes of all of them."""
    return sum(file.size for file in files)


def _megabytes(files: Sequence[HubFile]) -> str:
    return f"{_size(files) / 1e6:,.1f} MB"


def _fingerprint(hub: Hub, files: Sequence[HubFile]) -> str:
    """Of the commit, and of which of its files with which content are read."""
    listing = [hub.revision, [[file.path, file.size, file.oid] for file in files]]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def hub_source(spec: str, record: Mapping[str, Any], say: Say, patience: Patience | None = None) -> HubSource:
    """The source that a spec names; see `open_source`.

    Raises:
        DataError: it is not of the right form.
    """
    address = Address.parse(spec)
    return HubSource(address, Hub(address, patience or PATIENCE, say), record)
