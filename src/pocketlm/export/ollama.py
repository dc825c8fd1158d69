"""A folder for Ollama: a GGUF file and the Modelfile that says how the model is spoken to and where it stops.

Ollama knows chat templates of models that it knows, and gives others none: they babble on (ollama/ollama#6371). So the
Modelfile always says all of it, in Ollama's own template language, which is Go's:

    no chat template     the prompt as it is, as `pocketlm generate` takes it
    ChatML               <|im_start|>ROLE ... <|im_end|>         Qwen, SmolLM2
    Llama 3              <|start_header_id|>ROLE<|end_header_id|> ... <|eot_id|>

A chat template is Jinja, any program at all. It is known by what it writes: it gets four conversations, in the process
that is there for it, and a form is its own if all come out letter for letter. A default system message is what stands
before the first of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import DataError, FileError
from pocketlm.export.folder import refuse_what_stands
from pocketlm.files import commit_folder
from pocketlm.formats.gguf_writer import gguf_bytes
from pocketlm.formats.release import Release
from pocketlm.text.chat_template import INSTEAD as WITHOUT_TEMPLATE
from pocketlm.text.chat_template import ChatTemplate

GGUF = "model.gguf"
MOST_CONTEXT = 8192
"""Of num_ctx: Ollama takes the memory for all of it at once, 4.7 GB for the 40,960 tokens of Qwen3 0.6B."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
INSTEAD = "pocketlm export gguf writes it into the GGUF file, where llama.cpp runs it itself"


@dataclass(frozen=True)
class Chat:
    """A way to write conversations: each turn, the beginning of an answer, and where turns end."""

    turn: str
    """With {role} and {content}."""
    answer: str
    stops: tuple[str, ...]

    def go(self) -> str:
        """It in Ollama's language."""
        turn = self.turn.format(role="{{ .Role }}", content="{{ .Content }}")
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.answer}"

    def written(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What Ollama makes of a conversation by `go`."""
        return "".join(self.turn.format(**message) for message in messages) + self.answer


CHATS = {
    "ChatML": Chat("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", ("<|im_end|>",)),
    "Llama 3": Chat(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>",),
    ),
}
SYSTEM, USER, ASSISTANT, AGAIN = (
    {"role": "system", "content": "Be  Brief:\nsay 'no' & \"yes\" <b>."},
    {"role": "user", "content": "What is\n\n2 + 2,  <i>please</i>?"},
    {"role": "assistant", "content": "It's 4."},
    {"role": "user", "content": "And {{ .Role }} \\n 3?"},
)
PROBES = ([USER], [USER, ASSISTANT, AGAIN], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, AGAIN])
"""With a system message and without, of one turn and two; filters and escapes would show in them. Blanks at the ends of
messages, which many templates take away, are not looked at."""


def write_ollama(out: Path, release: Release, *, name: str, type_name: str = "F32") -> None:
    """Writes the folder, whole or not at all. Arguments as of `gguf_bytes`.

    Raises:
        UsageError, FileError, DataError: something stands there, or as `gguf_bytes` and `modelfile`.
        OSError: the disk refused.
    """
    refuse_what_stands(out)
    text = modelfile(release)
    with commit_folder(out) as commit:
        commit.write(GGUF, gguf_bytes(release, name=name, type_name=type_name))
        commit.write("Modelfile", text.encode())


def modelfile(release: Release) -> str:
    """The Modelfile beside `model.gguf`.

    Raises:
        FileError: a chat template that has no words here, or a text in it or a token that would end its quotes.
    """
    chat, system = (None, "") if release.chat_template is None else _form(release, release.chat_template)
    texts = {number: text for text, number in release.tokenizer.special_tokens.items()}
    others = [texts[number] for number in sorted(release.other_end_ids) if number in texts]
    stops = dict.fromkeys([*(chat.stops if chat else ()), release.tokenizer.end_token, *others])
    sample = release.sample
    parameters = {
        "num_ctx": min(release.model.max_position_embeddings, MOST_CONTEXT),
        "temperature": sample.temperature,
        "top_k": sample.top_k,
        "top_p": sample.top_p,
        "repeat_penalty": 1.0,
    }
    lines = [f"FROM ./{GGUF}", f'TEMPLATE """{chat.go() if chat else "{{ .Prompt }}"}"""']
    lines += [f"SYSTEM {_long(system)}"] if system else []
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    lines += [f"PARAMETER stop {_short(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _long(text: str) -> str:
    """A stranger's text of several lines, in quotes. A Modelfile has no way to write a quote inside of them."""
    if '"""' in text or text.startswith('"') or text.endswith('"') or CONTROLS.search(text):
        raise FileError(
            f"its default system message cannot be written into a Modelfile: {text!r:.200}; allowed are lines without "
            f'""" in them and " at their ends; {INSTEAD}'
        )
    return f'"""{text}"""'


def _short(text: str) -> str:
    """A stranger's special token, in quotes."""
    if '"' in text or "\n" in text or CONTROLS.search(text):
        raise FileError(
            f"it ends at the special token {text!r:.200}, which cannot be written into a Modelfile: allowed are tokens "
            'without " and line ends; pocketlm export gguf needs none'
        )
    return f'"{text}"'


def _form(release: Release, source: str) -> tuple[Chat, str]:
    """The form that the model's own template writes, and its default system message, empty if there is none."""
    if "strftime_now" in source:
        raise FileError(f"this chat template asks for the date, which Ollama's language has not; {INSTEAD}")
    template = ChatTemplate(source, release.tokenizer, release.token_names)
    begin = release.tokenizer.begin_token or ""
    try:
        first = template.render(PROBES[0])
        if not first.startswith(begin):
            raise FileError(f"this chat template does not begin with {begin!r}, which Ollama puts before every text")
        for chat in CHATS.values():
            system = _default_system(chat, first.removeprefix(begin))
            before = [{"role": "system", "content": system}] if system else []
            given = [messages if messages[0] is SYSTEM else [*before, *messages] for messages in PROBES]
            expected = [begin + chat.written(messages) for messages in given]
            if first == expected[0] and [first, *map(template.render, PROBES[1:])] == expected:
                return chat, system
    except (DataError, FileError) as error:
        raise FileError(f"{str(error).removesuffix(f'; {WITHOUT_TEMPLATE}')}; {INSTEAD}") from None
    raise FileError(f"this chat template is in none of the forms known for Ollama ({', '.join(CHATS)}); {INSTEAD}")


def _default_system(chat: Chat, rendered: str) -> str:
    """What stands as a system message before USER; anything at all if the text is not in this form."""
    head, _, tail = chat.turn.partition("{content}")
    after = tail + chat.written([USER])
    return rendered.removesuffix(after).removeprefix(head.format(role="system")) if rendered.endswith(after) else ""
