"""stories260K, trained by others, is a model like any other: from its llama2.c file and from its GGUF.

What it writes and how it scores a text was computed beside the files by a float64 model of another hand; transformers
opens the folder that `pocketlm import` makes. llama.cpp's word on it is in tests/interop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pocketlm
from pocketlm.checkpoint import read_release
from pocketlm.cli.main import main
from pocketlm.generate import engine
from pocketlm.generate.sampling import Sampling

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.goal("R16")

SOURCES = ("stories260K.bin", "stories260K.gguf")
TEXTS = (
    "Once upon a time, there was a caf\u00e9.\n",
    "  two blanks before, \t a tab,\n\n\nthree lines",
    "\u4e2d\u6587 \U0001f469\u200d\U0001f467 na\u00efve \u201cquotes\u201d <0x41> </s> <s>",
    "",
)


@pytest.fixture(scope="module")
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def reference(stories: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((stories / "reference.json").read_text())
    return tree


@pytest.fixture(scope="module")
def imported(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that `pocketlm import` makes, by the file."""
    folder = tmp_path_factory.mktemp("imported")
    made = {file: folder / file.replace(".", "-") for file in SOURCES}
    for file, out in made.items():
        assert main(["import", str(stories / file), "--out", str(out)]) == 0
    return made


@pytest.mark.parametrize("file", SOURCES)
@torch.no_grad()
def test_text_and_loss_are_the_reference(file: str, stories: Path, reference: dict[str, Any]) -> None:
    loaded = pocketlm.load(stories / file)
    assert loaded.generate("", temperature=0, max_new_tokens=256) == reference["greedy_from_bos"]["text"]
    ids = engine.generate(
        loaded.model, [1], Sampling(temperature=0), max_new_tokens=256, generator=torch.Generator(), num_ids=512
    )
    assert list(ids) == reference["greedy_from_bos"]["ids"]

    scored = reference["teacher_forced"]
    tokens = [loaded.tokenizer.begin_id, *loaded.tokenizer.encode(scored["text"])]
    assert tokens == scored["ids_with_bos"]
    (logits,) = loaded.model(torch.tensor([tokens]))
    losses = F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
    torch.testing.assert_close(losses.double(), torch.tensor(scored["nll_per_token"]).double(), rtol=0, atol=1e-5)
    assert losses.mean().item() == pytest.approx(scored["mean_nll_nats"], abs=1e-6)
    first = torch.tensor(reference["last_position_logits_first8"])
    torch.testing.assert_close(logits[-1, :8], first, rtol=0, atol=1e-4)


@pytest.mark.parametrize("file", SOURCES)
@torch.no_grad()
def test_transformers_opens_what_import_made(
    file: str, imported: dict[str, Path], stories: Path, reference: dict[str, Any]
) -> None:
    folder = imported[file]
    assert main(["verify", str(folder)]) == 0
    ours = pocketlm.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert sum(weight.numel() for weight in theirs.parameters()) == 260_032
    ids = torch.tensor([[1, *reference["greedy_from_bos"]["ids"]]])
    torch.testing.assert_close(theirs(ids).logits, ours.model(ids), rtol=0, atol=1e-5)
    greedy = theirs.generate(
        torch.tensor([[1]]), do_sample=False, max_new_tokens=256, eos_token_id=None, pad_token_id=0, top_k=None
    )
    assert greedy[0, 1:].tolist() == reference["greedy_from_bos"]["ids"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id == theirs.config.bos_token_id == 1
    assert tokenizer.eos_token_id == ours.tokenizer.end_id
    for text in (*TEXTS, reference["teacher_forced"]["text"]):
        plain = text.replace("</s>", "").replace("<s>", "")  # transformers makes special tokens of these
        assert tokenizer(plain)["input_ids"] == [1, *ours.tokenizer.encode(plain)]
        assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text


def test_both_files_are_one_model(stories: Path) -> None:
    first, second = (read_release(stories / file) for file in SOURCES)
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    longer = {"max_position_embeddings": 2048}  # as its GGUF says; it was trained on 512
    assert first.model.model_copy(update=longer) == second.model
    assert first.tokenizer.tree["model"] == second.tokenizer.tree["model"]


@pytest.mark.parametrize("file", SOURCES)
def test_out_again_as_gguf(file: str, imported: dict[str, Path], stories: Path, tmp_path: Path) -> None:
    """Weights bit for bit, the same tokenizer, from the folder and from the file itself."""
    before = read_release(stories / file)
    for number, source in enumerate((imported[file], stories / file)):
        out = tmp_path / f"again-{number}.gguf"
        assert main(["export", "gguf", str(source), "--out", str(out)]) == 0
        again = read_release(out)
        assert again.model == before.model
        assert all(torch.equal(again.weights[name], weight) for name, weight in before.weights.items())
        assert again.tokenizer.fingerprint == before.tokenizer.fingerprint
        assert (again.tokenizer.begin_id, again.tokenizer.end_id) == (1, before.tokenizer.end_id)


def test_a_prompt_is_read_after_the_token_that_begins_a_text(stories: Path, reference: dict[str, Any]) -> None:
    text = reference["greedy_from_bos"]["text"]
    loaded = pocketlm.load(stories / SOURCES[0])
    written = loaded.generate(text[:60], temperature=0, max_new_tokens=9)
    assert len(written) > 10
    assert text[60:].startswith(written)
