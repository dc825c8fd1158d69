"""GGUF files written and read: the `gguf` package's own reader and decoder say whether both are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

from pocketlm.checkpoint import read_release
from pocketlm.config import Config, ModelConfig, SampleConfig
from pocketlm.errors import DataError, FileError, UsageError
from pocketlm.files import write_file
from pocketlm.formats import gguf_file
from pocketlm.formats.gguf_model import architecture, model_config
from pocketlm.formats.gguf_tokenizer import fields_of as fields_of_tokenizer
from pocketlm.formats.gguf_tokenizer import tokenizer_in
from pocketlm.formats.gguf_writer import TYPES, gguf_bytes
from pocketlm.formats.pairs import halves, neighbours
from pocketlm.formats.release import Release
from pocketlm.model.transformer import allocate
from pocketlm.text.sentencepiece import BYTES, Kind, Pieces, tokenizer_of
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from pocketlm.text.tokenizer_json import PRE_TOKENIZERS, special_entry

LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "norm_eps": 1e-5,
    "rope_theta": 12345.678,
}
GPT2 = {"position": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "num_key_value_heads": 4, "head_dim": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama with biases, untied": LLAMA | {"bias": True, "tie_word_embeddings": False},
    "llama 3": LLAMA | {"rope_llama3": (8.0, 1.0, 4.0, 512)},
    "llama 3, no pair slow": LLAMA | {"rope_llama3": (4.0, 1.0, 4.0, 1_000_000)},
    "llama 3, the slowest between": LLAMA | {"head_dim": 8, "rope_llama3": (32.0, 1.0, 4.0, 8192)},
    "llama 3, another low": LLAMA | {"rope_llama3": (8.0, 2.0, 4.5, 128)},
    "qwen3": LLAMA | {"qk_norm": True},
    "gpt2": LLAMA | GPT2 | {"rope_theta": 10000.0},
}


def release(fields: dict[str, Any], tokenizer: Tokenizer | None = None, template: str | None = None) -> Release:
    config = ModelConfig.model_validate(fields)
    model = allocate(config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(generator=draw)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return Release(config, weights, tokenizer or byte_tokenizer(), chat_template=template)


def written(path: Path, made: Release, type_name: str = "F32") -> gguf.GGUFReader:
    write_file(path, gguf_bytes(made, name="a model", type_name=type_name))
    return gguf.GGUFReader(path)


def fields_of(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: one.contents() for name, one in reader.fields.items()}


# --- there and back


@pytest.mark.goal("R16")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_reads_back(kind: str, tmp_path: Path) -> None:
    made = replace(
        release(KINDS[kind], template="{{ messages }}"),
        sample=SampleConfig(temperature=0.25, top_k=7, top_p=0.75),
        other_end_ids=frozenset([10]),
    )
    written(tmp_path / "a.gguf", made)
    again = read_release(tmp_path / "a.gguf")
    assert again.model == made.model
    assert again.weights.keys() == made.weights.keys()
    assert all(torch.equal(again.weights[name], weight) for name, weight in made.weights.items())
    assert again.tokenizer.token_bytes == made.tokenizer.token_bytes
    assert (again.tokenizer.end_token, again.tokenizer.end_id) == ("<|endoftext|>", 256)
    assert (again.sample, again.other_end_ids) == (made.sample, made.other_end_ids)
    assert again.chat_template == "{{ messages }}"
    assert again.token_names == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def test_what_a_template_calls_the_begin_of_a_text_is_kept(tmp_path: Path) -> None:
    """Of a model that wants nothing before a text: its template alone knows the token."""
    engine = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    engine.add_special_tokens(["<|begin|>"])
    made = replace(release(LLAMA, Tokenizer(engine.to_str())), token_names={"bos_token": "<|begin|>"})
    written(tmp_path / "a.gguf", made)
    again = read_release(tmp_path / "a.gguf")
    assert (again.token_names["bos_token"], again.tokenizer.begin_id) == ("<|begin|>", None)


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    first, second = (b"".join(map(bytes, gguf_bytes(release(LLAMA), name="a"))) for _ in range(2))
    assert first == second
    assert len(first) % 32 == 0


def test_the_fields_are_llama_cpps(tmp_path: Path) -> None:
    fields = fields_of(written(tmp_path / "a.gguf", release(LLAMA)))
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "a model"
    assert (fields["general.file_type"], fields["general.quantization_version"]) == (0, 2)
    assert fields["llama.block_count"] == 2
    assert fields["llama.vocab_size"] == 300
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert fields["llama.attention.key_length"] == fields["llama.rope.dimension_count"] == 24
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["llama.rope.freq_base"] == pytest.approx(12345.678)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(fields["tokenizer.ggml.tokens"]) == len(set(fields["tokenizer.ggml.tokens"])) == 300
    assert fields["tokenizer.ggml.token_type"] == [1] * 256 + [3] + [5] * 43
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 256
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_pairs_of_a_llama_are_neighbours_and_of_a_qwen3_halves(tmp_path: Path) -> None:
    """The score of a query and a key, both turned as each side turns them, is the same: so it is the same model."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)  # 3 heads of 8
    angles = torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=torch.float64)

    def by_halves(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def by_neighbours(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
        return turned.flatten(-2)

    here = (by_halves(q) * k).sum(-1)
    there = (by_neighbours(neighbours(q.flatten(), 3).view(3, 8)) * neighbours(k.flatten(), 3).view(3, 8)).sum(-1)
    torch.testing.assert_close(here, there)

    for kind, turn in (("llama", neighbours), ("qwen3", lambda weight, heads: weight)):
        made = release(KINDS[kind])
        tensors = {tensor.name: tensor.data for tensor in written(tmp_path / f"{kind}.gguf", made).tensors}
        for projection, heads in (("q", 4), ("k", 2), ("v", None)):
            weight = made.weights[f"model.layers.1.self_attn.{projection}_proj.weight"]
            expected = turn(weight, heads) if heads else weight
            assert np.array_equal(tensors[f"blk.1.attn_{projection}.weight"], expected.numpy())
            assert not heads or torch.equal(halves(neighbours(weight, heads), heads), weight)


# --- rounded


@pytest.mark.parametrize("type_name", TYPES)
def test_rounded_weights_are_read_as_the_package_reads_them(type_name: str, tmp_path: Path) -> None:
    made = release(KINDS["qwen3"] | {"tie_word_embeddings": False})
    reader = written(tmp_path / "a.gguf", made, type_name)
    ours = dict(gguf_file.read_tensors(gguf_file.read_header(tmp_path / "a.gguf")))
    types = {}
    for tensor in reader.tensors:
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours[tensor.name].numpy(), theirs.reshape(ours[tensor.name].shape)), tensor.name
        types[tensor.name] = tensor.tensor_type.name
    blocks = type_name.startswith("Q")
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == type_name
    assert types["blk.0.ffn_down.weight"] == ("F16" if blocks else type_name)  # 80 is no multiple of 32
    assert types["token_embd.weight"] == types["output.weight"] == ("Q8_0" if blocks else type_name)
    step = {"F32": 0, "F16": 2**-10, "BF16": 2**-7, "Q8_0": 1 / 127, "Q5_1": 1 / 8, "Q5_0": 1 / 8, "Q4_1": 1 / 4}
    weight, again = made.weights["model.layers.0.mlp.up_proj.weight"], ours["blk.0.ffn_up.weight"]
    assert (weight - again).abs().max() <= step.get(type_name, 1 / 4) * weight.abs().max()


def test_a_weight_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    made = release(LLAMA)
    made.weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 70000.0
    with pytest.raises(FileError, match=r"blk\.0\.ffn_up\.weight has a weight of 70000, too large for F16"):
        write_file(tmp_path / "a.gguf", gguf_bytes(made, name="a", type_name="F16"))
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "a.gguf", made, "BF16")


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block": "parallel"}, "block parallel"),
        ({"mlp": "relu2"}, "mlp relu2"),
        ({"logit_softcap": 15.0}, "logit_softcap 15.0"),
        ({"position": "learned"}, "position learned"),
        ({"qk_norm": True, "bias": True}, "qk_norm True"),
        ({"qk_norm": True, "rope_llama3": (8.0, 1.0, 4.0, 512)}, "qk_norm True"),
        (GPT2 | {"bias": False}, "bias False"),
        (GPT2 | {"num_key_value_heads": 2}, "num_key_value_heads 2"),
        (GPT2 | {"head_dim": 24}, "head_dim 24"),
    ],
    ids=str,
)
def test_no_architecture_no_file(fields: dict[str, Any], words: str) -> None:
    assert architecture(ModelConfig.model_validate(LLAMA | fields)) is None
    with pytest.raises(FileError) as refusal:
        gguf_bytes(release(LLAMA | fields), name="a")
    assert f"no architecture for a model with {words}" in str(refusal.value)
    assert "pocketlm train debug" in str(refusal.value)


