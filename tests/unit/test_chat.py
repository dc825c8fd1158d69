"""The chat: `take` line by line as the pure function it is, `talk` with its input and output passed in."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pocketlm.cli import chat
from pocketlm.cli.chat import Session, take, talk
from pocketlm.errors import DataError, UsageError
from pocketlm.generate.sampling import Sampling

SESSION = Session(Sampling(temperature=0.7, top_k=50))
TALK = Session(SESSION.sampling, messages=())
HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}


@dataclass
class Answer:
    """Stands for a completion: pieces, of which one may be Ctrl-C."""

    pieces: Iterator[Any]
    finish_reason: str | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield piece
        self.finish_reason = "length"


@dataclass
class Model:
    """Answers with the given pieces and remembers what it was asked."""

    answers: list[list[Any]]
    asked: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    folder: Path = Path("runs/x")
    chat_template: object = None
    sampling: Sampling = SESSION.sampling

    def stream(self, prompt: str, **options: Any) -> Answer:
        if "\udcff" in prompt:
            raise DataError("half a character")
        self.asked.append((prompt, options))
        return Answer(iter(self.answers.pop(0)))

    def reply(self, messages: list[dict[str, str]], **options: Any) -> Answer:
        if messages[-1]["content"] == "refuse":
            raise DataError("the template refuses")
        self.asked.append((messages, options))
        return Answer(iter(self.answers.pop(0)))


def converse(model: Model, lines: list[Any], session: Session = SESSION) -> tuple[Session, str]:
    """What talk() comes to and what it shows, for lines of which some may be Ctrl-C."""
    rest, shown = iter(lines), []

    def read() -> str:
        line = next(rest, EOFError)
        if isinstance(line, type):
            raise line
        return str(line)

    return talk(model, session, read, shown.append), "".join(shown)  # type: ignore[arg-type]


# --- one line


def test_a_line_is_continued_as_it_stands() -> None:
    turn = take(SESSION, "Once upon a time")
    assert turn.complete
    assert turn.session.text == "Once upon a time"


def test_the_next_line_becomes_the_next_line_of_the_text() -> None:
    assert take(Session(Sampling(), text="One."), "Two").session.text == "One.\nTwo"
    assert take(Session(Sampling(), text="One.\n"), "Two").session.text == "One.\nTwo"


def test_an_empty_line_goes_on_where_there_is_something() -> None:
    turn = take(Session(Sampling(), text="One."), "")
    assert (turn.complete, turn.session.text) == (True, "One.")
    turn = take(SESSION, "  ")
    assert not turn.complete
    assert "beginning of a text" in turn.reply


def test_a_line_that_begins_with_a_space_is_text() -> None:
    assert take(SESSION, " /exit").session.text == " /exit"


def test_help_names_every_command() -> None:
    assert all(command in take(SESSION, "/help").reply for command in ("/help", "/clear", "/set", "/exit"))


def test_clear_forgets_the_text_and_keeps_the_settings() -> None:
    assert take(Session(SESSION.sampling, 9, "text"), "/clear").session == Session(SESSION.sampling, 9, "")


def test_a_line_is_a_message_where_the_model_answers() -> None:
    turn = take(replace(TALK, messages=(HI, YES)), " /and now?")
    assert turn.complete
    assert turn.session.messages == (HI, YES, {"role": "user", "content": " /and now?"})
    turn = take(TALK, "  ")
    assert (turn.complete, turn.session, turn.reply) == (False, TALK, "type a message; /help lists the commands")


def test_the_system_message_stays_when_all_else_is_forgotten() -> None:
    session = take(replace(TALK, messages=(HI, YES)), "/system  Be brief.  Now.").session
    assert session == replace(TALK, messages=(HI, YES), system="Be brief.  Now.")
    assert take(session, "/clear").session == replace(TALK, system="Be brief.  Now.")
    assert take(session, "/system").reply == "the system message is: Be brief.  Now."
    assert take(TALK, "/system").reply == "there is no system message"


def test_exit_leaves() -> None:
    assert take(SESSION, "/exit").leave


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "no command /hlep; did you mean /help?"),
        ("/quit", "no command /quit; did you mean /exit?"),
        ("/load", "no command /load; commands: /help, /clear, /system, /set, /exit"),
        ("/system Be brief.", "a text that is completed has no system message; type what it begins with"),
        ("/", "no command /; commands: "),
        ("/clear all", "/clear takes nothing after it"),
        ("/set temprature 1", "no setting 'temprature'; did you mean temperature?"),
        ("/set humour 1", "no setting 'humour'; settings: max_new_tokens, temperature, "),
        ("/set temperature hot", "temperature 'hot': allowed is a number"),
        ("/set top_k 1.5", "top_k '1.5': allowed is a whole number"),
        ("/set temperature -1", "temperature -1.0: allowed is 0"),
        ("/set repetition_rule seed", "repetition_rule 'seed': allowed is ctrl or count"),
        ("/set max_new_tokens 0", "max_new_tokens 0: allowed is 1 or more"),
    ],
)
def test_a_refusal_is_one_line_with_what_to_type(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        take(SESSION, line)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.9", "temperature", 0.9),
        ("/set temperature 0", "temperature", 0),
        ("/set top-k 3", "top_k", 3),
        ("/set top_p 0.5", "top_p", 0.5),
        ("/set min_p 0.1", "min_p", 0.1),
        ("/set repetition_penalty 1.2", "repetition_penalty", 1.2),
        ("/set repetition_rule count", "repetition_rule", "count"),
        ("/set repetition_window 9", "repetition_window", 9),
    ],
)
def test_set_changes_one_field(line: str, name: str, value: object) -> None:
    turn = take(SESSION, line)
    assert getattr(turn.session.sampling, name) == value
    assert turn.reply.startswith(f"{name} is now ")


def test_set_takes_fractions_after_a_whole_number() -> None:
    assert take(Session(Sampling(temperature=0)), "/set temperature 0.5").session.sampling.temperature == 0.5


def test_set_max_new_tokens() -> None:
    assert SESSION.max_new_tokens == 10_240
    assert take(SESSION, "/set max_new_tokens 7").session.max_new_tokens == 7


def test_set_without_a_value_shows() -> None:
    assert "10240" in take(SESSION, "/set").reply
    assert take(SESSION, "/set top_k").reply.startswith("top_k is 50;")


# --- the loop


def test_history_is_what_both_wrote() -> None:
    model = Model([[" there", " was."], [" The end."]])
    session, shown = converse(model, ["Once", "Then", "/exit", "never read"])
    assert [prompt for prompt, _ in model.asked] == ["Once", "Once there was.\nThen"]
    assert session.text == "Once there was.\nThen The end."
    assert " there was.\n[max_new_tokens reached" in shown


def test_history_is_messages_where_the_model_answers() -> None:
    model = Model([["Y", "es."], ["No", KeyboardInterrupt], ["."]])
    lines = ["Hi", "/system Be brief.", "refuse", "And?", "/set top_k 3", "/clear", "Hi"]
    session, shown = converse(model, lines, TALK)
    brief = {"role": "system", "content": "Be brief."}
    assert [messages for messages, _ in model.asked] == [
        [HI],
        [brief, HI, YES, {"role": "user", "content": "And?"}],
        [brief, HI],
    ]
    assert model.asked[2][1] == {"max_new_tokens": 10_240, **asdict(replace(SESSION.sampling, top_k=3))}
    assert session.messages == (HI, {"role": "assistant", "content": "."})
    assert "Yes.\n[max_new_tokens reached]\n" in shown
    assert "the template refuses\n" in shown
    assert "No\n[stopped]\n" in shown


def test_settings_reach_the_model() -> None:
    model = Model([["x"]])
    converse(model, ["/set temperature 0.9", "/set max_new_tokens 5", "Once"])
    options = model.asked[0][1]
    assert (options["temperature"], options["top_k"], options["max_new_tokens"]) == (0.9, 50, 5)


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    model = Model([[" there", KeyboardInterrupt, " never"], [" was."]])
    session, shown = converse(model, ["Once", ""])
    assert session.text == "Once there was."
    assert " there\n[stopped; an empty line goes on]" in shown
    assert "never" not in shown


def test_ctrl_c_at_the_prompt_drops_the_line_only() -> None:
    model = Model([["."]])
    assert converse(model, [KeyboardInterrupt, "Once"])[0].text == "Once."


def test_the_end_of_the_input_leaves() -> None:
    assert converse(Model([]), [])[0] == SESSION


def test_refusals_lose_nothing() -> None:
    model = Model([[" a"], [" b"]])
    session, shown = converse(model, ["One", "/hlep", "/set top_p 7", "bad \udcff", ""])
    assert session.text == "One a b"
    assert "did you mean /help?" in shown
    assert "top_p 7.0: allowed" in shown
    assert "half a character" in shown


def test_a_base_model_is_called_one() -> None:
    assert "base model" in chat.introduction(Model([]))  # type: ignore[arg-type]
    templated = Model([], chat_template="{{ messages }}")
    assert "It answers" in chat.introduction(templated)  # type: ignore[arg-type]
    assert "continued as it stands" in chat.introduction(templated, plain=True)  # type: ignore[arg-type]


def test_who_has_a_template_answers_unless_told_otherwise() -> None:
    base, templated = Model([]), Model([], chat_template="{{ messages }}")
    assert chat.first_session(base) == SESSION  # type: ignore[arg-type]
    assert chat.first_session(templated, system="x") == replace(TALK, system="x")  # type: ignore[arg-type]
    assert chat.first_session(templated, plain=True) == SESSION  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="runs/x has no chat template: a system message has no place"):
        chat.first_session(base, system="x")  # type: ignore[arg-type]


def test_the_verb_reads_from_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pocketlm import language_model

    model = Model([[" there was."]])
    monkeypatch.setattr(language_model, "load", lambda path, device, warn: model)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Once \xff\n/help\n/exit\n"), encoding="utf-8"))
    assert chat.run([]) == 0
    out, err = capsys.readouterr()
    assert model.asked[0][0] == "Once �"
    assert out.startswith(" there was.\n")
    assert "/clear" in out
    assert "base model" in err
