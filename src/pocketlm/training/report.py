"""A run as one page: `report.html`, a file that needs nothing beside it and asks no network for anything.

It is made from the files of the run's folder (config.toml, resolved.toml, metrics.jsonl) and the data set, so it can
be made again at any time, for a stopped run too:

    from pocketlm.training.report import write_report
    write_report(Path("runs/tiny"))

Whatever a run holds is text to the page (page.py). Parts that were not recorded are left out. The page names the
machine that it is made on, which is the run's own where the run writes it.
"""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pocketlm import checkpoint, machine
from pocketlm.data.shards import Dataset, unigram_entropy
from pocketlm.errors import FileError
from pocketlm.evaluate import source
from pocketlm.files import write_file
from pocketlm.limits import available_cores
from pocketlm.model import sizes
from pocketlm.training import curve, page, watch
from pocketlm.training.log import Record, describe, duration, figure
from pocketlm.training.story import Story, read_story

REPORT = "report.html"
CHART_POINTS = 1500
TROUBLES = 40
SAMPLE_STEPS = 12

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Number:
    """A headline."""

    label: str
    value: str
    note: str


def write_report(folder: Path, dataset: Dataset | None = None) -> Path:
    """Writes `report.html` into the folder of a run and returns its path.

    Args:
        folder: a run, complete or not.
        dataset: what it was trained on; looked for under `data/` where it is not given, and left out if not there.

    Raises:
        FileError: the folder holds no run.
        ConfigError: its configuration is not one of this version.
    """
    story = read_story(folder)
    dataset = dataset or find_dataset(story)
    path = folder / REPORT
    write_file(path, page.render("report.html.jinja", _context(story, dataset)))
    return path


def write_curve(folder: Path, out: Path) -> None:
    """Writes the loss curve of a run as an SVG file.

    Raises:
        FileError: the folder holds no run, or the run no loss yet.
    """
    chart = loss_chart(read_story(folder), standalone=True)
    if not chart:
        raise FileError(f"{folder} has no loss to draw yet; let it train first")
    write_file(out, chart.encode())


def find_dataset(story: Story) -> Dataset | None:
    """The data set that the run's newest checkpoint names by its fingerprint, if it still is where it was made."""
    steps = checkpoint.list_checkpoints(story.folder)
    if not steps:
        return None
    return source.find_dataset(checkpoint.read_state(steps[-1]).get("data_fingerprint"), story.config.data)


def points(records: Iterable[Record], key: str, x: Mapping[int, float]) -> list[curve.Point]:
    """(x of the step, value) of every record that has a finite one."""
    found = [(x.get(record["step"]), record.get(key)) for record in records]
    return curve.finite((at, value) for at, value in found if at is not None and isinstance(value, int | float))


# --- charts


def loss_chart(story: Story, *, standalone: bool = False) -> str:
    """Training and validation loss against tokens; "" before the first step."""
    train, span = story.records["train"], curve.span_of(story.config.train.total_steps)
    tokens = _tokens_by_step(train)
    losses, held_out = points(train, "loss", tokens), points(story.records["eval"], "loss", tokens)
    last = f"validation, last {held_out[-1][1]:.3f}" if held_out else ""
    series = [*_noisy(losses, span), curve.Series(last, held_out, "dots")]
    return curve.svg_chart(series, title="Loss, nats per token", x_label="tokens trained on", standalone=standalone)


def _small_charts(story: Story) -> list[Markup]:
    train, span = story.records["train"], curve.span_of(story.config.train.total_steps)
    tokens = _tokens_by_step(train)
    rates = curve.thinned(points(train, "lr", tokens), CHART_POINTS)
    drawn = {
        "Learning rate": [curve.Series("learning rate", rates, "line")],
        "Gradient norm": _noisy(points(train, "grad_norm", tokens), span),
        "Tokens per second": _noisy(points(train, "tokens_per_s", tokens), span),
    }
    small = partial(curve.svg_chart, x_label="tokens", from_y=0, width=340, height=210, legend=False)
    charts = [small(series, title=title) for title, series in drawn.items()]
    return [Markup(chart) for chart in charts if chart]