def test_the_preset_that_would_do_is_the_nearest() -> None:
    model = Config.preset("smallm").model
    with torch.device("meta"):
        weights = {"w": torch.empty(1)}
    with pytest.raises(FileError, match=r"with block parallel, position learned; the nearest preset .* smollm2-135m"):
        gguf_bytes(Release(model, weights, byte_tokenizer()), name="smallm")


@pytest.mark.parametrize("type_name", ["Q4_K_M", "F64", ""])
def test_types_that_there_are_not(type_name: str) -> None:
    with pytest.raises(UsageError, match="allowed are F32, F16, BF16, Q8_0"):
        gguf_bytes(release(LLAMA), name="a", type_name=type_name)


def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused() -> None:
    tree = json.loads(byte_tokenizer().to_json())
    tree["pre_tokenizer"]["add_prefix_space"] = True
    with pytest.raises(DataError, match=r"llama\.cpp has no name for the way this tokenizer cuts text"):
        gguf_bytes(release(LLAMA, Tokenizer(json.dumps(tree))), name="a")


def with_tool(tree: dict[str, Any], **flags: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False) | flags
    tool = {"id": max(tree["model"]["vocab"].values()) + 1, "content": "<tool>"} | flags
    return tree | {"added_tokens": [*tree["added_tokens"], tool]}


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_added_tokens_that_llama_cpp_would_not_find_are_refused(flag: str) -> None:
    byte_level, pieces = byte_tokenizer().tree, pieces_named_by_letters().tree
    for tree in (byte_level, pieces):
        assert fields_of_tokenizer(Tokenizer(json.dumps(with_tool(tree))), 400)
        assert fields_of_tokenizer(Tokenizer(json.dumps(with_tool(tree, special=True, **{flag: True}))), 400)
        tokenizer = Tokenizer(json.dumps(with_tool(tree, **{flag: True})))
        if tree is byte_level and flag == "normalized":  # it has no normalizer
            assert fields_of_tokenizer(tokenizer, 400)
        else:
            with pytest.raises(DataError, match=f"the added token '<tool>' has {flag}, which"):
                fields_of_tokenizer(tokenizer, 400)


