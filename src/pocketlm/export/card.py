"""The model card of an exported folder: README.md with the fields that the Hub reads, and the loss curve beside it.

What is said of the training is read from the run that a checkpoint lies in, up to its step; a model without a run has a
card that says so. Nothing is measured here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pocketlm import checkpoint
from pocketlm.config import Config, DataConfig
from pocketlm.errors import DataError, FileError, UsageError, one_line
from pocketlm.field_types import Dtype
from pocketlm.formats.hub_model import is_hub_id
from pocketlm.formats.release import Release
from pocketlm.model.sizes import parameters
from pocketlm.text.hub_names import Address
from pocketlm.training.log import Record, figure
from pocketlm.training.report import loss_chart
from pocketlm.training.story import Story, read_story

CARD, CURVE = "README.md", "curve.svg"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
NO_LICENSE = "unknown"
CURVE_ROWS = 12


@dataclass(frozen=True)
class Subject:
    """What a card is of."""

    name: str
    """What it is loaded by: a Hub id, or the folder's name."""
    release: Release
    layout: str
    dtype: Dtype
    license: str = NO_LICENSE
    """By the Hub's word for it."""
    story: Story | None = None
    """Of its run, up to the checkpoint."""
    tokens: int | None = None
    """That the checkpoint had seen."""


def card_files(subject: Subject) -> dict[str, bytes]:
    """The card, and the curve where there is one, by their names.

    Raises:
        UsageError: the licence is none that the Hub could know.
    """
    if not LICENSE.fullmatch(subject.license):
        raise UsageError(
            f"--license {subject.license!r}: allowed is a word of the Hub's list, as apache-2.0, mit or other"
        )
    chart = loss_chart(subject.story, standalone=True) if subject.story else ""
    parts = [_head(subject), _intro(subject), _load(subject), _training(subject, bool(chart)), _license(subject)]
    text = "\n".join(line for part in parts for line in part) + "\n"
    return {CARD: text.encode()} | ({CURVE: chart.encode()} if chart else {})


def story_of(path: Path) -> tuple[Story, int] | None:
    """The run that a checkpoint lies in, as far as it, and the tokens that it had seen; None for any other model.

    Raises:
        FileError: its state, or a file of the run, is damaged.
    """
    if not (path / checkpoint.STATE).is_file():
        return None
    state, run = checkpoint.read_state(path), path.resolve().parent.parent
    step, tokens = state.get("step"), state.get("tokens")
    if type(step) is not int or type(tokens) is not int:
        raise FileError(f"{path / checkpoint.STATE} is damaged: it does not say at which step it is")
    if (run / "config.toml").is_file() and (run / "metrics.jsonl").is_file():
        story = read_story(run)
    else:
        story = Story(path, Config.from_toml(path / checkpoint.CONFIG), {}, {}, {"train": [], "eval": [], "sample": []})
    until = {kind: [record for record in records if record["step"] <= step] for kind, records in story.records.items()}
    return replace(story, records=until), tokens


# --- the parts


def _head(subject: Subject) -> Iterator[str]:
    """What the Hub reads. JSON is YAML."""
    fields: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": subject.license,
        "tags": ["pocketlm"],
    }
    if subject.story and (datasets := _datasets(subject.story.config.data)):
        fields["datasets"] = datasets
    begun = subject.story.config.init.model if subject.story else None
    if begun and is_hub_id(begun):
        fields["base_model"] = begun.partition("@")[0]
    yield "---"
    for name, value in fields.items():
        yield f"{name}: {json.dumps(value)}"
    yield "---"


def _datasets(data: DataConfig) -> list[str]:
    repos = []
    for part in data.parts:
        try:
            repos.append(Address.parse(part.source).repo)
        except DataError:  # text of one's own
            continue
    return repos


def _intro(subject: Subject) -> Iterator[str]:
    model, count = subject.release.model, parameters(subject.release.model)
    yield f"\n# {_plain(subject.name)}\n"
    yield (
        f"A language model of {count.total:,} parameters ({count.non_embedding:,} without embeddings), "
        f"made with pocketlm.\n"
    )
    yield from _table(
        {
            "layout": f"{subject.layout}, {model.num_hidden_layers} layers of {model.hidden_size}",
            "heads": f"{model.num_attention_heads}, {model.num_key_value_heads} for keys and values",
            "vocabulary": f"{model.vocab_size:,}",
            "context": f"{model.max_position_embeddings:,} tokens",
            "stored as": subject.dtype,
        }
    )


