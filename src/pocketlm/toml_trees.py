"""Plain trees from TOML: presets and a user's files, of bounded size, and trees as dotted names.

{"optim": {"lr": 1}}  is  {"optim.lr": 1}
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pocketlm.errors import ConfigError, UsageError
from pocketlm.reading import read_bytes

TOML_LIMIT_BYTES = 1 << 16
MAX_KEY_DOTS = 100  # tomllib takes memory in proportion to their square

Tree = dict[str, Any]


def read_toml(path: Path) -> Tree:
    """The content of a TOML file.

    Raises:
        FileError: it cannot be read.
        ConfigError: it is no TOML, or more of it than any configuration has.
    """
    data = read_bytes(path, TOML_LIMIT_BYTES)
    try:
        text = data.decode()
        if any(line.partition("=")[0].count(".") > MAX_KEY_DOTS for line in text.splitlines()):
            raise ConfigError(f"{path} is no configuration: a key with more than {MAX_KEY_DOTS} dots")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, no UTF-8, a number of 4,301 digits
        raise ConfigError(f"{path} is no TOML: {error}") from None


def preset_names() -> str:
    """The presets, comma-separated, by name."""
    return ", ".join(sorted(p.name.removesuffix(".toml") for p in _presets().iterdir() if p.name.endswith(".toml")))


def preset_tree(name: str) -> Tree:
    """The tree of a named preset.

    Raises:
        UsageError: no preset of that name; the message has the nearest one.
    """
    names = preset_names().split(", ")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no preset {name!r}; {hint}presets: {', '.join(names)}; or give a .toml file")
    tree = tomllib.loads((_presets() / f"{name}.toml").read_text(encoding="utf-8"))
    base = preset_tree(tree.pop("preset")) if "preset" in tree else {}
    return merged(base, {"name": name} | tree)


def _presets() -> Any:
    return resources.files("pocketlm") / "presets"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each field of a tree of sections, with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and not prefix:  # a section in a section is no field, however deep
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nested(named: Mapping[str, Any]) -> Tree:
    """The tree of dotted names."""
    tree: Tree = {}
    for name, value in named.items():
        section, _, key = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    return tree


def merged(base: Tree, change: Tree) -> Tree:
    """`base` with the fields of `change` in their places."""
    return nested(dict(flat(base)) | dict(flat(change)))
