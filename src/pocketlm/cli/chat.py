"""`pocketlm chat [MODEL]`: talk to a model, or write a text together with it, line by line.

A model with a chat template answers: each line typed is a message, and the history is a list of them. A base model was
never taught to answer, so nothing here dresses it up as if it had been: what is typed is continued, as it stands. The
text so far is the history then; each line typed becomes its next line, and the model goes on from all of it. An empty
line lets it go on without a word.

`take` is the whole behaviour as a pure function of a session and a line; `talk` is the loop around it, with its
reading and writing passed in. This file imports no torch before the command line is understood.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pocketlm.cli.arguments import Parser, add_device, say, shown
from pocketlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from pocketlm.generate.sampling import Sampling
    from pocketlm.language_model import Completion, LanguageModel

HELP = "Talk to a model, or write a text together with one that completes what you type."
DEFAULT_NEW_TOKENS = 10_240

COMMANDS = {
    "/help": "this list",
    "/clear": "forget what was said and begin anew",
    "/system": "show the system message; /system Be brief. changes it",
    "/set": "show the settings; /set temperature 0.9 changes one",
    "/exit": "leave, as does Ctrl-D",
}
GUIDE = """What you type is continued: each line becomes the next line of the text so far, and the model goes on from
all of it. An empty line lets the model go on without a word; Ctrl-C stops it.
A line that begins with a space is text, even with a / after it."""
CHAT_GUIDE = """Each line you type is a message, and the model answers; Ctrl-C stops it.
A line that begins with a space is a message, even with a / after it."""

ENDINGS = {
    "end": "[the model ended its text; /clear begins anew]",
    "length": "[max_new_tokens reached; an empty line goes on]",
    None: "[stopped; an empty line goes on]",
}
CHAT_ENDINGS = {"length": "[max_new_tokens reached]", None: "[stopped]"}


@dataclass(frozen=True)
class Session:
    """All that a conversation is."""

    sampling: Sampling
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    text: str = ""
    """What was typed and what the model wrote, as one text; unused where there are messages."""
    messages: tuple[dict[str, str], ...] | None = None
    """What was said, the system message apart; None of a session that completes a text."""
    system: str = ""
    """What stands before all messages; nothing if empty."""


@dataclass(frozen=True)
class Turn:
    """What a line leads to."""

    session: Session
    reply: str = ""
    """Said to the person, no part of the text."""
    complete: bool = False
    """The model goes on from the session's text, or answers its last message."""
    leave: bool = False


def take(session: Session, line: str) -> Turn:
    """What a typed line does: a command, or text for the model.

    Raises:
        UsageError: a command that does not exist, or a setting that is not allowed.
    """
    if line.startswith("/"):
        return _command(session, line)
    if session.messages is not None:
        if not line.strip():
            return Turn(session, "type a message; /help lists the commands")
        return Turn(replace(session, messages=(*session.messages, _message("user", line))), complete=True)
    if not line.strip():
        hint = "" if session.text else "type the beginning of a text; /help lists the commands"
        return Turn(session, hint, complete=bool(session.text))
    joint = "\n" if session.text and not session.text.endswith("\n") else ""
    return Turn(replace(session, text=session.text + joint + line), complete=True)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _command(session: Session, line: str) -> Turn:
    words, completes = line.split(), session.messages is None
    match words:
        case ["/help"]:
            listed = [f"{name:<9}{meaning}" for name, meaning in COMMANDS.items()]
            return Turn(session, "\n".join([GUIDE if completes else CHAT_GUIDE, *listed]))
        case ["/clear"] if completes:
            return Turn(replace(session, text=""), "the text is empty again")
        case ["/clear"]:
            return Turn(replace(session, messages=()), "nothing was said yet")
        case ["/exit"]:
            return Turn(session, leave=True)
        case ["/system", *_] if completes:
            raise UsageError("a text that is completed has no system message; type what it begins with")
        case ["/system", *_]:
            return _system(session, line.removeprefix("/system").strip())
        case ["/set", *assignment]:
            return _set(session, assignment)
    near = difflib.get_close_matches(words[0], COMMANDS, n=1)
    if near == words[:1]:
        raise UsageError(f"{words[0]} takes nothing after it")
    hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
    raise UsageError(f"no command {words[0]}; {hint}")


def _system(session: Session, text: str) -> Turn:
    if text:
        return Turn(replace(session, system=text), "from the next message on, the model reads this first")
    return Turn(session, f"the system message is: {session.system}" if session.system else "there is no system message")


def _set(session: Session, assignment: list[str]) -> Turn:
    """`/set` shows all settings, `/set NAME` one, `/set NAME VALUE` changes it."""
    settings = _settings(session)
    if not assignment:
        return Turn(session, "\n".join(f"{name:<20}{value}" for name, value in settings.items()))
    name = assignment[0].replace("-", "_")
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=1)
        hint = f"did you mean {near[0]}?" if near else f"settings: {', '.join(settings)}"
        raise UsageError(f"no setting {assignment[0]!r}; {hint}")
    if len(assignment) != 2:
        return Turn(session, f"{name} is {settings[name]}; /set {name} VALUE changes it")
    session = _with_setting(session, name, assignment[1])
    return Turn(session, f"{name} is now {_settings(session)[name]}")


