"""A model folder in Hugging Face's words: config.json, generation_config.json and tokenizer_config.json as values.

    Llama layout                            model_type "llama"      rotary, RMSNorm, sequential, SwiGLU
    the same with query-key norm, no bias   model_type "qwen3"
    everything else                         model_type "pocketlm"   ModelConfig's own fields

transformers opens the first two as they are: names and shapes of the weights are already its own. It has no class for
a "pocketlm" model (parallel blocks, learned positions, a soft-cap ...) and says so; pocketlm opens all three, and the
fourth of the Hub, "gpt2" (gpt2.py). How the weights lie on the disk is in huggingface_weights.py.
Nothing here names a clock, a host or a version, so that equal models have equal files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from pocketlm.config import ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.formats import gpt2
from pocketlm.model.sizes import parameters
from pocketlm.model.transformer import Transformer

Tree = dict[str, Any]

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)
"""Fields that `ModelConfig` and config.json have under one name."""

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""The names of the numbers in `ModelConfig.rope_llama3`."""
ROPE_KEYS = {"rope_type", "type", "rope_theta", *LLAMA3}

MAX_PARAMETERS = 100_000_000_000
MAX_LAYERS = 1_000


def config_json(model: ModelConfig, *, end_id: int | None) -> Tree:
    """config.json of `model`; `end_id` ends a text, and begins one where a model asks for that."""
    kind = model_type(model)
    ends = {"bos_token_id": end_id, "eos_token_id": end_id}
    # transformers 4 before 4.56 reads only torch_dtype, later ones prefer dtype.
    dtypes = {"dtype": "float32", "torch_dtype": "float32"}
    if kind == "pocketlm":
        return {"model_type": kind} | model.model_dump(mode="json") | ends | dtypes
    shared = {name: getattr(model, name) for name in SHARED}
    numbers = {"hidden_act": "silu", "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta}
    options: Tree = {"mlp_bias": model.bias} if kind == "llama" else {"use_sliding_window": False}
    options |= {"attention_bias": model.bias}
    if model.rope_llama3:
        options["rope_scaling"] = {"rope_type": "llama3"} | dict(zip(LLAMA3, model.rope_llama3, strict=True))
    return {"model_type": kind, "architectures": [ARCHITECTURES[kind]]} | shared | numbers | options | ends | dtypes


def model_config(tree: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes: what `config_json` writes, and the three kinds of the Hub.

    Code that a folder brings along (`auto_map`) is not looked at: what `model_type` says is read, or nothing.

    Raises:
        FileError: another kind of model, an option that we do not compute, or numbers that make no model.
    """
    kind = tree.get("model_type")
    if kind == "pocketlm":
        fields = {name: tree[name] for name in ModelConfig.model_fields if name in tree}
    elif kind == "gpt2":
        fields = gpt2.model_fields(tree)
    elif isinstance(kind, str) and kind in ARCHITECTURES:
        fields = _llama_fields(tree)
    else:
        raise FileError(f"config.json: given model_type {kind!r}; allowed are llama, qwen3, gpt2 and pocketlm")
    try:
        model = ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise FileError(f"config.json: {_first_problem(error)}") from None
    if model.num_hidden_layers > MAX_LAYERS or parameters(model).total > MAX_PARAMETERS:
        raise FileError(
            f"config.json: {model.num_hidden_layers:,} layers and {parameters(model).total:,} parameters; "
            f"allowed are {MAX_LAYERS:,} and {MAX_PARAMETERS:,}"
        )
    return model


def generation_config_json(sample: SampleConfig, end_id: int | None) -> Tree:
    """generation_config.json of how a model speaks. Temperature 0 is `do_sample: false`, where nothing else counts."""
    ends = {"bos_token_id": end_id, "eos_token_id": end_id}
    if sample.temperature == 0:
        return {"do_sample": False} | ends
    return {
        "do_sample": True,
        "temperature": sample.temperature,
        "top_k": sample.top_k,
        "top_p": sample.top_p,
    } | ends


def sample_config(tree: Mapping[str, Any]) -> SampleConfig:
    """Temperature, top-k and top-p of a generation_config.json; what it does not say is our default.

    Raises:
        FileError: a value out of its range.
    """
    fields = {name: tree[name] for name in ("temperature", "top_k", "top_p") if tree.get(name) is not None}
    if tree.get("do_sample") is False:
        fields = {"temperature": 0.0}
    try:
        return SampleConfig.model_validate(fields)
    except ValidationError as error:
        raise FileError(f"generation_config.json: {_first_problem(error)}") from None


def end_ids(tree: Mapping[str, Any], vocab_size: int) -> frozenset[int]:
    """The ids that end a text, by a generation_config.json, or by the config.json of a folder without one.

    Raises:
        FileError: they are none, or the model has none such.
    """
    given = tree.get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if wrong := [number for number in ids if type(number) is not int]:
        raise FileError(f"generation_config.json: eos_token_id is {wrong[0]!r}; allowed is an id, or a list of them")
    if strange := [number for number in ids if not 0 <= number < vocab_size]:
        raise FileError(
            f"generation_config.json: eos_token_id is {strange[0]}; allowed are ids of the model, 0 to {vocab_size - 1}"
        )
    return frozenset(ids)


def tokenizer_config_json(end_token: str, *, begin_token: str | None = None, context: int | None = None) -> Tree:
    """tokenizer_config.json beside a tokenizer.json whose end-of-text token is `end_token`.

    The class is always named: without it transformers picks one by model type, which may split text in other ways.
    Padding is on the left, where generating wants it, and with what ends a text, which a mask then hides.

    Args:
        begin_token: what the tokenizer.json puts before a text.
        context: how many tokens the model takes, where there is one.
    """
    longest = {} if context is None else {"model_max_length": context}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin_token or end_token,
        "eos_token": end_token,
        "pad_token": end_token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    } | longest


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the model's file, without allocating one."""
    with torch.device("meta"):
        weights = Transformer(model)
    return {name: tuple(weight.shape) for name, weight in weights.named_parameters()}


def model_type(model: ModelConfig) -> str:
    """What the config.json of a checkpoint calls a model."""
    llama_like = (model.block, model.position, model.norm, model.mlp) == ("sequential", "rope", "rms", "swiglu")
    if not llama_like or model.logit_softcap is not None or (model.qk_norm and model.bias):
        return "pocketlm"
    if model.qk_norm:
        return "qwen3"
    # transformers refuses other Llamas, though nothing in them needs it
    return "llama" if model.hidden_size % model.num_attention_heads == 0 else "pocketlm"


def _llama_fields(tree: Mapping[str, Any]) -> Tree:
    """A Llama's or Qwen3's fields as ours; what a file may leave out is what transformers' classes then take."""
    _refuse_other_options(tree)
    kind = tree["model_type"]
    may_lack = ("num_key_value_heads", "head_dim") if kind == "llama" else ()
    needed = [name for name in (*SHARED, "rms_norm_eps") if name not in (*may_lack, "tie_word_embeddings")]
    for name in needed:
        if not isinstance(tree.get(name), int | float):
            raise FileError(f"config.json: {name} is {tree.get(name)!r}; a {kind} model needs a number there")
    heads = tree["num_attention_heads"]
    derived = {
        "num_key_value_heads": heads,
        "head_dim": tree["hidden_size"] // (heads or 1),
        "tie_word_embeddings": False,
    }
    shared = {name: derived.get(name) if tree.get(name) is None else tree[name] for name in SHARED}
    return shared | {
        "rope_theta": _rope(tree).get("rope_theta", tree.get("rope_theta", 10000.0)),
        "rope_llama3": _llama3(tree),
        "norm_eps": tree["rms_norm_eps"],
        "bias": tree.get("attention_bias", False),
        "qk_norm": kind == "qwen3",
    }


def _refuse_other_options(tree: Mapping[str, Any]) -> None:
    """What Llama and Qwen3 files may ask for and our model does not compute."""
    if tree.get("hidden_act", "silu") != "silu":
        raise FileError(f"config.json: hidden_act {tree['hidden_act']!r}; allowed is 'silu'")
    layers = tree.get("layer_types") or []
    if tree.get("use_sliding_window") or not isinstance(layers, list) or layers.count("full_attention") < len(layers):
        raise FileError("config.json: given sliding-window attention; allowed is full attention in every layer")
    biases = tree.get("attention_bias", False), tree.get("mlp_bias", False)
    if biases[0] != biases[1]:
        raise FileError(
            f"config.json: attention_bias, mlp_bias are {biases[0]}, {biases[1]}; allowed is both or neither"
        )


def _rope(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 has `rope_parameters`; 4 has a top-level `rope_theta` and perhaps `rope_scaling`, which goes
    first where both are given."""
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(tree.get(name), Mapping) and tree[name]:
            rope: Mapping[str, Any] = tree[name]
            return rope
    return {}


def _llama3(tree: Mapping[str, Any]) -> list[Any] | None:
    """The four numbers of Llama 3's scaling; none where the rotary positions are not scaled.

    Raises:
        FileError: they are scaled in another way, or one of the numbers is missing.
    """
    rope = _rope(tree)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise FileError(f"config.json: rope type {rope_type!r}; allowed are 'default' and 'llama3'")
    unknown = {name for name in rope.keys() - ROPE_KEYS if rope[name] is not None}
    if tree.get("partial_rotary_factor") is not None:
        unknown.add("partial_rotary_factor")
    if unknown:
        raise FileError(f"config.json: rotary positions with {min(unknown)!r}, a field that pocketlm does not have")
    if rope_type == "default":
        return None
    # what transformers takes where the original context is not said
    numbers: Tree = {"original_max_position_embeddings": tree["max_position_embeddings"]} | dict(rope)
    if missing := [name for name in LLAMA3 if not isinstance(numbers.get(name), int | float)]:
        raise FileError(f"config.json: {missing[0]} is {numbers.get(missing[0])!r}; rope type 'llama3' needs a number")
    return [numbers[name] for name in LLAMA3]


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be ", "allowed is ")
    return f"{first['loc'][0]} is {first['input']!r}; {message}" if first["loc"] else message
