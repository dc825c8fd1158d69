"""Which of our models llama.cpp has, what it calls their numbers and matrices, and the way back.

    "llama"   rotary, RMSNorm, sequential, SwiGLU, biases on all projections or none; pairs of q and k are neighbours
    "qwen3"   the same with query-key norm, without biases; pairs are halves, as ours
    "gpt2"    learned positions, LayerNorm, GELU, biases, as many key-value as query heads; q, k and v in one matrix

It has none for parallel blocks, squared ReLU, a soft-cap in one of these, or half of what makes a GPT-2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pocketlm.clashes import problems
from pocketlm.config import ModelConfig
from pocketlm.errors import FileError, one_line
from pocketlm.formats.gguf_file import Header, read_tensor
from pocketlm.formats.huggingface import LLAMA3, MAX_LAYERS, tensor_shapes
from pocketlm.formats.pairs import halves, neighbours
from pocketlm.model.transformer import Llama3Scaling, llama3_scaled, rotary_frequencies
from pocketlm.tensors import Shapes

OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FACTORS, ORIGINAL_CONTEXT = "rope_freqs.weight", "rope.scaling.original_context_length"
"""By how much slower each pair of a Llama 3 turns, and in which context it was first trained."""
SCALING = [f"pocketlm.rope_llama3.{name}" for name in LLAMA3[:-1]]
"""What gives these factors, which do not tell it in each case; files of others do not say, and low is 1 and high 4."""
IN_ONE = re.compile(r"(blk\.\d+\.)attn_[qkv]\.(weight|bias)")
"""GPT-2's, which lie above one another in `attn_qkv`."""

Number = int | float


_ALL: dict[str, object] = {"block": "sequential", "logit_softcap": None}
_ROTARY = _ALL | {"position": "rope", "norm": "rms", "mlp": "swiglu"}
KINDS: dict[str, dict[str, object]] = {
    "llama": _ROTARY | {"qk_norm": False},
    "qwen3": _ROTARY | {"qk_norm": True, "bias": False, "rope_llama3": None},
    "gpt2": _ALL | {"position": "learned", "norm": "layer", "mlp": "gelu", "qk_norm": False, "bias": True},
}
"""What makes a model one of these."""


def architecture(model: ModelConfig) -> str | None:
    """llama.cpp's name for a model; None if it has none that computes the same."""
    return next((arch for arch in KINDS if not _differences(model, arch)), None)


def in_the_way(model: ModelConfig) -> list[str]:
    """What of a model without an architecture differs from the nearest one, a field each."""
    return min((_differences(model, arch) for arch in KINDS), key=len)


def _differences(model: ModelConfig, arch: str) -> list[str]:
    wanted = dict(KINDS[arch])
    if arch == "gpt2":
        wanted |= {"num_key_value_heads": model.num_attention_heads}
        wanted |= {"head_dim": model.hidden_size / model.num_attention_heads}
    return [f"{name} {getattr(model, name)}" for name, value in wanted.items() if getattr(model, name) != value]


def fields_of(model: ModelConfig, arch: str) -> dict[str, Number]:
    """The numbers of a model, by their keys in a GGUF file."""
    numbers: dict[str, Number] = {
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "block_count": model.num_hidden_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.num_key_value_heads,
        "vocab_size": model.vocab_size,
    }
    if arch == "gpt2":
        numbers["attention.layer_norm_epsilon"] = model.norm_eps
    else:
        numbers |= {
            "attention.key_length": model.head_dim,
            "attention.value_length": model.head_dim,
            "attention.layer_norm_rms_epsilon": model.norm_eps,
            "rope.dimension_count": model.head_dim,
            "rope.freq_base": model.rope_theta,
        }
        if model.rope_llama3:
            numbers[ORIGINAL_CONTEXT] = model.rope_llama3[-1]
    own = dict(zip(SCALING, model.rope_llama3 or (), strict=False))
    return {f"{arch}.{name}": number for name, number in numbers.items()} | own


