"""Model folders as transformers writes them, of each family that pocketlm reads: opened here, the same logits.

The sizes are tiny and the weights random; names, shapes, shards and config.json are transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import assert_as_exact_as
from safetensors.torch import load_file, save_file

import pocketlm
from pocketlm.cli.main import main
from pocketlm.errors import FileError
from pocketlm.text.tokenizer import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
transformers = pytest.importorskip("transformers")

VOCAB = 263
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"vocab_size": VOCAB, "n_positions": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("Llama", LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}}),
    "TinyLlama": ("Llama", LLAMA),
    "Llama 3.2": (
        "Llama",
        LLAMA
        | {"tie_word_embeddings": True, "head_dim": 16}
        | {"rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 32}},
    ),
    "Llama, multi-query, biases": (
        "Llama",
        LLAMA | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "Qwen3": ("Qwen3", LLAMA | {"tie_word_embeddings": True, "head_dim": 20, "rope_parameters": {"rope_theta": 1e6}}),
    "Qwen3, untied, as many keys": ("Qwen3", LLAMA | {"head_dim": 8, "num_key_value_heads": 6}),
    "GPT-2": ("GPT2", GPT2),
    "GPT-2, untied, another width": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 80}),
}


def random_theirs(family: str) -> Any:
    """transformers' model with every parameter random."""
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=None, eos_token_id=256)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            weight.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.1, generator=generator)
    return model


def add_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (3, 96), generator=torch.Generator().manual_seed(12))


@pytest.mark.goal("R16")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_many_files_gives_its_logits(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    theirs = random_theirs(family)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    add_tokenizer(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = pocketlm.load(tmp_path).model
    assert assert_as_exact_as(theirs, ours, ids) <= 2e-5


@pytest.mark.parametrize("family", ["Llama 3.2", "GPT-2"])
def test_sixteen_bits_are_read_as_they_are(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    random_theirs(family).to(torch.bfloat16).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_as_exact_as(theirs, pocketlm.load(tmp_path).model, ids)


def as_on_the_hub(kind: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """What released files hold beside the weights, and other names for these."""
    for name, tensor in tensors.items():
        yield name.removeprefix("transformer.") if kind == "gpt2" else name, tensor
    for layer in range(2):
        if kind == "gpt2":
            yield f"h.{layer}.attn.bias", torch.ones(1, 1, 96, 96).tril().to(torch.uint8)
            yield f"h.{layer}.attn.masked_bias", torch.tensor(-1e4)
        else:
            yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", torch.ones(4)
    yield "lm_head.weight", tensors["transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("family", ["SmolLM2", "GPT-2"])
def test_what_older_files_hold_beside_their_weights(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    theirs = random_theirs(family)
    theirs.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    expected = pocketlm.load(tmp_path).model(ids)
    file = tmp_path / "model.safetensors"
    tensors = dict(as_on_the_hub(theirs.config.model_type, load_file(file)))
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(pocketlm.load(tmp_path).model(ids), expected)
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FileError, match=r"lm_head\.weight is not the embedding"):
        pocketlm.load(tmp_path)


def test_what_ends_a_text_is_in_its_generation_settings(tmp_path: Path) -> None:
    random_theirs("SmolLM2").save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    assert pocketlm.load(tmp_path).other_end_ids == set()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 7, 9], "top_k": 3, "do_sample": true}')
    speaker = pocketlm.load(tmp_path)
    assert (speaker.other_end_ids, speaker.sampling.top_k) == ({7, 9}, 3)
    assert main(["export", "hf", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.top_k) == ([256, 7, 9], 3)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    random_theirs("SmolLM2").save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    names = {name: f"modeling_trap.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (tmp_path / "config.json").write_text(json.dumps(tree | {"auto_map": names}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "eos_token": "<|endoftext|>"}))
    (tmp_path / "modeling_trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    assert pocketlm.load(tmp_path).generate("a", max_new_tokens=2, seed=0) is not None
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "config.json").write_text(json.dumps(tree | {"auto_map": names, "model_type": "trap"}))
    with pytest.raises(FileError, match="model_type 'trap'; allowed are llama, qwen3, gpt2 and pocketlm"):
        pocketlm.load(tmp_path)
