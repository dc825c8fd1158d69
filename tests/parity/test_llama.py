"""Our folders opened by transformers: the same logits, as near to float64 as transformers itself is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import assert_as_exact_as, random_model
from safetensors.torch import save_file

from pocketlm.config import Config, ModelConfig
from pocketlm.formats.huggingface import config_json, generation_config_json, model_config
from pocketlm.generate import engine
from pocketlm.generate.sampling import Sampling
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer, allocate

pytestmark = pytest.mark.usefixtures("one_thread")
transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 193,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "norm_eps": 1e-3,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, free head_dim, untied": {"head_dim": 20, "tie_word_embeddings": False},
    "llama, biases": {"bias": True},
    "llama 3, many queries a key": {"rope_llama3": (4.0, 1.0, 4.0, 48), "num_key_value_heads": 1},
    "qwen3": {"qk_norm": True, "head_dim": 20},
    "qwen3, untied": {"qk_norm": True, "tie_word_embeddings": False, "num_key_value_heads": 6},
}


def save(model: Transformer, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(model.config, end_id=0)))
    (folder / "generation_config.json").write_text(json.dumps(generation_config_json(Config().sample, 0)))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def opened(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    return model


@pytest.mark.goal("R16")
@pytest.mark.parametrize("name", LLAMAS)
def test_random_weights_give_transformers_logits(name: str, tmp_path: Path) -> None:
    model = random_model(ModelConfig.model_validate(TINY | LLAMAS[name]))
    save(model, tmp_path)
    theirs = opened(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if "qwen3" in name else "LlamaForCausalLM")
    ids = torch.randint(193, (3, 64), generator=torch.Generator().manual_seed(12))
    assert assert_as_exact_as(theirs, model, ids) <= 1e-5


@pytest.mark.goal("R16")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_document_masks_are_transformers_with_a_mask_and_positions(name: str, tmp_path: Path) -> None:
    """Both given to it token by token: it does not find the documents."""
    model = random_model(ModelConfig.model_validate(TINY | LLAMAS[name]))
    save(model, tmp_path)
    theirs = opened(tmp_path).double()
    lengths = (10, 1, 30, 23)
    ids = torch.randint(1, 193, (1, 64), generator=torch.Generator().manual_seed(12))
    ids[0, torch.tensor(lengths).cumsum(0) - 1] = 0
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    seen = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths))
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.float64).masked_fill_(seen == 0, torch.finfo(torch.float64).min)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    model.document_end = 0
    torch.testing.assert_close(model(ids).double(), expected, rtol=0, atol=1e-5)
    assert (theirs(ids).logits - expected).abs().max() > 0.01, "the masks would change nothing"


@pytest.mark.goal("R16")
@pytest.mark.parametrize("name", LLAMAS)
def test_greedy_text_is_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(ModelConfig.model_validate(TINY | LLAMAS[name] | {"max_position_embeddings": 80}), std=0.3)
    save(model, tmp_path)
    prompt = [3, 1, 4, 1, 5]
    theirs = opened(tmp_path).generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0
    )
    greedy = Sampling(temperature=0)
    ours = list(engine.generate(model.eval(), prompt, greedy, max_new_tokens=64, generator=torch.Generator()))
    assert ours == theirs[0, len(prompt) :].tolist()
    assert len(set(ours)) >= 8, "a text that stands still would prove little"


@pytest.mark.goal("R16")
@pytest.mark.parametrize("name", LLAMAS)
def test_a_folder_written_by_transformers_reads_back(name: str, tmp_path: Path) -> None:
    config = ModelConfig.model_validate(TINY | LLAMAS[name])
    model = random_model(config)
    save(model, tmp_path)
    opened(tmp_path).save_pretrained(tmp_path / "again")
    assert model_config(json.loads((tmp_path / "again" / "config.json").read_text())) == config


@pytest.mark.goal("R16")
def test_smollm2_135m(tmp_path: Path) -> None:
    config = Config.preset("smollm2-135m")
    model = allocate(config.model)
    init_weights(model, config.init, 0)
    save(model, tmp_path)
    theirs = opened(tmp_path)
    assert sum(weight.numel() for weight in theirs.parameters()) == 134_515_008
    assert_as_exact_as(theirs, model, torch.arange(24)[None] * 2003)


def test_generation_settings_are_read_by_transformers(tmp_path: Path) -> None:
    sample = Config.preset("smollm2-135m").sample
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config_json(sample, 5)))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.do_sample, theirs.temperature, theirs.top_k, theirs.top_p) == (True, 0.7, 0, 0.9)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (5, 5)


def test_transformers_refuses_what_it_cannot_compute(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(Config.preset("smallm").model, end_id=50256)))
    with pytest.raises(ValueError, match="pocketlm"):
        transformers.AutoConfig.from_pretrained(tmp_path)
