"""llama2.c's files: which stretch is which matrix, with a head of its own and without, and where its tokenizer lies."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from pocketlm.checkpoint import find_checkpoint, read_release
from pocketlm.errors import FileError, UsageError
from pocketlm.formats.llama2c import read_config, read_llama2c
from pocketlm.formats.pairs import halves

WIDTH, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 12, 20, 3, 6, 2, 270, 10
HEAD = WIDTH // HEADS
STRETCHES = [
    ("embedding", (VOCABULARY, WIDTH)),
    ("norm", (LAYERS, WIDTH)),
    ("q", (LAYERS, HEADS * HEAD, WIDTH)),
    ("k", (LAYERS, KV_HEADS * HEAD, WIDTH)),
    ("v", (LAYERS, KV_HEADS * HEAD, WIDTH)),
    ("o", (LAYERS, WIDTH, HEADS * HEAD)),
    ("norm 2", (LAYERS, WIDTH)),
    ("gate", (LAYERS, INNER, WIDTH)),
    ("down", (LAYERS, WIDTH, INNER)),
    ("up", (LAYERS, INNER, WIDTH)),
    ("last norm", (WIDTH,)),
    ("angles", (2, CONTEXT, HEAD // 2)),
]


def write(folder: Path, *, tied: bool) -> dict[str, torch.Tensor]:
    """A model file in llama2.c's order, its numbers counted up, and its tokenizer; the tensors by name."""
    tensors, count = {}, 0
    for name, shape in [*STRETCHES, *([] if tied else [("head", (VOCABULARY, WIDTH))])]:
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(count, count + size, dtype=torch.float32).view(shape)
        count += size
    numbers = (WIDTH, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY if tied else -VOCABULARY, CONTEXT)
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (folder / "model.bin").write_bytes(struct.pack("<7i", *numbers) + data)
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghi", " ", " a"]
    entries = (struct.pack("<fi", -number, len(piece.encode())) + piece.encode() for number, piece in enumerate(pieces))
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + b"".join(entries))
    return tensors


@pytest.mark.parametrize("tied", [True, False])
def test_each_stretch_is_its_matrix(tied: bool, tmp_path: Path) -> None:
    tensors = write(tmp_path, tied=tied)
    release = read_llama2c(tmp_path / "model.bin")
    assert read_config(tmp_path / "model.bin") == release.model
    model, weights = release.model, release.weights
    assert (model.head_dim, model.num_key_value_heads, model.max_position_embeddings) == (HEAD, KV_HEADS, CONTEXT)
    assert (model.tie_word_embeddings, model.norm_eps, model.rope_theta) == (tied, 1e-5, 1e4)
    assert torch.equal(weights["model.embed_tokens.weight"], tensors["embedding"])
    assert torch.equal(weights["model.norm.weight"], tensors["last norm"])
    assert tied or torch.equal(weights["lm_head.weight"], tensors["head"])
    places = {
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm 2",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate_proj": "gate",
        "mlp.down_proj": "down",
        "mlp.up_proj": "up",
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for ours, theirs in places.items():
            assert torch.equal(weights[f"{prefix}.{ours}.weight"], tensors[theirs][layer]), (layer, ours)
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            assert torch.equal(weights[f"{prefix}.self_attn.{name}_proj.weight"], halves(tensors[name][layer], heads))
    assert len(weights) == 2 + 9 * LAYERS + (not tied)
    # rows of q and k: neighbours 2i and 2i + 1 become the halves i and i + D/2
    rows = torch.arange(8.0).view(8, 1)
    assert halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_where_its_tokenizer_lies(tmp_path: Path) -> None:
    write(tmp_path, tied=True)
    model, tokenizer = tmp_path / "model.bin", tmp_path / "tokenizer.bin"
    found = read_release(find_checkpoint(model, print)).tokenizer
    assert (found.begin_id, found.end_id, found.end_token) == (1, 1, "<s>")
    assert found.encode("a") == [269]

    tokenizer.rename(tmp_path / "elsewhere.bin")
    with pytest.raises(FileError, match=r"no tokenizer beside it; put its tok270\.bin or tokenizer\.bin there"):
        read_release(model)
    assert read_release(model, tmp_path / "elsewhere.bin").tokenizer.fingerprint == found.fingerprint
    (tmp_path / "elsewhere.bin").rename(tmp_path / "tok270.bin")
    tokenizer.write_bytes(b"of another model")
    assert read_release(model).tokenizer.fingerprint == found.fingerprint
    with pytest.raises(UsageError, match="--tokenizer is for a llama2"):
        read_release(tmp_path, tokenizer)
