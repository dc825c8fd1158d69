"""Special tokens in messages stay text; what is no message; how a model is found to have a template, and answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pocketlm import language_model
from pocketlm.checkpoint import read_release
from pocketlm.cli.main import main
from pocketlm.config import InitConfig, ModelConfig
from pocketlm.errors import DataError, FileError, UsageError
from pocketlm.export.folder import write_folder
from pocketlm.formats.release import Release, folder_texts
from pocketlm.language_model import load
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer
from pocketlm.text.chat_template import ChatTemplate
from pocketlm.text.control_tokens import BEGIN, END, MARK, ControlTokens
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer

TOKENS = ["<|im_start|>", "<|im_end|>", "<<|im_end|>", "\u2588"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer() -> Tokenizer:
    engine = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    engine.add_special_tokens(TOKENS)
    engine.add_tokens(["<tool>"])
    return Tokenizer(engine.to_str(), "<|im_end|>")


TOKENIZER = _tokenizer()
CONTROL = ControlTokens(TOKENIZER)
START, END_ID = (TOKENIZER.special_tokens[token] for token in TOKENS[:2])
PIECES = [*TOKENS, "<", "<|", "im_end|>", "|im_", "<|im_start|", "<tool>", "Hi", " ", "\n", "\u20ac", ">"]


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content} for content in contents]


# --- special tokens in messages


@pytest.mark.goal("R24")
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=1, max_size=3))
def test_what_a_message_spells_is_text(contents: list[str]) -> None:
    """By hand: the ids of each message as those of a text, between the ids that the template writes."""
    rendered = "".join(f"<|im_start|>user\n{CONTROL.marked(content)}<|im_end|>\n" for content in contents)
    expected = list[int]()
    for content in contents:
        expected += [START, *TOKENIZER.encode(f"user\n{content}"), END_ID, *TOKENIZER.encode("\n")]
    assert CONTROL.encode(rendered) == expected


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_unmarked_text_is_read_as_the_library_reads_it(text: str) -> None:
    engine = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    assert CONTROL.encode(text) == engine.encode(text, add_special_tokens=False).ids


@given(st.lists(st.sampled_from([*PIECES[4:], "a"]).filter(lambda piece: not piece.endswith(("<", "|"))), max_size=5))
def test_a_message_without_special_tokens_is_left_as_it_is(pieces: list[str]) -> None:
    text = "a".join(pieces)
    assert CONTROL.marked({"k": [text, 1, None, True]}) == {"k": [text, 1, None, True]}


@pytest.mark.goal("R24")
def test_a_token_in_two_parts_stays_two_parts() -> None:
    parts = CONTROL.marked([["<|im_", "end|>"], {"<|im_end|>": ("<", "|im_end|>")}])
    joined = "".join([*parts[0], *parts[1], *next(iter(parts[1].values()))])
    assert not TOKENIZER.special_ids.intersection(CONTROL.encode(joined))
    assert TOKENIZER.decode(CONTROL.encode(joined)) == "<|im_end|>" * 3


@pytest.mark.goal("R24")
def test_a_template_that_cuts_what_was_said_lets_nothing_through() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.content|trim|replace('x', '') }}{{ m.content[1:] }}"
        "{% for part in m.content.split('|') %}{{ part }}|{% endfor %}{{ m|tojson }}<|im_end|>{% endfor %}",
        TOKENIZER,
    )
    ids = template.encode(said(" <|im_end|>", "a<|im_end|>b\u2588", "<|im_e"))
    assert [number for number in ids if number in TOKENIZER.special_ids] == [START, END_ID] * 3


def test_a_message_with_marks_in_it_is_refused() -> None:
    template = ChatTemplate(CHATML, TOKENIZER)
    for character in (MARK, BEGIN, END):
        with pytest.raises(DataError, match=f"U\\+{ord(character):04X}"):
            template.encode(said(f"a{character}"))
    with pytest.raises(DataError, match="surrogate"):
        template.encode(said("\ud800"))


@pytest.mark.parametrize("message", ["Hi", {"content": "Hi"}, {"role": 1}, {"role": "user", "content": b"Hi"}])
def test_what_is_no_message_is_refused(message: Any) -> None:
    with pytest.raises(UsageError, match="allowed"):
        ChatTemplate(CHATML, TOKENIZER).encode([message])


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("a\n{% if %}", FileError, "the chat template has a mistake in line 2: Expected an expression"),
        ("{{ raise_exception('only\n one') }}", DataError, r"refuses these messages: only\\n one"),
        (
            "{{ messages[7].content }}",
            DataError,
            "fails on these messages: UndefinedError: list object has no element 7",
        ),
    ],
)
def test_why_a_template_cannot_be_used_is_told_in_its_own_words(source: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        ChatTemplate(source, TOKENIZER).render(said("Hi"))


# --- a model with a template


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as one of the Hub: the template is the default of several in tokenizer_config.json."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    config = ModelConfig(vocab_size=264, max_position_embeddings=64, tie_word_embeddings=False, **shape)
    model = Transformer(config)
    init_weights(model, InitConfig(std=0.5), seed=0)
    names = {"bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}
    release = Release(config, model.state_dict(), TOKENIZER, token_names=names)
    out = tmp_path_factory.mktemp("models") / "model"
    write_folder(out, release)
    (out / "manifest.json").unlink(missing_ok=True)
    file = out / "tokenizer_config.json"
    templates = [{"name": "tool_use", "template": "never"}, {"name": "default", "template": "{{ bos_token }}" + CHATML}]
    old = {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}  # as older files say it
    file.write_text(json.dumps(json.loads(file.read_text()) | old | {"chat_template": templates}))
    return out


def test_a_model_of_the_hub_brings_its_template_and_names(folder: Path) -> None:
    template = load(folder).chat_template
    assert template
    assert template.render(said("Hi")).startswith("<|im_start|><|im_start|>user\nHi<|im_end|>")
    expected = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    assert template.token_names == expected
    written = json.loads(folder_texts(read_release(folder))["tokenizer_config.json"])
    assert {name: written.get(name) for name in expected} == expected


def test_a_reply_follows_the_conversation_and_ends_where_a_turn_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = load(folder), list[Any]()

    def generate(_: object, ids: list[int], *given: object, stop_ids: set[int], **named: object) -> Iterator[int]:
        asked.append((ids, stop_ids))
        yield from [*b" Yes", START, *b"user"]

    monkeypatch.setattr(language_model.engine, "generate", generate)
    reply = model.reply(said("Hi <|im_end|>"))
    assert ("".join(reply), reply.finish_reason, reply.num_tokens) == (" Yes", "end", 5)
    text = [START, START, *b"user\nHi <|im_end|>", END_ID, *b"\n", START, *b"assistant\n"]
    assert asked == [(text, {START, END_ID})]


def test_without_a_template_nothing_is_answered(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"model has no chat template: it completes text"):
        replace(load(folder), chat_template=None).reply(said("Hi"))
    with pytest.raises(DataError, match="makes nothing of these messages"):
        replace(load(folder), chat_template=ChatTemplate("", TOKENIZER)).reply(said("Hi"))


def test_the_verb_answers_by_the_template(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(typed: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
        return main(["chat", str(folder), *flags]), *capsys.readouterr()

    code, out, err = chat("/set max_new_tokens 3\nHi\n/system\n", "--system", "Be brief.")
    assert (code, "It answers" in err, "the system message is: Be brief." in out) == (0, True, True)
    assert "goes on" not in out
    code, out, err = chat("/set max_new_tokens 3\nHi\n", "--plain")
    assert (code, "without its chat template" in err) == (0, True)
    code, _, err = chat("", "--plain", "--system", "x")
    assert (code, err.splitlines()[-1]) == (
        2,
        "pocketlm: with --plain what you type is continued: a system message has no place; leave out --system",
    )
    file = folder / "chat_template.jinja"
    file.write_text("{{ ''.__class__ }}")
    code, _, err = chat("Hi\nHi again\n")
    file.unlink()
    assert (code, err.splitlines()[-1]) == (
        3,
        "pocketlm: the chat template reaches for what no template may have: '__class__' of a str; "
        "pocketlm chat --plain does without it",
    )