def test_added_tokens_that_overlap_are_refused() -> None:
    """In "abcd" the first is ab, and the longest bcd."""
    tree = byte_tokenizer().tree
    for contents, other in (
        (("ab", "bcd"), "bcd"),
        (("<a", "a>"), "a>"),
        (("  ", "   ", "<a>", "<a><"), None),
    ):
        added = [special_entry(content, 257 + n) | {"special": False} for n, content in enumerate(contents)]
        tokenizer = Tokenizer(json.dumps(tree | {"added_tokens": [*tree["added_tokens"], *added]}))
        if other is None:
            assert fields_of_tokenizer(tokenizer, 400)
        else:
            with pytest.raises(DataError, match=f"ends as '{other}' begins, of which llama.cpp takes the longer"):
                fields_of_tokenizer(tokenizer, 400)


def pieces_named_by_letters() -> Tokenizer:
    texts = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", "a", "aa"]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL] + [Kind.BYTE] * 256 + [Kind.NORMAL] * 3
    return tokenizer_of(Pieces(texts, [0.0] * len(texts), kinds), "pieces")


@pytest.mark.parametrize("change", [{"ignore_merges": True}, {"dropout": 0.5}, {"end_of_word_suffix": "</w>"}], ids=str)
def test_ids_that_follow_from_more_than_merges_are_refused(change: dict[str, Any]) -> None:
    tree = byte_tokenizer().tree
    tokenizer = Tokenizer(json.dumps(tree | {"model": tree["model"] | change}))
    with pytest.raises(DataError, match=r"cut as gpt-2 llama\.cpp makes ids by merges alone"):
        gguf_bytes(release(LLAMA, tokenizer), name="a")


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}], ids=str)
def test_whether_a_qwen_composes_characters_is_kept(normalizer: dict[str, str] | None, tmp_path: Path) -> None:
    """And of a file of others, which does not say, it is as Qwen's own."""
    tree = byte_tokenizer().tree | {"normalizer": normalizer, "pre_tokenizer": PRE_TOKENIZERS["qwen2"]}
    tokenizer = Tokenizer(json.dumps(tree))
    written(tmp_path / "a.gguf", release(LLAMA, tokenizer))
    header = gguf_file.read_header(tmp_path / "a.gguf")
    assert tokenizer_in(header).encode("e\u0301") == tokenizer.encode("e\u0301")
    others = replace(header, fields={key: value for key, value in header.fields.items() if "pocketlm" not in key})
    assert bytes(tokenizer_in(others).encode("e\u0301")) == "\u00e9".encode()


