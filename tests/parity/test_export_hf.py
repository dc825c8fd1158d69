"""`pocketlm export hf`: transformers opens every layout, computes the same and speaks the same; nothing is lost on the
way back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import assert_as_exact_as, random_model
from safetensors.torch import load_file

import pocketlm
from interchange import texts, vectors
from pocketlm.cli.main import main
from pocketlm.config import Config, ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.export.hub_folder import shards, write_hub_folder
from pocketlm.formats.release import Release
from pocketlm.generate import engine
from pocketlm.generate.sampling import Sampling
from pocketlm.model.transformer import Transformer
from pocketlm.text.tokenizer import Tokenizer, train_tokenizer
from pocketlm.text.tokenizer_json import special_entry, with_begin
from pocketlm.toml_trees import preset_names
from pocketlm.training import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
transformers = pytest.importorskip("transformers")

TEXT = "the cat <|endoftext|> sat, ünïcode\n\n  and 日本語 🙂"
SMALL = {"vocab_size": 313, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 12}
SMALL |= {"max_position_embeddings": 64}
LEARNED = {"position": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "as many keys, untied, biases": ("llama", {"tie_word_embeddings": False, "bias": True}),
    "Llama 3": ("llama", {"num_key_value_heads": 2, "rope_llama3": (8.0, 1.0, 4.0, 32)}),
    "Qwen3, untied": ("qwen3", {"qk_norm": True, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "GPT-2": ("gpt2", LEARNED),
    "GPT-2, untied": ("gpt2", LEARNED | {"tie_word_embeddings": False}),
    "GPT-2, multi-query": ("pocketlm", LEARNED | {"num_key_value_heads": 1}),
    "parallel, soft-cap, untied": (
        "pocketlm",
        {"block": "parallel", "logit_softcap": 3.0, "tie_word_embeddings": False},
    ),
    "squared ReLU, LayerNorm, Llama 3": (
        "pocketlm",
        {"mlp": "relu2", "norm": "layer", "rope_llama3": (8.0, 1, 4.0, 32)},
    ),
    "query-key norm, biases": ("pocketlm", {"qk_norm": True, "bias": True, "num_key_value_heads": 2}),
    "a width that is no multiple": ("pocketlm", {"hidden_size": 50}),
}
PRESETS = {"smallm": "pocketlm", "tiny": "qwen3"}


def small(preset: str) -> ModelConfig:
    """The kind of a preset's model, in a small size."""
    model = Config.preset(preset).model
    return ModelConfig.model_validate(model.model_dump() | SMALL | {"hidden_size": 8 * model.num_attention_heads})


CASES = {name: (kind, ModelConfig.model_validate(SMALL | fields)) for name, (kind, fields) in LAYOUTS.items()}
CASES |= {name: (PRESETS.get(name, "llama"), small(name)) for name in preset_names().split(", ")}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """With a second special token, and two that are text, as Qwen's has them."""
    trained = train_tokenizer([f"{n} ravens flew over {n * n % 97} hills\n" for n in range(900)], 300)
    added = [special_entry(text, 300 + n) | {"special": False} for n, text in enumerate(("<tool_call>", "<think>"))]
    added = [*trained.tree["added_tokens"], *added, special_entry("<|im_end|>", 302)]
    return Tokenizer(json.dumps(trained.tree | {"added_tokens": added}))


@pytest.fixture(scope="module", autouse=True)
def _modules_of_the_client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where transformers puts the code that it is told to trust."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


def opened(folder: Path, kind: str) -> Any:
    """What transformers makes of a folder, with every weight in it used; its code runs for its own layout only."""
    trusted = {"trust_remote_code": True} if kind == "pocketlm" else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trusted)
    assert not any(info.values()), info
    return model.eval()


def greedy(model: Transformer, prompt: list[int]) -> list[int]:
    rules = Sampling(temperature=0)
    return list(engine.generate(model.eval(), prompt, rules, max_new_tokens=12, generator=torch.Generator()))


