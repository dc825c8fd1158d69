"""What is loaded before a command is understood, and whether the help of `train` tells the truth.

Modules are counted in a process of their own, after the command has been answered; seconds are not asserted.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from typing import Any, get_args

import pytest

from pocketlm.cli.fields import parse_overrides
from pocketlm.cli.main import VERBS, main
from pocketlm.config import FIELDS, Config

HEAVY = {"torch", "numpy", "pydantic", "tokenizers", "pyarrow", "huggingface_hub", "tiktoken", "rich", "tyro", "jinja2"}
ANSWERED = """
import contextlib, io, json, sys
from pocketlm.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
        code = main(json.loads(sys.argv[1]))
    except SystemExit as end:  # how argparse ends after --help
        code = end.code
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def modules_after(*words: str) -> tuple[int, set[str]]:
    """The exit code of a command, and the top-level modules that its process had loaded at the end."""
    code, names = json.loads(subprocess.check_output([sys.executable, "-c", ANSWERED, json.dumps(words)]))
    return code, set(names)


@pytest.mark.goal("R29")
@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--version"], 0), (["trian"], 2), ([], 2)])
def test_words_without_a_verb_are_answered_before_anything_heavy_is_loaded(words: list[str], code: int) -> None:
    answered, names = modules_after(*words)
    assert answered == code
    assert names & HEAVY == set()
    assert "pocketlm" in names


@pytest.mark.goal("R29")
def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import pocketlm, sys, json; print(json.dumps(sorted(sys.modules)))"
    names = set(json.loads(subprocess.check_output([sys.executable, "-c", program])))
    assert names & HEAVY == set()
    assert "pocketlm.config" not in names


@pytest.mark.goal("R29")
@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_loads_no_torch(verb: str) -> None:
    code, names = modules_after(verb, "--help")
    assert code == 0
    assert names & {"torch", "numpy", "tokenizers", "pyarrow", "jinja2"} == set()


def test_a_wrong_configuration_is_refused_before_torch_is_loaded() -> None:
    code, names = modules_after("train", "debug", "--optim.lr", "-1")
    assert code == 2
    assert "torch" not in names


# --- the help of train


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def shown_fields(text: str) -> dict[str, str]:
    """Every `--section.field KIND ... (default: VALUE)` of a help, as flag to value."""
    entries = re.split(r"\n  (?=--)", re.split(r"\n\n(?=presets:)", text)[0])
    flat = [" ".join(entry.split("\n\n")[0].split()) for entry in entries]
    found = (re.fullmatch(r"(--[a-z0-9.-]+) .*\(default: (.*)\)", entry) for entry in flat)
    return {match[1]: match[2] for match in found if match and match[1] != "--out"}


@pytest.mark.parametrize("preset", [[], ["debug"], ["smollm2-135m-official"]])
def test_help_shows_every_field_once_and_each_default_can_be_typed_back(
    preset: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # so that no value is broken over two lines
    text = help_of(capsys, "train", *preset)
    shown = shown_fields(text)
    assert [flag[2:].replace("-", "_") for flag in sorted(shown)] == sorted(FIELDS)
    for flag in shown:
        assert text.count(f"\n  {flag} ") == 1, flag

    typed = shlex.split(" ".join(f"{flag} {value}" for flag, value in shown.items()))
    config = Config.preset(preset[0]) if preset else Config()
    assert Config.build({}, parse_overrides(typed)) == config


def test_help_names_every_choice_of_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "train")
    choices: list[tuple[Any, ...]] = [
        get_args(field.annotation)
        for section in Config.model_fields.values()
        if inspect.isclass(section.annotation) and hasattr(section.annotation, "model_fields")
        for field in section.annotation.model_fields.values()
        if get_args(field.annotation) and all(isinstance(choice, str) for choice in get_args(field.annotation))
    ]
    assert len(choices) >= 8
    for choice in choices:
        assert "|".join(choice) in text, choice


def test_help_has_only_flags_that_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    flags = set(re.findall(r"^  (--[a-z][a-z0-9_.-]*)", help_of(capsys, "train"), flags=re.MULTILINE))
    assert flags > {f"--{name}".replace("_", "-") for name in FIELDS}
    own = {"--out", "--total-steps", "--additional-steps", "--seed", "--determinism", "--device", "--resume", "--json"}
    own |= {"--engine", "--devices", "--nodes", "--rendezvous", "--max-restarts"}
    assert flags - own == {f"--{name}".replace("_", "-") for name in FIELDS}


def test_the_help_lists_every_verb_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z]+) +[a-z]", capsys.readouterr().out, flags=re.MULTILINE)
    assert [verb for verb in listed if verb != "pocketlm"] == list(VERBS)
