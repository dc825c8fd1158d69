"""Writes docs/config.md: every field of the configuration, its kind and default, and what each preset is.

    python tools/config_page.py

The page follows from the pydantic models and the preset files alone; a test compares it with what stands there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pocketlm.config import FREE_FIELDS, STEPS_FIELDS, Config
from pocketlm.model import sizes
from pocketlm.toml_trees import preset_names

PAGE = Path(__file__).parents[1] / "docs" / "config.md"

INTRODUCTION = """# The configuration

<!-- Written by tools/config_page.py from the models in src/pocketlm/config.py. Do not edit. -->

A run is one configuration. It comes from a preset or a TOML file, and flags change it. Every field below is a flag of
`pocketlm train`: underscores become hyphens, so the field `optim.lr` is `--optim.lr` and `train.total_steps` is
`--train.total-steps`. In TOML a field stands in the table of its section. On the command line a list is written as in
TOML, `--optim.betas '[0.9, 0.95]'`, a switch as `true` or `false`, and the absence of a value as `none`.

All problems of a configuration are reported at once, one line each, and the process leaves with exit code 2.

Fields marked *free* may differ when a run goes on. Those marked *steps* have [a rule](train.md#more-steps). Any other
difference is refused: it would change the result.
"""

PRESETS = """
## Presets

A preset is a TOML file in `src/pocketlm/presets/`. A file of your own may begin with `preset = "NAME"` and hold only
what differs. A source that begins with `hf:` comes from [the Hugging Face Hub](data.md#the-hub) while the model
trains; a first try takes `--data.max-documents`. See [the seeds](seeds.md) and [the recipe of `tiny`](recipe.md).

| preset | parameters | not embeddings | source | tokenizer | context | tokens a step | steps | optimizer | schedule |
|-|-:|-:|-|-|-:|-:|-:|-|-|
"""

HEADER = "| field | kind | default | meaning |\n|-|-|-|-|\n"


def page() -> str:
    """The whole page."""
    sections = [_section(name, field.annotation) for name, field in Config.model_fields.items()]
    presets = [_preset(name) for name in preset_names().split(", ")]
    return "".join([INTRODUCTION, _rows(Config, ""), *sections, PRESETS, *presets])


def _section(name: str, section: Any) -> str:
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return ""
    return f"\n## {name}\n\n{section.__doc__}\n{_rows(section, f'{name}.')}"


def _rows(section: type[BaseModel], prefix: str) -> str:
    schema = section.model_json_schema()
    plain = [name for name in section.model_fields if not _is_section(section, name)]
    return "\n" + HEADER + "".join(_row(prefix + name, schema["properties"][name]) for name in plain)


def _is_section(section: type[BaseModel], name: str) -> bool:
    annotation = section.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _row(name: str, entry: dict[str, Any]) -> str:
    mark = " *Free.*" if name in FREE_FIELDS else " *Steps.*" if name in STEPS_FIELDS else ""
    meaning = entry.get("description", "") + mark
    cells = (f"`{name}`", _kind(entry), f"`{_value(entry['default'])}`", meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _kind(entry: dict[str, Any]) -> str:
    """The values that a field takes, in words, from its JSON schema."""
    if "anyOf" in entry:
        return ", or ".join(_kind(option) for option in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry["type"] == "array":
        items = entry.get("prefixItems")
        item = entry.get("items", {})
        kind = "tables" if "$ref" in item else "texts" if item.get("type") == "string" else "numbers"
        return f"list of {len(items)} numbers" if items else f"list of {kind}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return words.get(entry["type"], "`none`") + _range(entry)


def _range(entry: dict[str, Any]) -> str:
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {entry[key]:g}" for key, sign in bounds.items() if key in entry)


def _value(default: Any) -> str:
    """A default as it is written in TOML."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return str(list(default))
    return "none" if default is None else str(default)


def _preset(name: str) -> str:
    config = Config.preset(name)
    count = sizes.parameters(config.model)
    cells = (
        f"`{name}`",
        f"{count.total:,}",
        f"{count.non_embedding:,}",
        f"`{config.data.source}`",
        f"`{config.data.tokenizer}`",
        f"{config.data.context:,}",
        f"{config.train.tokens_per_step:,}",
        f"{config.train.total_steps:,}",
        config.optim.kind,
        config.schedule.kind,
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
