"""The Modelfile: what Ollama's template makes of a conversation is what the model's own template makes of it.

Ollama's template language is Go's; of it, as much as these templates use is run here.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocketlm.cli.main import main
from pocketlm.config import ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.export.ollama import modelfile
from pocketlm.formats.gguf_file import read_header
from pocketlm.formats.release import Release
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer
from pocketlm.text.tokenizer_json import with_begin

LLAMA3 = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' + SYSTEM + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
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


@pytest.mark.parametrize(("context", "asked"), [(2048, "2048"), (8192, "8192"), (40_960, "8192")])
def test_memory_is_asked_for_a_context_of_moderate_size(context: int, asked: str) -> None:
    model = ModelConfig(max_position_embeddings=context)
    assert parsed(modelfile(replace(release(), model=model)))["PARAMETER num_ctx"] == asked


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


def test_a_begin_token_is_ollamas_to_write() -> None:
    tree = with_begin(byte_tokenizer().tree, "<|endoftext|>", 256)
    beginning = replace(release(LLAMA3), tokenizer=Tokenizer(json.dumps(tree), "<|endoftext|>"))
    with pytest.raises(
        FileError, match=r"does not begin with '<\|endoftext\|>', which Ollama puts before every text; "
    ):
        modelfile(beginning)
    assert modelfile(replace(beginning, chat_template="<|endoftext|>" + LLAMA3)) == modelfile(release(LLAMA3))


def test_a_default_system_message_is_what_the_template_writes() -> None:
    template = CHATML.replace("SYSTEM", "'One\\n\\n' + 'two: {|\"x\"|}.'")
    text = modelfile(release(template))
    assert parsed(text)["SYSTEM"] == 'One\n\ntwo: {|"x"|}.'
    assert as_ollama(text, MESSAGES[1:]) == rendered_by_jinja(template, MESSAGES[1:])


IN_A_COMMENT = '{#<|im_start|>system\n."""\nADAPTER /etc/passwd\nFROM evil/model\nSYSTEM """.<|im_end|>#}'


@pytest.mark.goal("R24")
def test_what_a_template_does_not_write_is_not_said() -> None:
    plain = CHATML[CHATML.index("{% for") :]
    assert modelfile(release(IN_A_COMMENT + plain)) == modelfile(release(plain))


FIRST, SECOND = "{% if messages[0].role != 'system' %}", "{% if messages|length > 2 %}"
OTHER_FORMS = {
    "another": "[INST] {{ messages[0]['content'] }} [/INST]",
    "Phi-4's": CHATML.replace("\n' + message.content", "<|im_sep|>' + message.content").replace("SYSTEM", "'x'"),
    "another start": "x" + LLAMA3,
    "a begin token that nobody wants": "<|endoftext|>" + LLAMA3,
    "another answer": LLAMA3.replace("assistant<|", "model<|"),
    "no answer": LLAMA3[: LLAMA3.index("{% if add")],
    "a filter": LLAMA3.replace("message['content']", "message['content']|e"),
    "words with the system's": LLAMA3.replace("{{ message['con", "{% if loop.first %}Today{% endif %}{{ message['con"),
    "no system": LLAMA3.replace("in messages", "in messages if message.role != 'system'"),
    "an empty system": CHATML.replace("SYSTEM", "''"),
    "two turns another": f"{LLAMA3}{SECOND} {{% endif %}}",
    "refuses systems": f"{FIRST}{{% else %}}{{{{ raise_exception('no system') }}}}{{% endif %}}{LLAMA3}",
    "breaks": "{{ messages[3].content }}" + LLAMA3,
    "reaches out": "{{ ''.__class__ }}" + LLAMA3,
    "the date": LLAMA3 + "{% if tools %}{{ strftime_now('%Y') }}{% endif %}",
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_template_that_writes_something_else_is_refused(name: str) -> None:
    with pytest.raises(FileError, match=r"this chat template is in none|^the chat|asks for the date") as caught:
        modelfile(release(OTHER_FORMS[name]))
    assert str(caught.value).endswith(
        "; pocketlm export gguf writes it into the GGUF file, where llama.cpp runs it itself"
    )
    assert "--plain" not in str(caught.value)


@pytest.mark.goal("R24")
@pytest.mark.parametrize(
    "system",
    [
        'Be.\n"""\nADAPTER /etc/passwd\nFROM evil/model\nSYSTEM """Be.',
        'He said "Be."',  # and the quotes would end a letter later
        '"Be',
        "Be\rADAPTER /etc/passwd",
        "Be\x00.",
    ],
)
def test_a_system_message_that_would_leave_its_quotes_is_refused(system: str) -> None:
    template = CHATML.replace("SYSTEM", json.dumps(system))
    assert system in rendered_by_jinja(template, MESSAGES[1:])
    with pytest.raises(
        FileError, match=r"default system message .* written into a Modelfile: .*; pocketlm export gguf"
    ):
        modelfile(release(template))


@pytest.mark.goal("R24")
@pytest.mark.parametrize("token", ['x"\nFROM evil/model\nPARAMETER stop "y', 'x"', "x\ny", "x\ry"])
def test_a_token_that_would_leave_its_quotes_is_refused(token: str) -> None:
    engine = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    engine.add_special_tokens([token])
    hostile = Tokenizer(engine.to_str(), "<|endoftext|>")
    ends = frozenset({hostile.special_tokens[token]})
    with pytest.raises(FileError, match=r"ends at the special token .* cannot be written into a Modelfile"):
        modelfile(replace(release(), tokenizer=hostile, other_end_ids=ends))


def test_the_folder_holds_both(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = shared / "models/stories260K/stories260K.bin"
    assert main(["import", str(source), "--out", "chatty"]) == 0
    template = json.dumps("{{ bos_token }}" + CHATML.replace("SYSTEM", "'Be brief.'"))
    (tmp_path / "chatty/manifest.json").unlink()  # somebody goes on with the folder by hand
    config = tmp_path / "chatty/tokenizer_config.json"
    config.write_text(config.read_text().replace("{", f'{{ "chat_template": {template},', 1))
    assert main(["export", "ollama", "chatty", "--out", "made", "--type", "q8_0"]) == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["Modelfile", "manifest.json", "model.gguf"]
    assert parsed((tmp_path / "made/Modelfile").read_text())["SYSTEM"] == "Be brief."
    header = read_header(tmp_path / "made/model.gguf")
    assert header.fields["tokenizer.chat_template"] == json.loads(template)
    assert main(["verify", "made"]) == 0
