"""The Modelfile: what Ollama's template makes of a conversation is what the model's own template makes of it.

Ollama's template language is Go's; of it, as much as these templates use is run here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocketlm.cli.main import main
from pocketlm.config import ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.export.ollama import modelfile
from pocketlm.formats.gguf_file import read_header
from pocketlm.formats.release import Release
from pocketlm.text.tokenizer import byte_tokenizer

LLAMA3 = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "{{ .Role }} and 3+3?"},
]


def release(template: str | None = None, **sample: float) -> Release:
    return Release(ModelConfig(), {}, byte_tokenizer(), SampleConfig(**sample), template)  # type: ignore[arg-type]


def parsed(text: str) -> dict[str, Any]:
    """A Modelfile's instructions; those that may stand several times as lists."""
    found: dict[str, Any] = {"PARAMETER stop": []}
    for name, value in re.findall(r'^(FROM|TEMPLATE|SYSTEM|PARAMETER \w+) ("""[\s\S]*?"""|.*)$', text, re.MULTILINE):
        plain = value.removeprefix('"""').removesuffix('"""') if value.startswith('"""') else value.strip('"')
        if name == "PARAMETER stop":
            found[name].append(plain)
        else:
            found[name] = plain
    return found


def rendered_by_go(template: str, messages: list[dict[str, str]]) -> str:
    """A template of one loop over the messages."""
    match = re.fullmatch(r"\{\{- range \.Messages \}\}([\s\S]*?)\{\{ end \}\}([\s\S]*)", template)
    assert match, template
    words = re.split(r"\{\{ \.(Role|Content) \}\}", match[1])
    turns = ["".join(m[part.lower()] if n % 2 else part for n, part in enumerate(words)) for m in messages]
    return "".join(turns) + match[2]


def rendered_by_jinja(template: str, messages: list[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


def as_ollama(text: str, messages: list[dict[str, str]]) -> str:
    """What Ollama sends to the model: SYSTEM stands before messages that have no system message."""
    found = parsed(text)
    if "SYSTEM" in found and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": found["SYSTEM"]}, *messages]
    return rendered_by_go(found["TEMPLATE"], messages)


def test_a_base_model_gets_its_prompt_as_it_is() -> None:
    found = parsed(modelfile(release(temperature=0.5, top_k=7)))
    assert found == {
        "FROM": "./model.gguf",
        "TEMPLATE": "{{ .Prompt }}",
        "PARAMETER num_ctx": "2048",
        "PARAMETER temperature": "0.5",
        "PARAMETER top_k": "7",
        "PARAMETER top_p": "1.0",
        "PARAMETER repeat_penalty": "1.0",
        "PARAMETER stop": ["<|endoftext|>"],
    }


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:], MESSAGES[1:2]])
def test_smollm2_is_spoken_to_as_by_its_own_template(messages: list[dict[str, str]], shared: Path) -> None:
    template = (shared / "tokenizers/smollm2/chat_template.jinja").read_text()
    text = modelfile(release(template))
    assert as_ollama(text, messages) == rendered_by_jinja(template, messages)
    assert parsed(text)["SYSTEM"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert parsed(text)["PARAMETER stop"] == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:2]])
def test_llama_3(messages: list[dict[str, str]]) -> None:
    text = modelfile(release(LLAMA3))
    assert as_ollama(text, messages) == rendered_by_jinja(LLAMA3, messages)
    assert "SYSTEM" not in parsed(text)
    assert parsed(text)["PARAMETER stop"] == ["<|eot_id|>", "<|endoftext|>"]


def test_a_template_without_words_here_is_refused() -> None:
    with pytest.raises(FileError, match=r"forms known for Ollama \(ChatML, Llama 3\); pocketlm export gguf"):
        modelfile(release("[INST] {{ messages[0]['content'] }} [/INST]"))


def test_the_folder_holds_both(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = shared / "models/stories260K/stories260K.bin"
    assert main(["import", str(source), "--out", "chatty"]) == 0
    template = json.dumps("{{ '<|im_start|>' }}{{ messages }}{{ '<|im_end|>' }}")
    (tmp_path / "chatty/manifest.json").unlink()  # somebody goes on with the folder by hand
    config = tmp_path / "chatty/tokenizer_config.json"
    config.write_text(config.read_text().replace("{", f'{{ "chat_template": {template},', 1))
    assert main(["export", "ollama", "chatty", "--out", "made", "--type", "q8_0"]) == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["Modelfile", "manifest.json", "model.gguf"]
    assert "<|im_start|>" in (tmp_path / "made/Modelfile").read_text()
    header = read_header(tmp_path / "made/model.gguf")
    assert header.fields["tokenizer.chat_template"] == json.loads(template)
    assert main(["verify", "made"]) == 0
