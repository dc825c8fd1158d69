"""A configuration comes in from presets, files and flags, goes out as TOML, and reports everything wrong at once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pocketlm.cli.fields import parse_overrides
from pocketlm.config import FIELDS, FREE_FIELDS, Config, DataConfig
from pocketlm.data.pieces import MAX_PIECES
from pocketlm.errors import ConfigError, FileError, UsageError
from pocketlm.toml_trees import preset_names

PRESETS = preset_names().split(", ")


def test_the_presets_of_both_seeds_and_the_demo_are_there() -> None:
    wanted = {"tiny", "smallm", "smollm2-135m", "smollm2-135m-official", "smollm2-360m", "smollm2-1.7b", "debug"}
    assert wanted <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_way_through_toml(name: str) -> None:
    config = Config.preset(name)
    assert config.name == name
    assert Config.build(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize(
    ("name", "documents"),
    [("smallm", 14_900_000), ("smollm2-135m", 39_200_000), ("smollm2-135m-official", 190_200_000)],
)
def test_the_source_of_a_preset_fits_into_a_set(name: str, documents: int) -> None:
    """The numbers of documents are those of the cards of the data sets, rounded up."""
    assert documents <= MAX_PIECES * Config.preset(name).data.piece_documents


def test_a_run_of_the_second_seed_goes_on_with_the_pieces_that_it_began_with() -> None:
    assert Config.preset("smollm2-135m").data.piece_documents == DataConfig().piece_documents == 8192
    assert Config.preset("smollm2-135m-official").data.piece_documents == 65_536


def test_flags_change_fields_and_both_spellings_work() -> None:
    config = Config.preset(
        "tiny",
        parse_overrides(
            ["--optim.lr", "3e-4", "--train.tokens-per-step=512", "--train.micro_batch", "2", "--data.context", "128"]
        ),
    )
    assert config.optim.lr == 3e-4
    assert config.train.tokens_per_step == 512
    assert config.train.micro_batch == 2
    assert config.rows_per_step == 4


def test_lists_and_none_can_be_given_as_flags() -> None:
    config = Config.preset("smallm", parse_overrides(["--sample.prompts", '["a, b", "c"]', "--optim.clip", "none"]))
    assert config.sample.prompts == ("a, b", "c")
    assert config.optim.clip is None


def test_a_file_may_begin_with_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('preset = "debug"\n[optim]\nlr = 0.5\n')
    config = Config.from_toml(path)
    assert (config.name, config.optim.lr) == ("mine", 0.5)
    assert config.model == Config.preset("debug").model


def test_all_problems_come_at_once_each_on_its_line() -> None:
    words = ["--optim.lrr", "3", "--train.total-steps", "x", "--train.dtype", "fp8", "--model.hiden_size", "5"]
    with pytest.raises(ConfigError) as caught:
        Config.preset("tiny", parse_overrides(words))
    problems = caught.value.problems
    assert len(problems) == 4
    text = "\n".join(problems)
    assert "optim.lrr" in text
    assert "--optim.lr" in text
    assert "--model.hidden-size" in text
    assert "train.total_steps: given 'x'" in text
    assert "'fp32'" in text
    assert all("\n" not in problem for problem in problems)


def test_a_flag_without_its_section_is_told_the_section() -> None:
    with pytest.raises(ConfigError, match=r"did you mean --optim\.lr\?"):
        Config.preset("tiny", parse_overrides(["--lr", "1"]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.context", "1024"], "--model.max-position-embeddings 1024"),
        (["--train.tokens-per-step", "1000"], "--train.tokens-per-step 1024"),
        (["--model.num-key-value-heads", "2"], "no multiple"),
        (["--schedule.warmup-steps", "5000"], "schedule.warmup_steps"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.lr", "0"], "optim.lr"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_to_type(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.preset("tiny", parse_overrides(words))
    assert told in str(caught.value)


def test_a_wrong_preset_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean smallm"):
        Config.preset("smalm")


def test_words_that_are_no_flags_are_refused() -> None:
    with pytest.raises(UsageError, match="'loose'"):
        parse_overrides(["loose"])
    with pytest.raises(UsageError, match="needs a value"):
        parse_overrides(["--optim.lr"])


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        Config.from_toml(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="no TOML"):
        Config.from_toml(tmp_path / "broken.toml")


def test_differences_name_what_changes_the_result_and_nothing_else() -> None:
    mine = Config.preset("tiny", {"optim.lr": 0.5, "train.log_every": 3})
    assert mine.differences(Config.preset("tiny")) == ["optim.lr: 0.5, 0.02"]
    assert set(FIELDS) >= FREE_FIELDS
