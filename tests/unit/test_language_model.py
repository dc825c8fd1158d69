"""Text streaming, stop strings and options over a tiny random model with the byte tokenizer; then the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocketlm import language_model as module
from pocketlm.cli import chat
from pocketlm.cli import generate as cli
from pocketlm.config import InitConfig, ModelConfig, SampleConfig
from pocketlm.errors import DataError, FileError, UsageError
from pocketlm.formats.release import Release
from pocketlm.generate.sampling import Sampling
from pocketlm.language_model import Completion, LanguageModel, StopStrings, load
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer
from pocketlm.text.tokenizer import TextStream, byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**options: object) -> LanguageModel:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    config = ModelConfig(vocab_size=260, max_position_embeddings=16, tie_word_embeddings=False, **shape)
    model = Transformer(config)
    init_weights(model, InitConfig(std=0.5), seed=0)
    return LanguageModel(model.eval(), TOKENIZER, **options)  # type: ignore[arg-type]


def completion(text: str, stop: str | Sequence[str] = (), *, ended: bool = False) -> Completion:
    """A completion whose tokens are the bytes of `text`."""
    ids = [*text.encode(), *([TOKENIZER.end_id] if ended else [])]
    return Completion(iter(ids), TextStream(TOKENIZER), StopStrings(stop), {TOKENIZER.end_id}, seed=0)


# --- stop strings


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    cutter = StopStrings(stops)
    given = [cutter.feed(piece) for piece in pieces]
    return "".join(given) + cutter.flush(), cutter.found


def cut_by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """One character more at a time, until the text ends with a stop string; the longest of them is taken off."""
    for end in range(1, len(text) + 1):
        if matching := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, matching))], True
    return text, False


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_by_definition_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    assert cut(pieces, stops) == cut_by_definition("".join(pieces), stops)


def test_a_stop_string_that_straddles_pieces() -> None:
    assert cut(["one EN", "D", " two"], ["END"]) == ("one ", True)


def test_what_only_began_like_a_stop_string_comes_out() -> None:
    cutter = StopStrings(["END"])
    assert [cutter.feed("an E"), cutter.feed("N"), cutter.feed("T"), cutter.feed("E")] == ["an ", "", "ENT", ""]
    assert cutter.flush() == "E"


def test_of_two_that_end_together_the_longer_is_cut() -> None:
    assert cut(["xabc"], ["bc", "abc"]) == ("x", True)


def test_the_one_that_ends_first_is_cut_also_within_one_piece() -> None:
    assert cut(["abcd"], ["abcd", "bc"]) == cut(list("abcd"), ["abcd", "bc"]) == ("a", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["x", ""])


def test_one_string_is_one_stop_string() -> None:
    assert StopStrings("END").stops == ("END",)


# --- pieces of text


def test_characters_come_whole() -> None:
    assert list(completion("aé€😀")) == ["a", "é", "€", "😀"]


def test_a_text_that_ends_inside_a_character_says_so() -> None:
    ids = iter("é".encode()[:1])
    assert list(Completion(ids, TextStream(TOKENIZER), StopStrings(()), {TOKENIZER.end_id}, seed=0)) == ["�"]


def test_a_stop_string_of_many_bytes() -> None:
    text = completion("ab€nd rest", ["€n"])
    assert ("".join(text), text.finish_reason, text.num_tokens) == ("ab", "stop", 6)


@pytest.mark.parametrize(
    ("text", "ended", "reason", "num_tokens"),
    [("ab", False, "length", 2), ("ab", True, "end", 3), ("aX", True, "stop", 2)],
)
def test_how_it_ended(text: str, ended: bool, reason: str, num_tokens: int) -> None:
    pieces = completion(text, ["X"], ended=ended)
    next(pieces)
    assert pieces.finish_reason is None
    list(pieces)
    assert (pieces.finish_reason, pieces.num_tokens) == (reason, num_tokens)


def test_what_was_held_back_is_given_at_the_end() -> None:
    assert "".join(completion("abX", ["XYZ"], ended=True)) == "abX"


# --- the model


def test_generate_is_the_stream_joined() -> None:
    model = tiny()
    for seed in range(3):
        assert model.generate("ab", seed=seed, max_new_tokens=30) == "".join(
            model.stream("ab", seed=seed, max_new_tokens=30)
        )


def test_the_seed_that_is_told_repeats_a_completion() -> None:
    model = tiny()
    first = model.stream("ab", max_new_tokens=30)
    text = "".join(first)
    assert model.generate("ab", max_new_tokens=30, seed=first.seed) == text
    assert model.generate("ab", max_new_tokens=30, seed=first.seed + 1) != text


def test_options_replace_the_models_own_sampling() -> None:
    greedy = tiny(sampling=Sampling(temperature=0))
    assert greedy.generate("ab", seed=1) == greedy.generate("ab", seed=2)
    assert greedy.generate("ab", seed=1) == tiny().generate("ab", temperature=0)
    assert greedy.generate("ab", seed=1) == tiny().generate("ab", top_k=1, seed=5)
    assert greedy.generate("ab", temperature=1.0, seed=1) != greedy.generate("ab", temperature=1.0, seed=2)


def test_a_stop_string_ends_the_text_before_it() -> None:
    model = tiny(sampling=Sampling(temperature=0))
    text = model.generate("ab", max_new_tokens=40)
    stop = text[5:8]
    assert model.generate("ab", max_new_tokens=40, stop=[stop]) == text[: text.index(stop)]


def test_an_empty_prompt_begins_after_the_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    monkeypatch.setattr(module.engine, "generate", lambda model, ids, *_, **__: prompts.append(ids) or iter(()))
    tiny().stream("")
    tiny().stream("<|endoftext|>")
    assert prompts == [[TOKENIZER.end_id], list(b"<|endoftext|>")]


def test_only_the_tokenizers_ids_are_chosen() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.lm_head.weight[257:] *= 1000  # rows beyond the tokenizer's 257 ids
    pieces = model.stream("ab", max_new_tokens=50, seed=0)
    assert "".join(pieces)  # an id without bytes would fail here
    assert pieces.num_tokens > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: allowed is 1 or more"),
        ({"seed": -1}, "seed -1: allowed"),
        ({"window": "half"}, "window 'half': allowed is halves or exact"),
        ({"temperature": -1}, "temperature -1: allowed"),
        ({"stop": [""]}, "stop string is empty"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_generated(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny().stream("ab", **options)  # type: ignore[arg-type]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match="surrogate"):
        tiny().stream("\udcff")


def test_the_window_is_passed_on() -> None:
    model = tiny(sampling=Sampling(temperature=0))
    halves, exact = (model.generate("ab", max_new_tokens=60, window=rule) for rule in ("halves", "exact"))
    assert halves[:12] == exact[:12]
    assert halves != exact


# --- loading


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a checkpoint; its model is tiny()."""
    monkeypatch.setattr(module, "find_checkpoint", lambda path, warn: path)
    monkeypatch.setattr(module, "newest_run", lambda: tmp_path)
    sample, model = SampleConfig(temperature=0.5, top_k=7, top_p=0.9), tiny().model
    release = Release(model.config, model.state_dict(), TOKENIZER, sample)
    monkeypatch.setattr(module, "read_release", lambda path: release)
    return tmp_path


