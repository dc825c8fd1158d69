"""GPT-2's layout on the Hub: other names, matrices stored as (inputs, outputs), and q, k and v in one.

    pocketlm, and every other layout here           GPT-2
    model.embed_tokens, model.embed_positions       wte, wpe
    model.layers.N.input_layernorm                  h.N.ln_1
    model.layers.N.self_attn.{q,k,v}_proj           h.N.attn.c_attn        beside each other, transposed
    model.layers.N.self_attn.o_proj                 h.N.attn.c_proj        transposed
    model.layers.N.post_attention_layernorm         h.N.ln_2
    model.layers.N.mlp.{up,down}_proj               h.N.mlp.{c_fc,c_proj}  transposed
    model.norm                                      ln_f

Its model is one of ours: sequential blocks, learned positions, LayerNorm, GELU (tanh), a bias everywhere, as many
key-value as query heads. Released files have these names bare, or behind `transformer.`; both are read, the second is
written, as transformers does. Nothing is computed: what is read and written back has the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pocketlm.config import ModelConfig
from pocketlm.errors import FileError
from pocketlm.tensors import Shapes, Tensors

PREFIX, HEAD = "transformer.", "lm_head.weight"
BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
"""The mask that says what is later, which released files hold: no weights."""
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
LAYOUT = {"block": "sequential", "position": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
OUTSIDE = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
INSIDE = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def is_gpt2(model: ModelConfig) -> bool:
    """Whether a model has GPT-2's layout, so that transformers' class for it computes the same."""
    kinds = all(getattr(model, name) == value for name, value in LAYOUT.items())
    heads = model.num_key_value_heads == model.num_attention_heads
    width = model.num_attention_heads * model.head_dim == model.hidden_size
    return kinds and heads and width and not model.qk_norm and model.logit_softcap is None


def config_fields(model: ModelConfig) -> dict[str, Any]:
    """What GPT-2's config.json says of a model in its layout; the dropout is that of a model which is not trained."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "n_ctx": model.max_position_embeddings,
        "n_embd": model.hidden_size,
        "n_inner": model.intermediate_size,
        "n_layer": model.num_hidden_layers,
        "n_head": model.num_attention_heads,
        "activation_function": GELU_TANH[0],
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        **{name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    }


def model_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a GPT-2's config.json describes.

    Raises:
        FileError: an option that we do not compute, or a number that is missing.
    """
    _refuse_other_options(tree)
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if not isinstance(tree.get(name), int | float):
            raise FileError(f"config.json: {name} is {tree.get(name)!r}; a gpt2 model needs a number there")
    width, heads = tree["n_embd"], tree["n_head"]
    if not heads or width % heads:
        raise FileError(f"config.json: n_embd {width} is no multiple of n_head {heads}")
    return {
        "vocab_size": tree["vocab_size"],
        "hidden_size": width,
        "intermediate_size": 4 * width if tree.get("n_inner") is None else tree["n_inner"],
        "num_hidden_layers": tree["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "max_position_embeddings": tree["n_positions"],
        "norm_eps": tree.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": tree.get("tie_word_embeddings", True),
    } | LAYOUT


def _refuse_other_options(tree: Mapping[str, Any]) -> None:
    given = tree.get("activation_function", GELU_TANH[0])
    if given not in GELU_TANH:
        raise FileError(f"config.json: activation_function {given!r}; allowed are {' and '.join(map(repr, GELU_TANH))}")
    needed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in needed.items():
        if tree.get(name, value) is not value:
            raise FileError(f"config.json: {name} is {tree[name]!r}; allowed is {str(value).lower()}")


def shapes(model: ModelConfig, ours: Shapes, prefix: str = PREFIX) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a GPT-2's file, from those under our names."""

    def shape(names: tuple[str, ...]) -> tuple[int, ...]:
        first = ours[names[0]]
        return (len(names) * first[0], *first[1:])

    return {
        _behind(prefix, theirs): shape(names)[::-1] if _is_matrix(theirs) else shape(names)
        for theirs, names in _names(model).items()
    }


def from_gpt2(model: ModelConfig, theirs: Mapping[str, Tensor], prefix: str = PREFIX) -> Tensors:
    """A GPT-2's tensors under our names; each has memory of its own."""
    ours: Tensors = {}
    for their_name, names in _names(model).items():
        tensor = theirs[_behind(prefix, their_name)]
        parts = (tensor.T if _is_matrix(their_name) else tensor).chunk(len(names))
        ours |= {name: part.contiguous().clone() for name, part in zip(names, parts, strict=True)}
    return ours


def to_gpt2(model: ModelConfig, ours: Mapping[str, Tensor]) -> Tensors:
    """The reverse, as transformers names them."""
    theirs: Tensors = {}
    for their_name, names in _names(model).items():
        tensor = torch.cat([ours[name] for name in names])
        theirs[_behind(PREFIX, their_name)] = tensor.T.contiguous() if _is_matrix(their_name) else tensor
    return theirs


def prefix_in(names: Collection[str]) -> str:
    """What the names of a GPT-2's file stand behind."""
    return "" if "wte.weight" in names else PREFIX


def _names(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Each of their tensors, with those of ours that lie in it."""
    whole: dict[str, tuple[str, ...]] = {theirs: (f"model.{ours}",) for theirs, ours in OUTSIDE.items()}
    for layer in range(model.num_hidden_layers):
        for theirs, names in INSIDE.items():
            whole[f"h.{layer}.{theirs}"] = tuple(f"model.layers.{layer}.{ours}" for ours in names)
    found = {}
    for theirs, names in whole.items():
        for part in ("weight",) if theirs in ("wte", "wpe") else ("weight", "bias"):
            found[f"{theirs}.{part}"] = tuple(f"{ours}.{part}" for ours in names)
    return found if model.tie_word_embeddings else found | {HEAD: (HEAD,)}


def _behind(prefix: str, name: str) -> str:
    return name if name == HEAD else prefix + name


def _is_matrix(name: str) -> bool:
    """Whether a tensor of theirs is stored as (inputs, outputs)."""
    return ".c_" in name and name.endswith(".weight")
