"""Conversations as transformers renders and encodes them: templates in the forms that models of this size come with.

The templates are ours, written after the forms. A tokenizer of bytes stands in for the models' own: which text is a
special token depends on the tokenizer alone, and which texts come is what is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
import transformers

from pocketlm.errors import DataError
from pocketlm.text.chat_template import ChatTemplate
from pocketlm.text.sentencepiece import Kind, Pieces, tokenizer_of
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

CHATML = """
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

The year is {{ date_string }}.
{{ system }}<|eot_id|>
{%- for m in messages %}
    {%- generation %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN3 = """
{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_user=0) %}
{%- for m in messages[::-1] %}
    {%- if m.role == "user" and m.content is string %}
        {%- set ns.last_user = messages|length - loop.index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for m in messages if m.role != 'system' %}
    {%- set content = m.content if m.content is string else m.content|tojson(indent=1) %}
    {%- if '</think>' in content and loop.index0 < ns.last_user %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>
' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>
' + m['content'] + eos_token }}
{% else %}
{{ '<|assistant|>
'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 is even) %}
{{- raise_exception('user and assistant take turns') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}
{%- endfor %}"""
FORMS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama 3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"]),
    "zephyr": (ZEPHYR, ["<|user|>", "</s>"]),
    "mistral": (MISTRAL, ["[INST]", "[/INST]", "<s>", "</s>"]),
}
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  What is 2+2?  "}],
    [
        {"role": "user", "content": "a <b> & \"c\" 'd' < \U0001f600 {{ x }}\n\nline"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4."},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "e\u0301\u00e9\u4e2d<"},
        {"role": "user", "content": "im_end|> [INS", "extra": [1, None, {"a": "<tag>"}]},
    ],
]


def with_tokens(tokens: list[str], flags: dict[str, bool]) -> Tokenizer:
    engine = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    engine.add_special_tokens([tokenizers.AddedToken(token, special=True, **flags) for token in tokens])
    engine.add_tokens(["<think>", "</think>"])
    return Tokenizer(engine.to_str(), tokens[-1])


def theirs(tokenizer: Tokenizer, source: str, names: dict[str, str]) -> Any:
    engine = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **names)
    other.chat_template = source
    return other


def compare(tokenizer: Tokenizer, source: str, names: dict[str, str], talk: list[dict[str, Any]]) -> None:
    ours, other = ChatTemplate(source, tokenizer, names), theirs(tokenizer, source, names)
    try:
        text = other.apply_chat_template(talk, tokenize=False)
    except jinja2.TemplateError as error:
        with pytest.raises(DataError, match=str(error)):
            ours.render(talk)
        return
    assert ours.render(talk, add_generation_prompt=False) == text
    ids = other.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ours.encode(talk) == ids
    assert tokenizer.special_ids.intersection(ids)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", [{}, {"lstrip": True, "rstrip": True}], ids=["as usual", "blanks taken"])
def test_a_conversation_is_what_transformers_makes_of_it(form: str, flags: dict[str, bool]) -> None:
    source, tokens = FORMS[form]
    names = {"bos_token": tokens[0] if form == "llama 3" else "<s>", "eos_token": tokens[-1]}
    for talk in TALKS:
        compare(with_tokens(tokens, flags), source, names, talk)


@pytest.mark.parametrize("adds_space", [False, True])
def test_sentencepiece_puts_its_blanks_where_transformers_puts_them(adds_space: bool) -> None:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"helo", "\u2581h", "he"]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256, *[Kind.NORMAL] * 7]
    pieces = Pieces(texts, [-float(rank) for rank in range(len(texts))], kinds, 1, 2, adds_space)
    for source in (MISTRAL, ZEPHYR):
        for talk in TALKS:
            compare(tokenizer_of(pieces, "test"), source, {"bos_token": "<s>", "eos_token": "</s>"}, talk)


def test_the_vectors_of_smollm2(shared: Path) -> None:
    """Rendered and encoded by transformers with the model's own template, and kept."""
    folder = shared / "tokenizers" / "smollm2"
    ours = ChatTemplate((folder / "chat_template.jinja").read_text(), load_tokenizer(str(folder)))
    vectors = [json.loads(line) for line in (folder / "chat_vectors.jsonl").read_text().splitlines()]
    assert len(vectors) == 6
    for vector in vectors:
        prompt = vector["add_generation_prompt"]
        assert ours.render(vector["messages"], add_generation_prompt=prompt) == vector["rendered"]
        assert ours.encode(vector["messages"], add_generation_prompt=prompt) == vector["smollm2_ids"]
