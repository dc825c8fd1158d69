"""A checkpoint of a run is a Hugging Face folder as it is: model, tokenizer and generation settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import pocketlm
from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.training.loop import train

TEXT = "the cat <|endoftext|> ünïcode\n\n  and 日本語 🙂"


@pytest.mark.goal("R16")
@pytest.mark.parametrize(("fields", "kind"), [({}, "llama"), ({"model.qk_norm": True}, "qwen3")])
def test_transformers_opens_what_a_run_wrote(
    fields: dict[str, object], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(
        Config.preset("debug", {"train.total_steps": 3, "data.tokenizer": "bpe:300", "model.vocab_size": 320} | fields)
    )
    folder = checkpoint.list_checkpoints(run)[-1]
    ours = pocketlm.load(run)

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.model_type == kind
    assert theirs.dtype == torch.float32
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=0, atol=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == ours.tokenizer.end_id
    plain = TEXT.replace("<|endoftext|>", "")
    assert tokenizer(plain, add_special_tokens=False)["input_ids"] == ours.tokenizer.encode(plain)
    assert tokenizer.decode(ours.tokenizer.encode(plain), clean_up_tokenization_spaces=False) == plain
    assert ours.tokenizer.end_id not in ours.tokenizer.encode(TEXT)
    assert ours.tokenizer.decode(ours.tokenizer.encode(TEXT)) == TEXT

    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.do_sample, generation.temperature) == (True, 0.7)
    assert generation.eos_token_id == ours.tokenizer.end_id
