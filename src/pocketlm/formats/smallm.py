"""The first seed's `chatbot.pth`: its sizes beside its weights, the gate behind the value in one matrix.

pocketlm                                    smallm
model.embed_tokens, model.embed_positions   embedding, pos_embedding
model.layers.N.input_layernorm              transformer.N.norm            for both branches
model.layers.N.self_attn.{q,k,v,o}_proj     transformer.N.attn.{q_proj,k_proj,v_proj,out_proj}
model.layers.N.mlp.{up,gate}_proj           transformer.N.ffn.w1          its first half, its second
model.layers.N.mlp.down_proj                transformer.N.ffn.w2
model.norm                                  final_norm
lm_head, if it is not the embedding         output
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.errors import FileError
from pocketlm.tensors import Tensors

MARKS = ("pos_embedding.weight", "transformer.0.ffn.w1.weight")
SIZES = ("d_model", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "max_seq_len")
NORM_EPS = 1e-6
LAYER = re.compile(r"transformer\.(\d+)\.([\w.]+)\.weight")
OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "pos_embedding.weight": "model.embed_positions.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "norm": ("input_layernorm",),
    "attn.q_proj": ("self_attn.q_proj",),
    "attn.k_proj": ("self_attn.k_proj",),
    "attn.v_proj": ("self_attn.v_proj",),
    "attn.out_proj": ("self_attn.o_proj",),
    "ffn.w1": ("mlp.up_proj", "mlp.gate_proj"),
    "ffn.w2": ("mlp.down_proj",),
}


def config_tree(path: Path, theirs: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of such a checkpoint, by the sizes that are saved in it.

    Raises:
        FileError: one of them is missing, or none.
    """
    for name in SIZES:
        if type(values.get(name)) is not int or values[name] < 1:
            raise FileError(f"{path}: {name} is {values.get(name)!r}; its weights need a number there")
    width, heads = values["d_model"], values["num_heads"]
    if width % heads:
        raise FileError(f"{path}: d_model {width} is no multiple of num_heads {heads}")
    head = theirs.get("output.weight")
    return {
        "model_type": "pocketlm",
        "vocab_size": values["vocab_size"],
        "hidden_size": width,
        "intermediate_size": theirs[MARKS[1]].numel() // (2 * width),
        "num_hidden_layers": values["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": values["num_kv_heads"],
        "head_dim": width // heads,
        "max_position_embeddings": values["max_seq_len"],
        "block": "parallel",
        "position": "learned",
        "norm_eps": NORM_EPS,
        "tie_word_embeddings": head is None or torch.equal(head, theirs["embedding.weight"]),
    }


def from_smallm(theirs: Mapping[str, Tensor]) -> Tensors:
    """Its tensors under our names; what has no place in the layout keeps its own."""
    ours: Tensors = {}
    for name, tensor in theirs.items():
        match = LAYER.fullmatch(name)
        if match and match[2] in INSIDE:
            names = [f"model.layers.{match[1]}.{part}.weight" for part in INSIDE[match[2]]]
            parts = tensor.chunk(len(names)) if tensor.ndim else [tensor]
            ours |= {part_name: part.clone() for part_name, part in zip(names, parts, strict=False)}
        else:
            ours[OUTSIDE.get(name, name)] = tensor
    return ours
