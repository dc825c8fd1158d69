"""The one-file twin and `pocketlm train` give the same losses, bit for bit: two writings of one arithmetic.

The twin shares no line with the package: order, split, model, initialisation, loss, schedule and optimizer groups are
written again. Losses are compared with ==, no tolerance.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pocketlm.config import Config
from pocketlm.data.prepare import prepare
from pocketlm.data.shards import open_dataset
from pocketlm.journal import Journal
from pocketlm.training import resolve
from pocketlm.training.loop import train

TWIN = Path(__file__).parents[2] / "examples" / "one_file.py"
LONG = "".join(f"{n}: the {n * n % 97} ravens flew over {n % 13} hills, née à Zürich\n" for n in range(1200))
SHORT = LONG[:3000]  # under 160 rows: the 20 steps cross an epoch, in the middle of a step
BASE = {"train.total_steps": 20, "train.loss_chunk": 0, "sample.temperature": 0, "sample.max_new_tokens": 20}

# the text, the package's fields beside BASE, and the same for the twin
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "the debug preset": (SHORT, {}, {}),
    "another seed, warm-up": (
        LONG,
        {"train.seed": 7, "schedule.warmup_fraction": 0.25, "train.micro_batch": 3},
        {"seed": 7, "warmup_fraction": 0.25, "micro_batch": 3},
    ),
    "wsd, four layers, no shared heads": (
        LONG,
        {
            "schedule.kind": "wsd",
            "schedule.warmup_fraction": 0.1,
            "model.num_hidden_layers": 4,
            "model.num_key_value_heads": 2,
            "optim.clip": 0.5,
        },
        {
            "schedule": "wsd",
            "warmup_fraction": 0.1,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "clip": 0.5,
        },
    ),
}


@pytest.fixture(scope="module")
def twin() -> ModuleType:
    spec = spec_from_file_location("one_file", TWIN)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["one_file"] = module  # where dataclasses looks up its annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _leave_threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    return tmp_path


def records_of(text: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """What `pocketlm train` writes to its journal, trained on text.txt."""
    Path("text.txt").write_text(text, encoding="utf-8")
    config = Config.preset("debug", BASE | {"data.source": "files:text.txt"} | fields)
    return Journal.read(train(config, out=Path("run")) / "metrics.jsonl")


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


@pytest.mark.goal("R16")
@pytest.mark.parametrize("case", CASES)
def test_every_loss_and_every_gradient_norm_is_equal_to_the_last_bit(
    case: str, workdir: Path, twin: ModuleType
) -> None:
    text, fields, flags = CASES[case]
    records = records_of(text, fields)
    settings = twin.Settings(**flags, temperature=0.0, max_new_tokens=20)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(False)  # the twin by itself does not ask for them
    train_tokens, val_tokens = twin.read_tokens(Path("text.txt"), settings.val_fraction)
    model = twin.Model(settings)
    steps = list(twin.train(model, train_tokens, settings))
    assert steps == [(record["loss"], record["grad_norm"]) for record in of_kind(records, "train")]
    assert len(steps) == 20
    assert steps[-1][0] < steps[0][0] - 1, "nothing was learned: equal losses would mean little"

    final = of_kind(records, "eval")[-1]
    assert final["tokens"] == len(val_tokens) - 1
    val_loss = twin.validation_loss(model, val_tokens, settings.context)
    assert val_loss == pytest.approx(final["loss"], rel=1e-6), "summed in another order, so not to the last bit"
    assert twin.sample(model, settings) == of_kind(records, "sample")[-1]["text"], "the likeliest tokens"


def test_it_runs_by_itself_and_prints_every_digit(workdir: Path) -> None:
    expected = [record["loss"] for record in of_kind(records_of(SHORT, {}), "train")]
    command = [sys.executable, str(TWIN), "text.txt", "--steps", "20", "--json"]
    lines = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
    assert [line["loss"] for line in lines[:-1]] == expected
    assert set(lines[-1]) == {"val_loss", "text"}


@pytest.mark.parametrize(
    "text",
    [SHORT, LONG, LONG * 5, "no line ends at all " * 400, "\n" * 4000 + "x" * 3000, "a\r\nb\r\n" * 900],
    ids=["short", "long", "longer", "no lines", "lines, then none", "CRLF"],
)
def test_it_holds_out_what_the_package_holds_out(text: str, workdir: Path, twin: ModuleType) -> None:
    path = Path("text.txt")
    path.write_bytes(text.encode())
    data = Config.preset("debug", {"data.source": "files:text.txt"}).data
    dataset = open_dataset(prepare(data, progress=lambda line: None))
    for mine, theirs in zip(twin.read_tokens(path, 0.05), (dataset.train, dataset.val), strict=True):
        assert mine.tolist() == theirs.read(0, theirs.num_tokens).tolist()


def test_its_defaults_are_the_debug_preset(twin: ModuleType) -> None:
    settings, config = twin.Settings(), Config.preset("debug")
    model = config.model.model_dump()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(settings, name) == model[name], name
    assert (settings.context, settings.rows_per_step) == (config.data.context, config.rows_per_step)
    assert (settings.lr, settings.clip, settings.weight_decay) == (
        config.optim.lr,
        config.optim.clip,
        config.optim.weight_decay,
    )


def test_a_text_too_short_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("short\n")
    command = [sys.executable, str(TWIN), "text.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
    assert "one row needs 33" in done.stderr


def test_it_is_short_and_imports_nothing_but_torch_and_numpy() -> None:
    source = TWIN.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    assert max(map(len, source.splitlines())) <= 120
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0
            names.add(node.module.partition(".")[0])
    assert names - sys.stdlib_module_names == {"numpy", "torch"}
    assert "pocketlm" not in names