def _load(subject: Subject) -> Iterator[str]:
    custom, name = subject.layout == "pocketlm", json.dumps(subject.name)
    trust = ", trust_remote_code=True" if custom else ""
    yield "\n## How to load it\n"
    if custom:
        yield (
            "transformers has no class for this layout. The folder brings its own, `modeling_pocketlm.py`, which "
            "transformers runs only where it is told to trust it; read it first.\n"
        )
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield f"model = AutoModelForCausalLM.from_pretrained({name}{trust})"
    yield f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})"
    yield "```\n"
    yield "With pocketlm, which runs no code of a folder:\n"
    yield "```python"
    yield "import pocketlm\n"
    yield f"print(pocketlm.load({name}).generate({json.dumps(_prompt(subject))}))"
    yield "```"


def _prompt(subject: Subject) -> str:
    prompts = subject.story.config.sample.prompts if subject.story else ()
    return next(iter(prompts), "The ")


def _training(subject: Subject, has_chart: bool) -> Iterator[str]:
    if (story := subject.story) is None:
        yield "\n## Training\n\nNothing is known of it here: this model was not exported from a run."
        return
    yield "\n## Data and training\n"
    yield from _table(_facts(subject, story.config))
    evaluations = [record for record in story.records["eval"] if record.get("loss") is not None]
    if evaluations:
        yield "\n## Evaluation\n"
        yield from _evaluation(evaluations[-1])
    if has_chart:
        yield f"\n## Curve\n\n![Loss by tokens trained on]({CURVE})\n"
    if evaluations:
        yield "| step | validation loss | bits per byte |\n|-:|-:|-:|"
        for record in _some(evaluations, CURVE_ROWS):
            yield f"| {record['step']:,} | {figure(record['loss'])} | {figure(record['bits_per_byte'])} |"


def _facts(subject: Subject, config: Config) -> dict[str, str]:
    data, train, story = config.data, config.train, subject.story
    assert story is not None
    last = story.records["train"][-1] if story.records["train"] else {}
    epochs = f", {last['epoch']:.2f} times the text" if last.get("epoch") else ""
    filters = {name: value for name in FILTERS if (value := getattr(data, name)) not in (0, None)}
    facts = {"source": ", ".join(_code(part.source) for part in data.parts)}
    if filters:
        facts["of it"] = ", ".join(_code(f"{name} {value}") for name, value in filters.items())
    begun = {"begun with": _code(config.init.model)} if config.init.model else {}
    return facts | {
        "tokenizer": _code(data.tokenizer),
        "tokens seen": f"{subject.tokens or 0:,}{epochs}",
        "steps": f"{story.step:,} of {train.tokens_per_step:,} tokens, in rows of {data.context:,}",
        **begun,
        "optimizer": f"{config.optim.kind}, learning rate {config.optim.lr:g}, {config.schedule.kind}",
        "precision": f"{story.resolved.get('dtype', train.dtype)}, weights and optimizer state in fp32",
        "seed": str(train.seed),
    }


FILTERS = ("max_documents", "min_chars", "max_chars", "script", "keep_regex", "drop_regex", "dedup")


def _evaluation(record: Record) -> Iterator[str]:
    yield f"On text that was held out of the training, at step {record['step']:,}:\n"
    yield from _table(
        {
            "loss": f"{figure(record['loss'])} nats per token",
            "perplexity": figure(record["perplexity"]),
            "bits per byte": figure(record["bits_per_byte"]),
            "tokens": f"{record['tokens']:,}",
        }
    )


def _license(subject: Subject) -> Iterator[str]:
    yield "\n## Licence\n"
    if subject.license == NO_LICENSE:
        yield "None was given. Whoever publishes this model says under which one, in the field `license` above."
    else:
        yield f"`{subject.license}`. The text that it was trained on has licences of its own."


# --- words


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    yield "| | |\n|-|-|"
    for name, value in rows.items():
        yield f"| {name} | {value} |"


def _code(text: str) -> str:
    """Text of others, as code in a table."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', '¦')}`"


def _plain(text: str) -> str:
    """Text of others in a heading, without markup."""
    return re.sub(r"[^\w ./-]", "", one_line(text)) or "model"


def _some(records: list[Record], most: int) -> list[Record]:
    """Evenly chosen ones of them, the first and the last among them."""
    if len(records) <= most:
        return records
    return [records[round(index * (len(records) - 1) / (most - 1))] for index in range(most)]
