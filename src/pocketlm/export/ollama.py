"""A folder for Ollama: a GGUF file and the Modelfile that says how the model is spoken to and where it stops.

Ollama knows chat templates of models that it knows, and gives others none: they babble on (ollama/ollama#6371). So the
Modelfile always says all of it, in Ollama's own template language, which is Go's:

    no chat template     the prompt as it is, as `pocketlm generate` takes it
    ChatML               <|im_start|>ROLE ... <|im_end|>         Qwen, SmolLM2
    Llama 3              <|start_header_id|>ROLE<|end_header_id|> ... <|eot_id|>

A template is known by its tokens; it is Jinja, and is not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import FileError
from pocketlm.export.folder import refuse_what_stands
from pocketlm.files import commit_folder
from pocketlm.formats.gguf_writer import gguf_bytes
from pocketlm.formats.release import Release

GGUF = "model.gguf"


@dataclass(frozen=True)
class Chat:
    """A way to write conversations: the tokens by which it is known, in Go's template language, and where turns end."""

    known_by: tuple[str, ...]
    template: str
    stops: tuple[str, ...]
    system: str
    """What stands between the words of a default system message, as a regular expression with one group."""


CHATS = {
    "ChatML": Chat(
        ("<|im_start|>", "<|im_end|>"),
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        ("<|im_end|>",),
        r"<\|im_start\|>system(?:\n|\\n)([^'{}|]+?)<\|im_end\|>",
    ),
    "Llama 3": Chat(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>",),
        r"<\|start_header_id\|>system<\|end_header_id\|>(?:\n|\\n){2}([^'{}|]+?)<\|eot_id\|>",
    ),
}


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
        FileError: a chat template that has no words here.
    """
    chat = _chat(release.chat_template)
    texts = {number: text for text, number in release.tokenizer.special_tokens.items()}
    others = [texts[number] for number in sorted(release.other_end_ids) if number in texts]
    stops = dict.fromkeys([*(chat.stops if chat else ()), release.tokenizer.end_token, *others])
    sample = release.sample
    parameters = {
        "num_ctx": release.model.max_position_embeddings,
        "temperature": sample.temperature,
        "top_k": sample.top_k,
        "top_p": sample.top_p,
        "repeat_penalty": 1.0,
    }
    lines = [f"FROM ./{GGUF}", f'TEMPLATE """{chat.template if chat else "{{ .Prompt }}"}"""']
    if chat and (system := re.search(chat.system, release.chat_template or "")):
        lines.append(f'SYSTEM """{system[1]}"""')
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _chat(template: str | None) -> Chat | None:
    if template is None:
        return None
    for chat in CHATS.values():
        if all(token in template for token in chat.known_by):
            return chat
    raise FileError(
        f"this chat template is in none of the forms known for Ollama ({', '.join(CHATS)}); "
        "pocketlm export gguf writes it into the GGUF file, where llama.cpp runs it itself"
    )