def tensors_of(model: ModelConfig, arch: str, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a GGUF file, one by one, each made when it is asked for."""
    if model.rope_llama3:
        yield FACTORS, _factors(model.head_dim, model.rope_theta, model.rope_llama3)
    for name, ours in _names(model, arch).items():
        parts = [_turned(model, arch, each, weights[each], neighbours) for each in ours]
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


def shapes_of(model: ModelConfig, arch: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the GGUF file of a model, in its order."""
    factors = {FACTORS: (model.head_dim // 2,)} if model.rope_llama3 else {}
    return factors | _their_shapes(model, arch, tensor_shapes(model))


def model_config(header: Header) -> ModelConfig:
    """The architecture that a GGUF file describes; every tensor of it is in the file, in its shape, and no other.

    Raises:
        FileError: another kind of model, an option that we do not compute, or tensors that do not fit the numbers.
    """
    path, arch = header.path, header.fields.get("general.architecture")
    if arch not in ("llama", "qwen3", "gpt2"):
        raise FileError(f"{path}: given the architecture {one_line(repr(arch))}; allowed are llama, qwen3 and gpt2")
    numbers = _Numbers(header, str(arch))
    _refuse_other_options(header, numbers)
    try:
        model = ModelConfig.model_validate(_model_fields(header, numbers))
    except ValidationError as error:
        raise FileError(f"{path} is damaged: {problems(error)[0].removeprefix(': ')}") from None
    if model.num_hidden_layers > min(MAX_LAYERS, len(header.tensors)):
        raise FileError(f"{path} is damaged: {model.num_hidden_layers:,} layers in {len(header.tensors):,} tensors")
    _check_shapes(header, str(arch), shapes_of(model, str(arch)))
    return model


def from_tensors(model: ModelConfig, arch: str, theirs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a GGUF file under our names, in our order of rows."""
    names, weights = _names(model, arch), dict[str, Tensor]()
    for name, tensor in theirs:
        if name == FACTORS:
            continue
        parts = tensor.chunk(len(names[name]))
        for ours, part in zip(names[name], parts, strict=True):
            weights[ours] = _turned(model, arch, ours, part, halves)
    return weights


# --- names


def _names(model: ModelConfig, arch: str) -> dict[str, list[str]]:
    """Each tensor of a GGUF file, with those of ours that lie in it, in the order of the file."""
    names: dict[str, list[str]] = {}
    for ours in tensor_shapes(model):
        theirs = _their_name(ours)
        if arch == "gpt2":
            theirs = IN_ONE.sub(r"\1attn_qkv.\2", theirs)
        names.setdefault(theirs, []).append(ours)
    return names


def _their_name(ours: str) -> str:
    module, _, part = ours.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{part}"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{INSIDE[inside]}.{part}"


def _their_shapes(model: ModelConfig, arch: str, ours: Shapes) -> dict[str, tuple[int, ...]]:
    return {
        theirs: (sum(ours[name][0] for name in names), *ours[names[0]][1:])
        for theirs, names in _names(model, arch).items()
    }


def _turned(model: ModelConfig, arch: str, name: str, tensor: Tensor, turn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """q and k of a "llama" with the pairs as the other side has them; everything else as it is."""
    heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}
    projection = name.split(".")[-2]
    return turn(tensor, heads[projection]) if arch == "llama" and projection in heads else tensor


# --- reading numbers


class _Numbers:
    """The numbers of one architecture in a header."""

    def __init__(self, header: Header, arch: str) -> None:
        self.header, self.arch = header, arch

    def get(self, name: str, default: Number | None = None) -> Number:
        """
        Raises:
            FileError: it is no number, or is not there and has no default.
        """
        key = f"{self.arch}.{name}"
        value = self.header.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            given = "not there" if value is None else f"{one_line(str(value))[:40]!r}"
            raise FileError(f"{self.header.path}: {key} is {given}; a {self.arch} model needs a number there")
        return value


def _model_fields(header: Header, numbers: _Numbers) -> dict[str, Any]:
    embedding = header.tensors.get("token_embd.weight")
    heads, width = numbers.get("attention.head_count"), numbers.get("embedding_length")
    fields: dict[str, Any] = {
        "vocab_size": embedding.shape[0] if embedding else numbers.get("vocab_size"),
        "hidden_size": width,
        "intermediate_size": numbers.get("feed_forward_length"),
        "num_hidden_layers": numbers.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": numbers.get("attention.head_count_kv", heads),
        "head_dim": _head_dim(numbers),
        "max_position_embeddings": numbers.get("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bias": any(name.endswith(("attn_q.bias", "attn_qkv.bias")) for name in header.tensors),
        "qk_norm": numbers.arch == "qwen3",
    }
    if numbers.arch == "gpt2":
        eps = numbers.get("attention.layer_norm_epsilon")
        return fields | {"position": "learned", "norm": "layer", "mlp": "gelu", "norm_eps": eps}
    theta = numbers.get("rope.freq_base", 10000.0)
    fields |= {"norm_eps": numbers.get("attention.layer_norm_rms_epsilon"), "rope_theta": theta}
    return fields | {"rope_llama3": _scaling(header, numbers, fields["head_dim"], theta)}


def _head_dim(numbers: _Numbers) -> Number:
    """The width of a head, said or by the model's."""
    derived = numbers.get("embedding_length") // (numbers.get("attention.head_count") or 1)
    return numbers.get("attention.key_length", derived)


def _factors(head_dim: int, theta: float, scaling: Llama3Scaling) -> Tensor:
    """By how much slower each pair turns, (D/2,)."""
    frequencies = rotary_frequencies(head_dim, theta)
    return frequencies / llama3_scaled(frequencies, scaling)


def _scaling(header: Header, numbers: _Numbers, head_dim: Number, theta: Number) -> Llama3Scaling | None:
    """Llama 3's scaling, as a file of ours says it, or found again from the factors that it gives.

    Raises:
        FileError: it does not give them.
    """
    if FACTORS not in header.tensors:
        return None
    given, original = read_tensor(header, FACTORS).flatten(), numbers.get(ORIGINAL_CONTEXT, 8192)
    usual = given.max().item(), 1.0, 4.0
    said = [header.fields.get(key, number) for key, number in zip(SCALING, usual, strict=True)]
    factor, low, high = (number if isinstance(number, float) else 0.0 for number in said)
    if len(given) == head_dim / 2 and theta > 0 and isinstance(original, int):
        scaling = (factor, low, high, original)
        possible = low < high and min(scaling) > 0
        if possible and torch.allclose(given, _factors(int(head_dim), theta, scaling), rtol=1e-4):
            return scaling
    raise FileError(f"{header.path}: scaled rotary positions in {FACTORS}; allowed are those of Llama 3, or plain ones")


def _refuse_other_options(header: Header, numbers: _Numbers) -> None:
    """What a file may ask for and our model does not compute."""
    arch, path = numbers.arch, header.path
    if header.fields.get("split.count", 1) not in (0, 1):
        raise FileError(f"{path} is one of several parts; llama.cpp joins them: llama-gguf-split --merge FIRST WHOLE")
    scaling = header.fields.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise FileError(
            f"{path}: scaled rotary positions ({one_line(str(scaling))}); allowed are Llama 3's, or plain ones"
        )
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if f"{arch}.rope.scaling.type" not in header.fields and numbers.get(name, 1) not in (0, 1):
            raise FileError(
                f"{path}: {arch}.{name} is {numbers.get(name)}, which without a type is linear scaling of rotary "
                "positions; allowed are Llama 3's, or plain ones"
            )
    if (factor := numbers.get("rope.scaling.attn_factor", 1)) != 1:
        raise FileError(f"{path}: {arch}.rope.scaling.attn_factor is {factor}; allowed is 1")
    if header.fields.get(f"{arch}.attention.causal", True) is not True:
        raise FileError(f"{path}: given attention to later tokens, too; allowed is causal attention")
    if numbers.get("expert_count", 0):
        raise FileError(f"{path}: a mixture of {numbers.get('expert_count')} experts; allowed is a dense model")
    if numbers.get("attention.sliding_window", 0):
        raise FileError(f"{path}: given sliding-window attention; allowed is full attention in every layer")
    if arch == "gpt2":
        return
    head = _head_dim(numbers)
    for name in ("attention.value_length", "rope.dimension_count"):
        if head and numbers.get(name, head) != head:
            raise FileError(f"{path}: {arch}.{name} is {numbers.get(name)}; allowed is {head}, the width of a head")


def _check_shapes(header: Header, arch: str, expected: Shapes) -> None:
    path, shapes = header.path, {name: place.shape for name, place in header.tensors.items()}
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing and arch != "gpt2" and all(name.endswith(".bias") for name in missing):
        raise FileError(f"{path} has no {missing[0]}; allowed are biases on all projections of a {arch} model, or none")
    if missing:
        raise FileError(f"{path} is damaged: {missing[0]} is missing")
    if extra:
        raise FileError(f"{path}: {one_line(extra[0])} has no place in a model that pocketlm has")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise FileError(f"{path} is damaged: {name} is {shapes[name]}, not {shape}")
