"""The whole way as a person goes it: tokenizer, data, training, evaluation, completion, sizes, verification.

One folder, small models, real text (this repository's own sources). The fixture goes the way once, the tests look at
what each command said and left behind.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketlm
from pocketlm.cli.main import main
from pocketlm.evaluate.loss import LossReport
from pocketlm.journal import Journal
from pocketlm.training import resolve

SOURCES = Path(pocketlm.__file__).parent
DTYPES = ("fp32", "bf16")
FIGURES = LossReport(1.0, 2.0, 3.0, 4.0, 5, 6)
TOML = """
preset = "debug"

[model]
vocab_size = 300

[data]
source = "files:text/*.py"
tokenizer = "tokenizer.json"
dir = "data/own"

[train]
total_steps = 20
checkpoint_every = 10
dtype = "{dtype}"
"""
TOKENIZER = ("tokenizer", "train", "--source", "files:text/*.py", "--vocab-size", "300", "--out", "tokenizer.json")
PREPARE = ("data", "prepare", "--source", "files:text/*.py", "--tokenizer", "tokenizer.json", "--out", "data/own")
GENERATE = ("generate", "runs/fp32", "--prompt", "def ", "--max-new-tokens", "40", "--seed", "3")


def run(*words: str) -> str:
    """The stdout of a command that succeeds."""
    return both(*words)[0]


def both(*words: str) -> tuple[str, str]:
    """(stdout, stderr) of a command that succeeds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    assert code == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def run_json(*words: str) -> dict[str, Any]:
    """The one line of JSON that a command prints with --json."""
    text = run(*words, "--json")
    assert text.count("\n") == 1
    tree = json.loads(text)
    assert isinstance(tree, dict)
    return tree