def _settings(session: Session) -> dict[str, Any]:
    return {"max_new_tokens": session.max_new_tokens, **asdict(session.sampling)}


def _with_setting(session: Session, name: str, text: str) -> Session:
    """The session with one setting changed; its kind is that of the setting's default."""
    default = _settings(Session(type(session.sampling)()))[name]
    try:
        value = type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UsageError(f"{name} {text!r}: allowed is {kind}") from None
    if name != "max_new_tokens":
        return replace(session, sampling=replace(session.sampling, **{name: value}))
    if value < 1:
        raise UsageError(f"max_new_tokens {value}: allowed is 1 or more")
    return replace(session, max_new_tokens=value)


def talk(
    language_model: LanguageModel, session: Session, read: Callable[[], str], write: Callable[[str], None]
) -> Session:
    """Takes lines until /exit or the end of the input; returns where the conversation ended.

    A refused line leaves the session as it was. Ctrl-C at the prompt drops the line, while the model writes it stops
    the model; what was written stays in the text.

    Args:
        language_model: who goes on with the text.
        session: where to begin.
        read: one line without its end; EOFError at the end of the input, KeyboardInterrupt on Ctrl-C.
        write: shows text as it is given, without a line end.
    """
    while True:
        try:
            turn = take(session, read())
            session = _answered(language_model, turn.session, write) if turn.complete else turn.session
        except EOFError:
            return session
        except KeyboardInterrupt:
            write("\n")
            continue
        except (UsageError, DataError) as error:
            write(f"{error}\n")
            continue
        if turn.leave:
            return session
        if turn.reply:
            write(f"{turn.reply}\n")


def _answered(language_model: LanguageModel, session: Session, write: Callable[[str], None]) -> Session:
    """The session after the model has gone on from its text, or answered its last message, as far as it came."""
    options: dict[str, Any] = {"max_new_tokens": session.max_new_tokens, **asdict(session.sampling)}
    if session.messages is None:
        text, reason = _written(language_model.stream(session.text, **options), write)
        write(f"\n{ENDINGS[reason]}\n")
        return replace(session, text=session.text + text)
    before = (_message("system", session.system),) if session.system else ()
    text, reason = _written(language_model.reply([*before, *session.messages], **options), write)
    write(f"\n{CHAT_ENDINGS[reason]}\n" if reason in CHAT_ENDINGS else "\n")
    return replace(session, messages=(*session.messages, _message("assistant", text)))


def _written(completion: Completion, write: Callable[[str], None]) -> tuple[str, str | None]:
    """All that the model wrote until it ended or was stopped, and why it ended."""
    pieces: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        for piece in completion:
            pieces.append(piece)
            write(piece)
    return "".join(pieces), completion.finish_reason


def introduction(language_model: LanguageModel, *, plain: bool = False) -> str:
    """What kind of model this is, honestly, and how to begin."""
    kind, begin = "This is a base model: it continues what you type, it does not answer.", "the beginning of a text"
    if language_model.chat_template is not None:
        kind, begin = "It answers, by its chat template; --plain continues what you type instead.", "a message"
        if plain:
            kind, begin = (
                "What you type is continued as it stands, without its chat template.",
                "the beginning of a text",
            )
    return f"{language_model.folder}\n{kind}\nType {begin}. /help lists the commands, /exit leaves."


def first_session(language_model: LanguageModel, *, plain: bool = False, system: str = "") -> Session:
    """Where a conversation begins; without a chat template, or with `plain`, it completes a text.

    Raises:
        UsageError: a system message where none has a place.
    """
    if not plain and language_model.chat_template is not None:
        return Session(language_model.sampling, messages=(), system=system)
    if system:
        why = "with --plain what you type is continued" if plain else f"{language_model.folder} has no chat template"
        raise UsageError(f"{why}: a system message has no place; leave out --system")
    return Session(language_model.sampling)


def run(argv: list[str]) -> int:
    parser = Parser("chat", HELP)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="run or model folder (default: newest run)")
    parser.add_argument("--system", metavar="TEXT", default="", help="a message that stands before all others")
    parser.add_argument("--plain", action="store_true", help="complete what is typed, though the model could answer")
    add_device(parser)
    arguments = parser.parse_args(argv)

    from pocketlm.language_model import load
    from pocketlm.machine import hold_threads

    hold_threads()
    language_model = load(arguments.model, device=arguments.device, warn=say)
    session = first_session(language_model, plain=arguments.plain, system=arguments.system)
    say(introduction(language_model, plain=arguments.plain))
    talk(language_model, session, _reader(), _show)
    return 0


def _reader() -> Callable[[], str]:
    """Lines of a terminal, with a prompt and editing where readline exists, or of a pipe."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, editing and history come with the import
        return lambda: input("> ")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return input


def _show(text: str) -> None:
    print(shown(text), end="", flush=True)