@pytest.mark.goal("R16")
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(
    name: str, tmp_path: Path, tokenizer: Tokenizer, shared_or_none: Path | None, said: pytest.LogCaptureFixture
) -> None:
    kind, config = CASES[name]
    model, out = random_model(config), tmp_path / "out"
    release = Release(config, model.state_dict(), tokenizer, SampleConfig(temperature=0.7, top_k=50))
    write_hub_folder(out, release, shard_bytes=40_000)
    assert (out / "modeling_pocketlm.py").exists() == (kind == "pocketlm")
    assert len(list(out.glob("model-*.safetensors"))) > 1

    back = pocketlm.checkpoint.read_release(pocketlm.checkpoint.find_checkpoint(out, print))
    assert (back.model, back.sample, back.tokenizer.fingerprint) == (config, release.sample, tokenizer.fingerprint)
    assert back.weights.keys() == release.weights.keys()
    assert all(torch.equal(back.weights[each], weight) for each, weight in release.weights.items())

    theirs = opened(out, kind)
    assert theirs.config.model_type == kind
    prompt = [5, 17, 290, 3, 44]
    expected = greedy(model, prompt)
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    assert theirs.generate(torch.tensor([prompt]), **settings)[0, 5:].tolist() == expected
    beside = torch.tensor([[0, 0, 0, *prompt], [1, 2, 3, 4, 5, 6, 7, 8]])
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    assert theirs.generate(beside, attention_mask=padding, **settings)[0, 8:].tolist() == expected
    ids = torch.randint(313, (3, 64), generator=torch.Generator().manual_seed(12))
    assert assert_as_exact_as(theirs, model, ids) <= 2e-5

    reader = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=kind == "pocketlm")
    assert_reads_as(
        reader, tokenizer, [*texts(shared_or_none).values(), *(vectors(shared_or_none) if shared_or_none else [])]
    )
    assert said.messages == []


def assert_reads_as(reader: Any, tokenizer: Tokenizer, some: list[str]) -> None:
    """Ids and text are ours; `split_special_tokens` makes of special tokens in a text what we make of them."""
    for text in [TEXT, "a<tool_call> {}</tool_call><think>\n", "<|im_end|>", *(text[:2000] for text in some)]:
        ids = tokenizer.encode(text)
        assert reader(text, split_special_tokens=True, verbose=False)["input_ids"] == ids, text[:80]
        assert reader.decode(ids) == tokenizer.decode(ids) == text
    assert reader("<|im_end|>a<|endoftext|>")["input_ids"] == [302, *tokenizer.encode("a"), 0]
    assert reader.decode([0, 302, 300, 0], skip_special_tokens=True) == "<tool_call>"
    assert (reader.bos_token_id, reader.eos_token_id, reader.unk_token_id, len(reader)) == (0, 0, None, 303)
    one, two = tokenizer.encode("3 ravens"), tokenizer.encode("3 ravens flew over")
    padded = reader(["3 ravens", "3 ravens flew over"], padding=True)
    assert padded["input_ids"] == [[0] * (len(two) - len(one)) + one, two]
    assert sum(padded["attention_mask"][0]) == len(one)
    assert len(reader("ravens " * 90, truncation=True)["input_ids"]) == 64


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers warns of."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_token_that_begins_a_text_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As Llamas have it: in transformers it comes by itself, here `generate` puts it there."""
    llama = Tokenizer(json.dumps(with_begin(tokenizer.tree, "<|endoftext|>", 0)))
    config = CASES["multi-query"][1]
    write_hub_folder(tmp_path / "out", Release(config, random_model(config).state_dict(), llama))
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reader("3 ravens")["input_ids"] == [0, *tokenizer.encode("3 ravens")]
    assert pocketlm.load(tmp_path / "out").tokenizer.begin_id == 0