@pytest.fixture(scope="module", autouse=True)
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Goes the way up to two trained models, in a folder of its own; what each command said, by its name."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text").mkdir()
    for name in ("config.py", "checkpoint.py", "files.py", "data/order.py", "data/split.py", "model/loss.py"):
        shutil.copy(SOURCES / name, folder / "text" / name.replace("/", "_"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
        told: dict[str, Any] = {"tokenizer": run_json(*TOKENIZER), "prepare": run(*PREPARE)}
        for dtype in DTYPES:
            Path(f"{dtype}.toml").write_text(TOML.format(dtype=dtype))
            told[dtype] = run_json("train", f"{dtype}.toml")
        yield told


def files_of(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_tokenizer_train(said: dict[str, Any]) -> None:
    assert said["tokenizer"]["path"] == "tokenizer.json"
    assert said["tokenizer"]["vocab_size"] == 300
    before = Path("tokenizer.json").read_bytes()
    out, err = both(*TOKENIZER)
    assert out == "", "what is said without --json is for the person"
    assert "next: pocketlm train" in err
    assert Path("tokenizer.json").read_bytes() == before


def test_data_prepare_and_show(said: dict[str, Any]) -> None:
    assert said["prepare"] == "data/own\n"
    described = run_json("data", "show", "data/own")
    texts = [path.read_bytes() for path in sorted(Path("text").iterdir())]
    assert described["train"]["text_bytes"] + described["val"]["text_bytes"] == sum(map(len, texts))
    assert described["vocab_size"] == 300
    assert described["samples"][0].encode() == texts[0]
    shown = run("data", "show", "data/own")
    assert f"{described['train']['tokens']:,}" in shown
    assert described["samples"][0] in shown


@pytest.mark.parametrize("dtype", DTYPES)
def test_train_keeps_a_journal_and_sums_it_up(dtype: str, said: dict[str, Any]) -> None:
    records = Journal.read(Path("runs", dtype, "metrics.jsonl"))
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 21))
    last = {record["kind"]: record for record in records}
    summary = said[dtype]
    assert (summary["run"], summary["step"], summary["tokens"]) == (f"runs/{dtype}", 20, 20 * 256)
    assert (summary["loss"], summary["val_loss"]) == (last["train"]["loss"], last["eval"]["loss"])
    assert summary["bits_per_byte"] == last["eval"]["bits_per_byte"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_eval_gives_exactly_what_training_measured_last(dtype: str) -> None:
    records = Journal.read(Path("runs", dtype, "metrics.jsonl"))
    measured = [record for record in records if record["kind"] == "eval"][-1]
    evaluated = run_json("eval", f"runs/{dtype}", "--data", "data/own")
    assert evaluated["dtype"] == dtype
    assert evaluated["model"] == f"runs/{dtype}/checkpoints/step-00000020"
    for name in ("loss", "bits_per_byte", "bits_per_byte_with_special", "perplexity", "tokens", "bytes"):
        assert evaluated[name] == measured[name], name
    assert f"{evaluated['loss']:.4f}\n" in run("eval", f"runs/{dtype}", "--data", "data/own")

    other = run_json("eval", f"runs/{dtype}", "--data", "data/own", "--dtype", "fp32" if dtype == "bf16" else "bf16")
    assert other["loss"] != evaluated["loss"], "the precision is part of the measurement"
    assert other["loss"] == pytest.approx(evaluated["loss"], abs=0.02)


def test_eval_finds_what_was_held_out_of_its_own_data() -> None:
    named, found = (run_json("eval", "runs/fp32", *data) for data in (["--data", "data/own"], []))
    assert found == named
    assert found["data"] == "data/own"
    _, err = both("eval", "runs/fp32")
    assert "on data/own in fp32" in err
    assert "remembers" not in err


def test_eval_computes_where_training_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.machine.default_device", lambda wanted: torch.device("meta"))
    monkeypatch.setattr(
        "pocketlm.evaluate.loss.evaluate_stream",
        lambda model, *_, **__: pytest.fail("the model was not moved") if model.head.device.type != "meta" else FIGURES,
    )
    assert run_json("eval", "runs/fp32")["tokens"] == FIGURES.tokens


def test_eval_says_when_the_text_is_what_the_model_was_trained_on() -> None:
    own = both("eval", "runs/fp32", "--data", "files:text/*.py")[1]
    assert "was trained on files:text/*.py: this is how it remembers" in own
    assert "remembers" not in both("eval", "runs/fp32", "--data", "files:text/config.py")[1]


def test_fields_may_stand_before_what_they_change() -> None:
    after = run_json("sizes", "debug", "--model.hidden-size", "64")
    for fields in ("--model.hidden-size 64", "--model.hidden-size=64", "--name x --model.hidden-size=64"):
        assert run_json("sizes", *fields.split(), "debug") == after
    _, err = both("train", "--train.log-every", "3", "fp32.toml", "--name", "fp32")
    assert "runs/fp32 is complete" in err


def test_train_again_says_that_the_run_is_complete() -> None:
    before = files_of("runs/fp32")
    out, err = both("train", "fp32.toml")
    assert (out, "runs/fp32 is complete: step 20 of 20" in err) == ("", True)
    assert files_of("runs/fp32") == before


def test_generate_puts_the_completion_on_stdout_and_nothing_else() -> None:
    completion, err = both(*GENERATE)
    assert completion
    assert completion not in err
    told = run_json(*GENERATE)
    assert (told["prompt"], told["completion"], told["seed"]) == ("def ", completion, 3)
    assert told["model"] == "runs/fp32/checkpoints/step-00000020"
    assert pocketlm.load("runs/fp32").generate("def ", max_new_tokens=40, seed=3) == completion
    greedy = ("generate", "runs/fp32", "--prompt", "def ", "--temperature", "0")
    assert run(*greedy) == run(*greedy, "--seed", "9")


def test_generate_as_a_process() -> None:
    done = subprocess.run([sys.executable, "-m", "pocketlm.cli.main", *GENERATE], capture_output=True, check=True)
    assert done.stdout == run(*GENERATE).encode()
    assert done.stderr.count(b"\n") == 1
    assert b"seed 3" in done.stderr


def test_verify() -> None:
    assert run("verify", "runs/fp32").count(": whole\n") == 4, "two settings, two checkpoints"
    assert run_json("verify", "data/own")["whole"] is True
    told = run_json("verify", "runs/fp32/checkpoints/step-00000020")
    assert told["whole"] is True
    assert [part["problem"] for part in told["parts"]] == [None]


def test_sizes_of_a_run_are_those_of_its_tensors() -> None:
    told = run_json("sizes", "runs/fp32")
    weights = list(pocketlm.load("runs/fp32").model.parameters())
    assert told["parameters"] == sum(weight.numel() for weight in weights)
    assert told["parameters"] == run_json("sizes", "fp32.toml")["parameters"]
    assert told["training_memory_bytes"]["weights"] == sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize(
    ("preset", "total", "embeddings"),
    [
        ("smallm", 20_535_808, 50_257 * 256 + 256 * 256),  # tokens and positions
        ("smollm2-135m", 134_515_008, 49_152 * 576),
        ("smollm2-360m", 361_821_120, 49_152 * 960),
        ("smollm2-1.7b", 1_711_376_384, 49_152 * 2_048),
    ],
)
def test_sizes_of_the_presets(preset: str, total: int, embeddings: int) -> None:
    told = run_json("sizes", preset)
    assert (told["parameters"], told["non_embedding_parameters"]) == (total, total - embeddings)
    assert sum(told["parameters_by_part"].values()) == total
    shown = run("sizes", preset)
    for number in (total, total - embeddings, round(told["flops_per_token"])):
        assert f" {number:,}\n" in shown