def test_a_llama_3_begins_texts_where_its_file_does_not_say(tmp_path: Path) -> None:
    """As in llama.cpp; the others do not."""
    tree = byte_tokenizer().tree
    for cut, model in (("llama-bpe", tree["model"] | {"ignore_merges": True}), ("qwen2", tree["model"])):
        tokenizer = Tokenizer(json.dumps(tree | {"model": model, "pre_tokenizer": PRE_TOKENIZERS[cut]}))
        written(tmp_path / "a.gguf", release(LLAMA, tokenizer))
        header = gguf_file.read_header(tmp_path / "a.gguf")
        assert tokenizer_in(header).tree["pre_tokenizer"] == tokenizer.tree["pre_tokenizer"]
        assert tokenizer_in(header).tree["model"]["ignore_merges"] == (cut == "llama-bpe")
        fields = {key: value for key, value in header.fields.items() if key != "tokenizer.ggml.add_bos_token"}
        assert tokenizer_in(replace(header, fields=fields)).begin_id == (256 if cut == "llama-bpe" else None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is 4.0"),
        ({"rope.scale_linear": 4.0}, "llama.rope.scale_linear is 4.0"),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "linear"}, r"scaled rotary positions \(linear\)"),
        ({"rope.scaling.attn_factor": 0.5}, "attn_factor is 0.5; allowed is 1"),
        ({"attention.causal": False}, "allowed is causal attention"),
        ({"rope.scaling.factor": 1.0, "rope.scale_linear": 0.0, "attention.causal": True}, None),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, None),  # llama.cpp scales nothing, either
        (
            {"attention.key_length": None, "attention.value_length": None, "rope.dimension_count": 12},
            "rope.dimension_count is 12; allowed is 16",
        ),
        ({"attention.key_length": None, "attention.value_length": 24}, "value_length is 24; allowed is 16"),
        ({"attention.key_length": None, "attention.value_length": None, "rope.dimension_count": None}, None),
    ],
    ids=str,
)
def test_what_a_file_asks_for_and_we_do_not_compute(fields: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    made = release(LLAMA | {"head_dim": 16})
    written(tmp_path / "a.gguf", made)
    header = gguf_file.read_header(tmp_path / "a.gguf")
    others = {
        key: value for key, value in header.fields.items() if fields.get(key.removeprefix("llama."), 0) is not None
    }
    given = {f"llama.{name}": value for name, value in fields.items() if value is not None}
    header = replace(header, fields=others | given)
    if words is None:
        assert model_config(header) == made.model
    else:
        with pytest.raises(FileError, match=words):
            model_config(header)


def test_biases_on_some_projections_are_no_damage(tmp_path: Path) -> None:
    """A Qwen2 that was made a Llama has them on q, k and v alone."""
    written(tmp_path / "a.gguf", release(LLAMA | {"bias": True}))
    header = gguf_file.read_header(tmp_path / "a.gguf")
    kept = {name: place for name, place in header.tensors.items() if not name.endswith(("output.bias", "ffn_up.bias"))}
    with pytest.raises(FileError, match=r"a.gguf has no blk.0.attn_output.bias; allowed are biases on all projections"):
        model_config(replace(header, tensors=kept))


def test_the_way_out_of_k_quants_is_named(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf", release(LLAMA))
    name, q4_k = b"token_embd.weight", (12).to_bytes(4, "little")
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    place = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions, and both
    data[place : place + 4] = q4_k
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(FileError, match=r"is of type Q4_K; .* llama-quantize --allow-requantize IN OUT F16"):
        gguf_file.read_header(tmp_path / "a.gguf")


# --- a vocabulary of llama.cpp's own


def test_gpt2s_vocabulary_has_gpt2s_ids(shared: Path) -> None:
    tokenizer = tokenizer_in(gguf_file.read_header(shared / "models/gguf/ggml-vocab-gpt-2.gguf"))
    inputs = (shared / "tokenizers/gpt2/llamacpp-vectors.inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = (shared / "tokenizers/gpt2/llamacpp-vectors.out").read_text().splitlines()
    for text, ids in zip(inputs, outputs, strict=False):
        assert tokenizer.encode(text) == [int(number) for number in ids.split()]
    assert tokenizer.fingerprint == load_tokenizer(str(shared / "tokenizers/gpt2")).fingerprint