def test_its_code_is_not_run_unless_it_is_trusted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = small("smallm")
    write_hub_folder(tmp_path / "out", Release(config, random_model(config).state_dict(), tokenizer))
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@torch.no_grad()
def test_its_code_gives_a_loss_and_the_last_logits_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = small("smallm")
    write_hub_folder(tmp_path / "out", Release(config, random_model(config).state_dict(), tokenizer))
    theirs = opened(tmp_path / "out", "pocketlm")
    ids = torch.randint(313, (2, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    whole = theirs(ids, labels=labels)
    nats = -whole.logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
    nats[0, :6] = 0
    torch.testing.assert_close(whole.loss, nats.sum() / (2 * 19 - 6))
    torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, whole.logits[:, -3:])


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bits(dtype: Any, stored: torch.dtype, tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = CASES["GPT-2"][1]
    weights = random_model(config).state_dict()
    write_hub_folder(tmp_path / "out", Release(config, weights, tokenizer), dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {stored}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == stored
    back = pocketlm.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(back[name], weight.to(stored).float()) for name, weight in weights.items())


def test_a_weight_too_large_for_sixteen_bits_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = CASES["multi-query"][1]
    weights = random_model(config).state_dict()
    weights["model.norm.weight"][3] = 70_000
    with pytest.raises(FileError, match=r"model\.norm\.weight has a weight of 70000, too large for fp16; add --dtype"):
        write_hub_folder(tmp_path / "out", Release(config, weights, tokenizer), dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_shards_by_hand() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}
    assert shards(sizes, 8) == [["a", "b"], ["c"], ["d", "e"]]
    assert shards(sizes, 25) == [["a", "b", "c", "d", "e"]]
    assert shards(sizes, 1) == [["a"], ["b"], ["c"], ["d"], ["e"]]


# --- the verb and its card


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda *_: 1e9)
    assert main(["train", "debug", "--train.total-steps", "20", "--out", "runs/a", "--sample.max-new-tokens", "4"]) == 0
    return tmp_path / "runs/a"


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The fields that the Hub reads, each a line of YAML with a JSON value, and the text."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    pairs = (line.split(": ", 1) for line in head.splitlines())
    return {name: json.loads(value) for name, value in pairs}, text


def test_the_verb_writes_a_card_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--dtype bf16 --license apache-2.0 --shard-mb 1"
    assert main(f"export hf runs/a --out out {given}".split()) == 0
    assert "next: pocketlm generate out --prompt TEXT" in capsys.readouterr().err
    assert main(["verify", "out"]) == 0
    head, text = card(Path("out"))
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["pocketlm"],
    }
    evaluated = [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"]
    last = evaluated[-1]
    assert last["step"] == 20
    for words in (
        "26,816 parameters",
        "| source | `synthetic` |",
        "| tokens seen | 5,120,",
        f"| loss | {last['loss']:.4f} nats per token |",
        f"| bits per byte | {last['bits_per_byte']:.4f} |",
        f"| 5 | {evaluated[0]['loss']:.4f} |",
        '("out")',
        "bf16",
    ):
        assert words in text
    assert "trust_remote_code" not in text
    assert (Path("out") / "curve.svg").read_text().startswith("<svg")
    assert main(["export", "hf", "runs/a/checkpoints/step-00000015", "--out", "earlier"]) == 0
    head, text = card(Path("earlier"))
    assert head["license"] == "unknown"
    assert "| tokens seen | 3,840," in text
    assert "| 20 |" not in text


def test_a_card_of_what_others_wrote(run: Path) -> None:
    """Names and sources are text of others: they end neither the card's head nor its tables."""
    config = Path("x.toml")
    config.write_text('preset = "debug"\n[data]\nsource = "files:a`|b\\n---\\n*.txt"\n')
    Path("a`|b\n---\nc.txt").write_text("".join(f"{n} ravens flew over {n * n} hills\n" for n in range(900)))
    assert main(["train", "x.toml", "--train.total-steps", "1", "--name", "x](y)<b>", "--out", "runs/x"]) == 0
    assert main(["export", "hf", "runs/x", "--out", "odd](name)"]) == 0
    head, text = card(Path("odd](name)"))
    assert head["tags"] == ["pocketlm"]
    assert "# oddname\n" in text
    assert "| source | `files:a'¦b\\n---\\n*.txt` |\n" in text


def test_a_model_without_a_run_says_so_and_flags_are_held_to_their_kind(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "hf", "runs/a", "--out", "out"]) == 0
    assert main(["export", "hf", "out", "--out", "again"]) == 0
    assert "was not exported from a run" in card(Path("again"))[1]
    for words, code, line in (
        ("hf runs/a --out out", 2, "--out out exists already"),
        ("hf runs/a --out x --type F16", 2, "--type is for gguf and ollama"),
        ("gguf runs/a --out x --dtype bf16", 2, "--dtype is for hf"),
        ("hf runs/a --out x --shard-mb 0", 2, "--shard-mb 0: allowed is"),
        ("hf runs/a --out x --license My", 2, "--license 'My': allowed is"),
        ("hf runs/a --out x --push me", 2, "--push 'me': allowed is OWNER/NAME"),
    ):
        capsys.readouterr()
        assert main(["export", *words.split()]) == code
        assert line in capsys.readouterr().err
        assert not Path("x").exists()