def test_load_takes_the_sampling_of_the_folder(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.sampling == Sampling(temperature=0.5, top_k=7, top_p=0.9)
    assert loaded.folder == load(str(folder)).folder == load().folder == folder
    assert loaded.model.head.dtype == torch.float32


def test_load_in_bf16(folder: Path) -> None:
    loaded = load(folder, dtype="bf16")
    assert loaded.model.head.dtype == torch.bfloat16
    pieces = loaded.stream("ab", max_new_tokens=20, seed=0)
    assert "".join(pieces)
    assert pieces.num_tokens == 20


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_load_takes_the_device_there_is(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "default_device", lambda wanted: torch.device("meta"))
    loaded = load(folder, dtype=dtype)  # type: ignore[arg-type]
    assert loaded.device.type == "meta"
    assert loaded.model.head.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


def test_load_refuses_a_dtype_it_has_not(folder: Path) -> None:
    with pytest.raises(UsageError, match="dtype 'fp8': allowed is auto, fp32, bf16"):
        load(folder, dtype="fp8")  # type: ignore[arg-type]


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        load(tmp_path / "nothing")


@torch.no_grad()
def test_any_of_several_ids_ends_a_text() -> None:
    greedy = Sampling(temperature=0)
    first = int(tiny().model(torch.tensor([TOKENIZER.encode("ab")]))[0, -1, : TOKENIZER.vocab_size].argmax())
    assert first != TOKENIZER.end_id
    text = tiny(sampling=greedy, other_end_ids=frozenset({first})).stream("ab")
    assert ("".join(text), text.finish_reason, text.num_tokens) == ("", "end", 1)


# --- pocketlm generate


@pytest.mark.usefixtures("folder")
def test_stdout_is_the_completion_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--prompt", "ab", "--max-new-tokens", "20", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == load().generate("ab", max_new_tokens=20, seed=3)
    assert "20 tokens (length)" in err
    assert "seed 3" in err


def test_json_is_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--prompt ab --max-new-tokens 9 --temperature 0 --repetition-penalty 1.2 --repetition-rule count --json"
    assert cli.run([str(folder), *flags.split()]) == 0
    result = json.loads(capsys.readouterr().out)
    options = {"temperature": 0.0, "repetition_penalty": 1.2, "repetition_rule": "count"}
    assert result.pop("completion") == load().generate("ab", max_new_tokens=9, **options)
    assert result.pop("tokens_per_s") > 0
    assert isinstance(result.pop("seed"), int)
    assert result == {"prompt": "ab", "tokens": 9, "finish_reason": "length", "model": str(folder)}


@pytest.mark.usefixtures("folder")
def test_stop_may_be_given_several_times(capsys: pytest.CaptureFixture[str]) -> None:
    whole = load().generate("ab", temperature=0)
    stops = [whole[9:12], whole[5:8]]
    cli.run(["--prompt", "ab", "--temperature", "0", "--stop", stops[0], "--stop", stops[1]])
    assert capsys.readouterr().out == cut([whole], stops)[0]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--prompt"),
        (["--prompt", "ab", "--temprature", "1"], "did you mean --temperature"),
        (["--prompt", "ab", "--temp", "1"], "cannot place"),
        (["--prompt", "ab", "--top-k", "few"], "--top-k.*'few'"),
        (["--prompt", "ab", "--top-p", "2"], "top_p 2.0: allowed"),
        (["--prompt", "ab", "--window", "half"], "--window.*halves"),
    ],
)
def test_bad_words_are_answered_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        cli.run(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("folder")
def test_each_piece_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.StringIO):
        seen: list[str] = []

        def flush(self) -> None:
            self.seen.append(self.getvalue())

    monkeypatch.setattr("sys.stdout", Pipe())
    cli.run(["--prompt", "ab", "--max-new-tokens", "30", "--seed", "0"])
    assert len(set(Pipe.seen)) > 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdout", "expected"), [(Terminal(), "a\ufffd[31mb\n    c"), (io.StringIO(), "a\x1b[31mb\n\tc")]
)
def test_a_terminal_gets_no_escape_from_a_model(
    stdout: io.StringIO, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", stdout)
    assert cli._print_pieces(completion("a\x1b[31mb\n\tc")) == "a\x1b[31mb\n\tc"
    assert stdout.getvalue() == expected
    stdout.seek(0)
    for piece in completion("a\x1b[31mb\n\tc"):
        chat._show(piece)
    assert stdout.getvalue() == expected


def test_the_help_tells_the_true_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.run(["--help"])
    assert f"default: {module.DEFAULT_NEW_TOKENS}" in capsys.readouterr().out