def _tokens_by_step(train: Iterable[Record]) -> dict[int, float]:
    return {record["step"]: record.get("tokens", math.nan) for record in train}


def _noisy(raw: list[curve.Point], span: int) -> list[curve.Series]:
    """What was measured, thin, and its running mean, strong; one line where the mean would be of one step."""
    if span == 1:
        return [curve.Series("training", curve.thinned(raw, CHART_POINTS), "line")]
    mean = curve.thinned(curve.smoothed(raw, span), CHART_POINTS)
    return [
        curve.Series("each step", curve.thinned(raw, CHART_POINTS), "raw"),
        curve.Series(f"mean of {span} steps", mean, "line"),
    ]


# --- words


def _context(story: Story, dataset: Dataset | None) -> dict[str, Any]:
    samples = [(step, list(texts)) for step, texts in groupby(story.records["sample"], key=lambda r: r["step"])]
    shown = samples[: SAMPLE_STEPS // 2] + samples[SAMPLE_STEPS // 2 :][-SAMPLE_STEPS // 2 :]
    return {
        "name": story.config.name,
        "status": _status(story),
        "signs": _signs(story),
        "numbers": _numbers(story, dataset),
        "loss_chart": Markup(loss_chart(story)),
        "small_charts": _small_charts(story),
        "troubles": _troubles(story),
        "samples": [(step, [(r["prompt"], r["text"]) for r in texts]) for step, texts in shown],
        "samples_left_out": len(samples) - len(shown),
        "commands": "\n".join(_commands(story)),
        "tables": _tables(story, dataset),
    }


def _troubles(story: Story) -> list[str]:
    """Steps that were skipped, times that the run went back or that memory ran out, the last ones."""
    records = [record for kind in ("skip", "rollback", "micro_batch") for record in story.records.get(kind, [])]
    return [describe(record) for record in sorted(records, key=lambda r: r["step"])][-TROUBLES:]


def _signs(story: Story) -> list[str]:
    """Whether the text is too small for the run, as far as it went."""
    seen = next((float(record.get("epoch", 0.0)) for record in story.records["train"][-1:]), 0.0)
    evaluations = watch.evaluations_of(sorted(story.records["train"] + story.records["eval"], key=_order))
    return [sign for sign in (watch.repeats(seen), watch.turned_up(evaluations)) if sign]


def _order(record: Record) -> tuple[int, bool]:
    return record["step"], record["kind"] == "eval"


def _status(story: Story) -> str:
    total = story.config.train.total_steps
    if story.step >= total:
        return f"complete: {total:,} steps"
    return f"stopped at step {story.step:,} of {total:,}" if story.step else f"no step of {total:,} was recorded yet"


def _numbers(story: Story, dataset: Dataset | None) -> list[Number]:
    """The headlines: size, tokens, and for what was measured, how good and how fast."""
    count = sizes.parameters(story.config.model)
    numbers = [Number("Parameters", f"{count.total:,}", f"{count.non_embedding:,} without embeddings")]
    if story.records["train"]:
        last = story.records["train"][-1]
        each = f"{story.step:,} steps of {story.config.train.tokens_per_step:,}"
        each += f", {last['epoch']:.2f} epochs" if "epoch" in last else ""
        each += f", segment {last['segment'] + 1:,}" if "segment" in last else ""
        numbers.append(Number("Tokens trained on", f"{last['tokens']:,}", each))
    numbers += _quality(story, dataset)
    return numbers + _speed(story)


def _quality(story: Story, dataset: Dataset | None) -> list[Number]:
    evaluations = [r for r in story.records["eval"] if math.isfinite(r["loss"])]
    if not evaluations:
        return []
    last, best = evaluations[-1], min(evaluations, key=lambda r: float(r["loss"]))
    nats, bits = unigram(dataset) if dataset else (math.nan, math.nan)
    note = "nats per token" if best is last else f"at the end; lowest {best['loss']:.4f} at step {best['step']:,}"
    known = [f"; unigram entropy {value:.4f}" if math.isfinite(value) else "" for value in (nats, bits)]
    return [
        Number("Validation loss", f"{last['loss']:.4f}", note + known[0]),
        Number("Bits per byte", figure(last["bits_per_byte"]), "of held-out text" + known[1]),
    ]


def unigram(dataset: Dataset) -> tuple[float, float]:
    """What counting tokens reaches: nats per token and bits per byte."""
    return unigram_entropy(dataset.train, dataset.tokenizer.byte_lengths, dataset.tokenizer.special_ids)


def _speed(story: Story) -> list[Number]:
    """Means over all steps; time between steps (evaluations, checkpoints) is not in them."""
    if not story.records["train"] or not (seconds := story.records["train"][-1].get("elapsed_s")):
        return []
    rate = story.records["train"][-1]["tokens"] / seconds
    numbers = [Number("Time in steps", duration(seconds), f"{rate:,.0f} tokens per second")]
    if peak := story.resolved.get("peak_flops"):
        mfu = rate * sizes.flops_per_token(story.config.model, story.config.data.context) / peak
        numbers.append(Number("MFU", f"{100 * mfu:.0f} %", f"of {peak / 1e9:,.0f} GFLOP/s in matrix products"))
    return numbers


def _commands(story: Story) -> list[str]:
    """What to type next. A run that is not complete goes on from its own configuration."""
    run, config = (shlex.quote(str(path)) for path in (story.folder, story.folder / "config.toml"))
    go_on = f"pocketlm train {config} --out {run}"
    if story.config.train.stop_at_step is not None:
        go_on += " --train.stop-at-step none"
    going_on = [go_on] if story.step < story.config.train.total_steps else []
    if not checkpoint.list_checkpoints(story.folder):
        return going_on
    prompt = shlex.quote(next(iter(story.config.sample.prompts), "The "))
    return [
        *going_on,
        f"pocketlm chat {run}",
        f"pocketlm generate {run} --prompt {prompt}",
        f"pocketlm eval {run}",
        f"pocketlm verify {run}",
    ]


def _tables(story: Story, dataset: Dataset | None) -> list[tuple[str, list[tuple[str, Rows]]]]:
    tree = story.config.tree()
    sections = [(name, _rows(values)) for name, values in tree.items() if isinstance(values, dict)]
    reasons = story.resolved.get("reasons", {})
    settled = [
        (name, f"{_words(value)}: {reasons[name]}" if name in reasons else _words(value))
        for name, value in story.resolved.items()
        if name != "reasons"
    ]
    made = [("What auto became, and why", settled)] if settled else []
    libraries = [("Libraries of the run", _rows(story.versions))] if story.versions else []
    return [
        *([("Data", _data(dataset))] if dataset else []),
        ("How it was computed", [*made, *libraries, ("The machine that made this page", machine_rows())]),
        ("Configuration", sections),
    ]


def _data(dataset: Dataset) -> list[tuple[str, Rows]]:
    info = dataset.info
    about = [
        ("source", info["source"]["spec"]),
        ("tokenizer", info["tokenizer"]["spec"]),
        ("vocabulary", f"{info['tokenizer']['vocab_size']:,} ids"),
        ("folder", str(dataset.path)),
        ("fingerprint", dataset.fingerprint[:16]),
        ("split", info["split"]["words"]),
    ]
    return [("", about), ("training", _counts(info["train"])), ("held out", _counts(info["val"]))]


def _counts(split: Mapping[str, Any]) -> Rows:
    names = {"documents": "documents", "tokens": "tokens", "text_bytes": "bytes of text"}
    per_token = split["text_bytes"] / max(1, split["tokens"])
    return [*((words, f"{split[name]:,}") for name, words in names.items()), ("bytes per token", f"{per_token:.2f}")]


def machine_rows() -> Rows:
    """The machine that this process runs on."""
    return [
        ("processor", machine.cpu_name()),
        ("cores", str(available_cores())),
        ("platform", platform.platform()),
    ]


def _rows(values: Mapping[str, Any]) -> Rows:
    return [(name, _words(value)) for name, value in values.items()]


def _words(value: Any) -> str:
    """A value as TOML would have it, a list without its brackets."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(repr(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
