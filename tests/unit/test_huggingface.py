"""config.json there and back, the released one, and what is refused with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketlm.config import Config, ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.formats import huggingface as hf
from pocketlm.formats.release import tokenizer_texts
from pocketlm.model.sizes import parameters
from pocketlm.model.transformer import Transformer
from pocketlm.text.tokenizer import byte_tokenizer
from pocketlm.toml_trees import preset_names

RELEASED = Path(__file__).parents[3] / "shared/data/tokenizers/smollm2/config.json"
LLAMA = hf.config_json(Config.preset("smollm2-135m").model, end_id=0)
QWEN3 = hf.config_json(Config.preset("tiny").model, end_id=0)

# What of the config.json of released models says anything, and how many parameters their files have.
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "attn_pdrop": 0.1,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
TINYLLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "pretraining_tp": 1,
}
SCALED: dict[str, Any] = TINYLLAMA | {
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 16,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "rope_type": "llama3",
        "original_max_position_embeddings": 8192,
    },
}
QWEN3_06B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
}
RELEASES = {
    "TinyLlama": (TINYLLAMA, 1_100_048_384),
    "Llama 3.2 1B": (SCALED, 1_235_814_400),
    "Qwen3 0.6B": (QWEN3_06B, 596_049_920),
    "GPT-2": (GPT2, 124_439_808),
}


@pytest.mark.goal("R16")
@pytest.mark.parametrize("preset", preset_names().split(", "))
def test_presets_round_trip_through_json(preset: str) -> None:
    model = Config.preset(preset).model
    assert hf.model_config(json.loads(json.dumps(hf.config_json(model, end_id=0)))) == model


@pytest.mark.goal("R16")
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "llama"),
        ({"bias": True, "head_dim": 10, "tie_word_embeddings": False}, "llama"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "bias": True}, "pocketlm"),
        ({"block": "parallel"}, "pocketlm"),
        ({"position": "learned"}, "pocketlm"),
        ({"norm": "layer"}, "pocketlm"),
        ({"mlp": "gelu"}, "pocketlm"),
        ({"mlp": "relu2"}, "pocketlm"),
        ({"logit_softcap": 15.0}, "pocketlm"),
        ({"hidden_size": 250}, "pocketlm"),
        ({"hidden_size": 250, "qk_norm": True}, "qwen3"),
        ({"rope_llama3": (8.0, 1.0, 4.0, 8192)}, "llama"),
        ({"rope_llama3": (8.0, 1.0, 4.0, 8192), "block": "parallel"}, "pocketlm"),
    ],
    ids=str,
)
def test_every_layout_has_a_model_type_and_comes_back(fields: dict[str, Any], kind: str) -> None:
    model = ModelConfig.model_validate(fields)
    tree = hf.config_json(model, end_id=None)
    assert tree["model_type"] == kind
    assert ("architectures" in tree) == (kind != "pocketlm")
    assert hf.model_config(tree) == model


def test_what_every_config_json_says() -> None:
    for tree, theta in ((LLAMA, 1e4), (QWEN3, 1e6), (hf.config_json(Config.preset("smallm").model, end_id=0), 1e4)):
        assert tree["rope_theta"] == theta
        assert tree["dtype"] == tree["torch_dtype"] == "float32"
        assert tree["bos_token_id"] == tree["eos_token_id"] == 0
        assert "transformers_version" not in tree
    assert hf.config_json(ModelConfig(), end_id=None)["eos_token_id"] is None  # a Llama's default would be 2


@pytest.mark.skipif(not RELEASED.exists(), reason="the released config.json is not beside this checkout")
def test_the_released_smollm2_differs_in_context_and_theta_only() -> None:
    model = hf.model_config(json.loads(RELEASED.read_text()))
    ours = Config.preset("smollm2-135m").model
    assert model == ours.model_copy(update={"max_position_embeddings": 8192, "rope_theta": 100000.0})


@pytest.mark.goal("R16")
@pytest.mark.parametrize("name", RELEASES)
def test_released_models_have_the_parameters_of_their_files(name: str) -> None:
    tree, num_parameters = RELEASES[name]
    model = hf.model_config(tree)
    assert parameters(model).total == num_parameters
    assert model.rope_llama3 == ((32.0, 1.0, 4.0, 8192) if tree is SCALED else None)
    if tree is not GPT2:
        assert hf.model_config(hf.config_json(model, end_id=0)) == model


def test_what_an_older_llama_leaves_out() -> None:
    lacking = {"num_key_value_heads", "head_dim", "rope_theta", "attention_bias", "mlp_bias", "tie_word_embeddings"}
    model = hf.model_config({name: value for name, value in LLAMA.items() if name not in lacking})
    assert (model.num_key_value_heads, model.head_dim, model.rope_theta) == (9, 64, 10000.0)
    assert (model.bias, model.tie_word_embeddings) == (False, False)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_plain_rope_in_both_spellings(key: str) -> None:
    assert hf.model_config(LLAMA | {key: {"rope_type": "default", "rope_theta": 5e5}}).rope_theta == 5e5
    assert hf.model_config(LLAMA | {"rope_scaling": None}).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "model_type None; allowed are llama, qwen3, gpt2 and pocketlm"),
        (LLAMA | {"model_type": "gpt_neox"}, "'gpt_neox'"),
        (LLAMA | {"model_type": "gpt2"}, "n_positions is None"),
        (GPT2 | {"n_head": 5}, "n_embd 768 is no multiple of n_head 5"),
        (GPT2 | {"n_head": 0}, "n_embd 768 is no multiple of n_head 0"),
        (GPT2 | {"activation_function": "gelu"}, "activation_function 'gelu'"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; allowed is false"),
        (LLAMA | {"hidden_size": None}, "hidden_size is None"),
        (LLAMA | {"hidden_size": "wide"}, "hidden_size is 'wide'"),
        (LLAMA | {"hidden_size": -576}, "hidden_size is -576"),
        (LLAMA | {"hidden_size": float("nan")}, "hidden_size"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (LLAMA | {"num_attention_heads": 10}, "no multiple of num_key_value_heads 3"),
        (LLAMA | {"head_dim": 7}, "head_dim 7 is odd"),
        (LLAMA | {"rope_theta": "1e4x"}, "rope_theta"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'; allowed are"),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor is None"),
        (LLAMA | {"rope_scaling": SCALED["rope_scaling"] | {"high_freq_factor": 1.0}}, "low below high"),
        (LLAMA | {"rope_scaling": SCALED["rope_scaling"] | {"factor": -1}}, "rope_llama3 is -1"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor', a field that pocketlm does not have"),
        (LLAMA | {"rope_scaling": {"rope_type": "default", "mrope_section": [2]}}, "'mrope_section'"),
        (LLAMA | {"attention_bias": True}, "attention_bias, mlp_bias are True, False"),
        (QWEN3 | {"attention_bias": True}, "attention_bias, mlp_bias are True, False"),
        (QWEN3 | {"use_sliding_window": True}, "sliding-window"),
        (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        (QWEN3 | {"head_dim": None}, "head_dim is None"),
        (LLAMA | {"num_hidden_layers": 2000}, "2,000 layers"),
        (LLAMA | {"hidden_size": 10**7}, "parameters; allowed are"),
        ({"model_type": "pocketlm", "block": "round"}, "block is 'round'; allowed is 'sequential' or 'parallel'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_one_line(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(FileError) as refusal:
        hf.model_config(tree)
    message = str(refusal.value)
    assert message.startswith("config.json: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("preset", preset_names().split(", "))
def test_sampling_round_trips(preset: str) -> None:
    sample = Config.preset(preset).sample
    again = hf.sample_config(hf.generation_config_json(sample, 3))
    assert (again.temperature, again.top_k, again.top_p) == (sample.temperature, sample.top_k, sample.top_p)


def test_greedy_is_do_sample_false() -> None:
    tree = hf.generation_config_json(SampleConfig(temperature=0), 3)
    assert tree == {"do_sample": False, "bos_token_id": 3, "eos_token_id": 3}
    assert hf.sample_config(tree).temperature == 0


def test_sampling_that_is_not_said_is_ours_and_nonsense_is_refused() -> None:
    assert hf.sample_config({"eos_token_id": 2, "temperature": None}) == SampleConfig()
    with pytest.raises(FileError, match=r"generation_config\.json: top_p is 3"):
        hf.sample_config({"top_p": 3})


def test_ids_that_end_a_text() -> None:
    assert hf.end_ids({"eos_token_id": [128001, 128009]}, 128256) == {128001, 128009}
    assert hf.end_ids({"eos_token_id": [2, 0]}, 3) == {2, 0}
    assert hf.end_ids({}, 3) == hf.end_ids({"eos_token_id": None}, 3) == set()
    for wrong in ("2", 2.0, True, [2, [3]], -5, 3, [1, 99999]):
        with pytest.raises(FileError, match=r"generation_config\.json: eos_token_id is"):
            hf.end_ids({"eos_token_id": wrong}, 3)


def test_the_tokenizer_class_is_named() -> None:
    tree = hf.tokenizer_config_json("<|endoftext|>")
    assert tree["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tree["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("preset", ["debug", "smallm"])
def test_tensor_shapes_are_those_of_the_state_dict(preset: str) -> None:
    model = Config.preset(preset).model
    with torch.device("meta"):
        state = Transformer(model).state_dict()
    assert hf.tensor_shapes(model) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_a_model_whose_files_name_no_token_that_begins_a_text_gets_none() -> None:
    """A template would write it before each conversation: `{{ bos_token }}`."""
    tokenizer = byte_tokenizer()
    end = tokenizer.end_token

    def named(names: dict[str, str]) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(tokenizer_texts(tokenizer, names)["tokenizer_config.json"])
        return tree

    assert "bos_token" not in named({"pad_token": end})
    assert named({"bos_token": end})["bos_token"] == end
    assert named({})["bos_token"] == end, "of our own: what ends a text is what stands before the next"
