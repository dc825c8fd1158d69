"""The fields of a configuration as help: what may be typed, what it means, what it is by default.

argparse shows them and `parse_overrides` reads them, into the same tree as a TOML file. A test types every default that
is shown back in, so the help cannot promise what is not read.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from argparse import ArgumentParser
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pocketlm.config import Config, Section, SourceConfig
from pocketlm.errors import UsageError

WORDS = {bool: "true|false", int: "N", float: "X", str: "TEXT", NoneType: "none"}
TEXTS = {"data.keep_regex", "data.drop_regex"}  # in which a [ begins no list
LIST_WORDS = {str: '"TEXT"', SourceConfig: '{source = "SOURCE", weight = X}', Ellipsis: "..."}


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`--optim.lr 3e-4 --sample.prompts '["a"]'` as dotted names to values; `--a.b=c` is read too.

    Raises:
        UsageError: a word that is no flag, or a flag without its value.
    """
    overrides: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise UsageError(f"cannot place {word!r}; fields are given as --section.field VALUE")
        name, equals, value = word[2:].partition("=")
        if not equals:
            try:
                value = next(rest)
            except StopIteration:
                raise UsageError(f"{word} needs a value: {word} VALUE") from None
        field = name.replace("-", "_")
        overrides[field] = value if field in TEXTS or not value.startswith("[") else _parsed_list(word, value)
    return overrides


def add_fields(parser: ArgumentParser, config: Config) -> None:
    """Adds every field to the parser's help, a group a section, with its value in `config` as the default."""
    for name in type(config).model_fields:
        if isinstance(section := getattr(config, name), Section):
            group = parser.add_argument_group(name, section.__doc__)
            for flag, options in _flags(section, f"{name}."):
                group.add_argument(flag, **options)
    for flag, options in _flags(config, ""):
        parser.add_argument(flag, **options)


def _flags(section: Section, prefix: str) -> list[tuple[str, dict[str, Any]]]:
    """(flag, what argparse takes with it) of each field that is no section itself."""
    fields = [(name, info, getattr(section, name)) for name, info in type(section).model_fields.items()]
    return [
        (
            f"--{prefix}{name}".replace("_", "-"),
            {"metavar": _kind(info.annotation), "help": f"{info.description} (default: {_typed(value)})"},
        )
        for name, info, value in fields
        if not isinstance(value, Section)
    ]


def _kind(annotation: Any) -> str:
    """What may be typed for a type: N, X, TEXT, none, true|false, cosine|wsd, auto|N, '[X, X]', '["TEXT", ...]'."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(members[0])
    if origin is Literal:
        return "|".join(members)
    if origin in (Union, UnionType):
        return "|".join(map(_kind, members))
    if origin is tuple:
        return f"'[{', '.join(LIST_WORDS.get(member) or _kind(member) for member in members)}]'"
    return WORDS[annotation]


def _typed(value: Any) -> str:
    """A value as one types it in a shell; argparse wants % doubled."""
    if value is None:
        return "none"
    if isinstance(value, tuple) and value and isinstance(value[0], SourceConfig):
        text = f"[{', '.join(map(_table, value))}]"
    else:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool | tuple) else str(value)
    return shlex.quote(text).replace("%", "%%")


def _table(source: SourceConfig) -> str:
    """One line of TOML."""
    fields = (f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in source.model_dump().items())
    return f"{{{', '.join(fields)}}}"


def _parsed_list(flag: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise UsageError(f'{flag}: {text!r} is no list; write it like \'["one", "two"]\'') from None
