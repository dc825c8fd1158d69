"""Models in files of torch.save, made here as their owners' programs make them: the same bits under our names."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pocketlm.checkpoint import find_checkpoint, read_release
from pocketlm.cli.main import main
from pocketlm.config import ModelConfig
from pocketlm.confined import LOADER
from pocketlm.errors import FileError
from pocketlm.formats import gpt2, unpickling
from pocketlm.formats.huggingface import tensor_shapes
from pocketlm.formats.old_pickle import read_pickled
from pocketlm.formats.release import Release, folder_texts
from pocketlm.text.tokenizer import load_tokenizer

Tensors = dict[str, torch.Tensor]
WIDTH, LAYERS, HEADS, CONTEXT, INNER, VOCABULARY = 32, 2, 4, 12, 40, 50257
ROPE = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 6}
ROPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


def random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(31)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def brought_in(path: str, *more: str) -> Release:
    assert main(["import", path, "--allow-pickle", "--out", "out", *more]) == 0
    assert main(["verify", "out"]) == 0
    return read_release(find_checkpoint(Path("out"), pytest.fail))


def equal(ours: Any, expected: Tensors) -> bool:
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


Answered = Callable[[Tensors, Any], str]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answered:
    """How `import` refuses a file that held this; no process is started."""

    def run(tensors: Tensors, values: Any) -> str:
        held = unpickling.Held(tensors, values, had_network=False)
        monkeypatch.setattr("pocketlm.formats.old_pickle.unpickled", lambda path, beside: held)
        Path("a.pth").touch()
        assert main(["import", "a.pth", "--allow-pickle", "--out", "out"]) == 3
        assert not Path("out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


# --- the first seed


def chatbot() -> Tensors:
    """The tensors of `chatbot.pth`, as docs of that program have them."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (VOCABULARY, WIDTH)}
    shapes |= {"pos_embedding.weight": (CONTEXT, WIDTH), "final_norm.weight": (WIDTH,)}
    head = WIDTH // HEADS
    for layer in range(LAYERS):
        rows = {"q_proj": WIDTH, "k_proj": head, "v_proj": head, "out_proj": WIDTH}
        shapes |= {f"transformer.{layer}.attn.{name}.weight": (size, WIDTH) for name, size in rows.items()}
        shapes[f"transformer.{layer}.norm.weight"] = (WIDTH,)
        shapes[f"transformer.{layer}.ffn.w1.weight"] = (2 * INNER, WIDTH)
        shapes[f"transformer.{layer}.ffn.w2.weight"] = (WIDTH, INNER)
    weights = {name: weight / 4 for name, weight in random(shapes).items()}
    return weights | {"output.weight": weights["embedding.weight"]}


def its_logits(w: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) by that program's formulas, under its names."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    x = w["embedding.weight"][ids] + w["pos_embedding.weight"][: len(ids)]
    for layer in range(LAYERS):
        at = f"transformer.{layer}"
        h = norm(x, f"{at}.norm")
        q, k, v = (h @ w[f"{at}.attn.{name}_proj.weight"].T for name in "qkv")
        q = q.view(len(ids), HEADS, -1).transpose(0, 1)  # (H, T, D)
        k, v = (one[None].expand(HEADS, -1, -1) for one in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        value, gate = (h @ w[f"{at}.ffn.w1.weight"].T).chunk(2, dim=-1)
        x = x + heads @ w[f"{at}.attn.out_proj.weight"].T + (F.silu(gate) * value) @ w[f"{at}.ffn.w2.weight"].T
    return norm(x, "final_norm") @ w["output.weight"].T


def sizes(**others: int) -> dict[str, Any]:
    of_it = {"d_model": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": 1, "vocab_size": VOCABULARY}
    return of_it | {"max_seq_len": CONTEXT, "overlapping": False, "eos_token_id": 50256} | others


@torch.no_grad()
def test_the_first_seeds_checkpoint(gpt2_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_files))
    theirs = chatbot()
    torch.save(
        {"model_state_dict": {f"_orig_mod.{name}": one for name, one in theirs.items()}} | sizes(), "chatbot.pth"
    )
    release = brought_in("chatbot.pth")
    model = release.model
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (HEADS, 1, WIDTH // HEADS)
    assert (model.tie_word_embeddings, release.tokenizer.vocab_size, release.sample.top_k) == (True, VOCABULARY, 50)
    assert torch.equal(
        release.weights["model.layers.1.mlp.gate_proj.weight"], theirs["transformer.1.ffn.w1.weight"][INNER:]
    )
    ids = torch.randint(VOCABULARY, (CONTEXT,), generator=torch.Generator().manual_seed(3))
    expected = its_logits({name: one.double() for name, one in theirs.items()}, ids)
    torch.testing.assert_close(release.transformer().double()(ids[None])[0], expected, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"num_heads": 5}, "d_model 32 is no multiple of num_heads 5"),
        ({"num_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_kv_heads": 2}, r"k_proj.weight is \(8, 32\), not \(16, 32\)"),
        ({"num_heads": 10**12}, "is no multiple of num_heads"),
        ({"num_layers": 10**9}, "the sizes saved in it: .*layers"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; its weights need a number there"),
    ],
)
def test_sizes_that_the_weights_do_not_have(more: dict[str, Any], why: str, answered: Answered) -> None:
    assert re.search(why, answered(chatbot(), sizes(**more)))


# --- the second seed


@pytest.fixture
def config_class() -> Iterator[type]:
    """A class of that program's: importable while the file is made, and not when it is read."""
    module = types.ModuleType("model135m_v2")
    kind = type("SmolLM2Config135M", (), {"__module__": module.__name__})
    vars(module)[kind.__name__] = kind
    sys.modules[module.__name__] = module
    yield kind
    del sys.modules[module.__name__]


@pytest.mark.parametrize("lightning", [False, True])
def test_the_second_seeds_checkpoints(lightning: bool, config_class: type) -> None:
    fields = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}
    config = config_class()
    vars(config).update(ROPE | fields | {"torch_dtype": torch.float32})
    model = ModelConfig.model_validate(ROPE)
    weights = random(tensor_shapes(model))
    state = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    state |= {f"model.rotary_emb.{name}": torch.ones(3) for name in ("inv_freq", "cos_cached", "sin_cached")}
    if lightning:
        state = {f"model.{name}": one for name, one in state.items()}
        tree = {"epoch": 0, "pytorch-lightning_version": "2.5.0", "state_dict": state, "callbacks": {"Stop": {"n": 1}}}
        tree |= {"hyper_parameters": {"config": config, "root": Path("x")}, "loops": {}, "hparams_name": "kwargs"}
    else:
        adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        tree = {"step": 500, "model_state_dict": state, "optimizer_state_dict": adam.state_dict(), "config": config}
    name = "last.ckpt" if lightning else "model_step_500_loss_35_70.pt"
    torch.save(tree, name)
    del sys.modules["model135m_v2"]
    release = brought_in(name, "--tokenizer", "byte")
    sys.modules["model135m_v2"] = types.ModuleType("model135m_v2")
    assert release.model == model
    assert equal(release.weights, weights)


# --- Hugging Face's folders


def folder(model: ModelConfig) -> Tensors:
    """A folder without its weights, and these."""
    weights = random(tensor_shapes(model))
    Path("hf").mkdir()
    for name, data in folder_texts(Release(model, weights, load_tokenizer("byte"))).items():
        Path("hf", name).write_bytes(data)
    return weights


def test_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder(ModelConfig.model_validate(ROPE | {"tie_word_embeddings": False}))
    assert json.loads(Path("hf/config.json").read_text())["model_type"] == "llama"
    torch.save({name: torch.nn.Parameter(one.bfloat16()) for name, one in weights.items()}, "hf/pytorch_model.bin")
    rounded = {name: one.bfloat16().float() for name, one in weights.items()}
    assert equal(brought_in("hf").weights, rounded)
    capsys.readouterr()
    assert main(["import", "hf", "--allow-pickle", "--tokenizer", "byte", "--out", "third"]) == 2
    assert "hf has its own" in capsys.readouterr().err


def test_several_files_with_their_index() -> None:
    weights = folder(ModelConfig.model_validate(ROPE | {"qk_norm": True, "tie_word_embeddings": True}))
    where = {name: f"pytorch_model-0000{n % 2 + 1}-of-00002.bin" for n, name in enumerate(weights)}
    for file in set(where.values()):
        torch.save({name: weights[name] for name in where if where[name] == file}, f"hf/{file}")
    Path("hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert equal(brought_in("hf").weights, weights)
    Path("hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where | {"x": "../a.bin"}}))
    assert main(["import", "hf", "--allow-pickle", "--out", "other"]) == 3


def test_gpt2_in_the_older_format() -> None:
    fields = gpt2.LAYOUT | {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 20}
    model = ModelConfig.model_validate(fields | heads | {"tie_word_embeddings": True})
    weights = folder(model)
    Path("hf/config.json").write_text(json.dumps(gpt2.config_fields(model)))
    theirs = {name.removeprefix("transformer."): one for name, one in gpt2.to_gpt2(model, weights).items()}
    theirs |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 20, 20).tril() for layer in range(2)}
    torch.save(theirs, "hf/pytorch_model.bin", _use_new_zipfile_serialization=False)
    release = brought_in("hf")
    assert equal(release.weights, weights)
    assert equal(load_file("out/model.safetensors"), weights)


# --- what is no model


@pytest.mark.parametrize(
    ("names", "values", "why"),
    [
        (["transformer.wte.weight", "lm_head.weight"], {"model_args": {"n_layer": 2}}, "a model of nanoGPT"),
        (["module.model.embed_tokens.weight"], {}, "the weights of a Llama, but not its sizes; put its config.json"),
        (["h.0.ln_1.weight", "wte.weight"], {}, "the weights of a GPT-2, but not its sizes"),
        (["conv1.weight", "fc.bias"], {}, r"2 tensors of a layout that is not known here \(conv1.weight, fc.bias"),
        (["a._orig_mod.x", "a.x"], {}, "several models, or one tensor by two names"),
    ],
)
def test_another_model_is_named(names: list[str], values: Any, why: str, answered: Answered) -> None:
    assert re.search(why, answered({name: torch.ones(2) for name in names}, values))


def test_a_tokenizer_is_asked_for(answered: Answered) -> None:
    said = answered({"model.embed_tokens.weight": torch.ones(2)}, {"config": {"hidden_size": 2}})
    assert "a.pth brings no tokenizer; put its tokenizer.json beside it, or name it: pocketlm import a.pth" in said


def test_weights_alone_are_what_the_folder_says(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = folder(ModelConfig.model_validate(ROPE))
    held = unpickling.Held({f"module.{name}": one for name, one in weights.items()}, {}, had_network=True)
    monkeypatch.setattr("pocketlm.formats.old_pickle.unpickled", lambda path, beside: held)
    Path("hf/some.pth").touch()
    said = list[str]()
    assert equal(read_pickled(Path("hf/some.pth"), None, Path("out"), said.append).weights, weights)
    assert said == ["hf/some.pth was read by a process that could not be cut off from the network here"]


VERBS: dict[str, Callable[[str], list[str]]] = {
    "generate": lambda path: ["generate", path, "--prompt", "a"],
    "eval": lambda path: ["eval", path, "--data", "files:text.txt"],
    "export": lambda path: ["export", "gguf", path, "--out", "x.gguf"],
    "import": lambda path: ["import", path, "--out", "out"],
}


def test_no_verb_reads_one_unasked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder(ModelConfig.model_validate(ROPE))
    torch.save({"w": torch.ones(1)}, "hf/pytorch_model.bin")
    for name in ("model.pth", "model.ckpt", "pytorch_model.bin", "by_another_name"):
        shutil.copy("hf/pytorch_model.bin", name)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    alone = {"verify": lambda path: ["verify", path], "sizes": lambda path: ["sizes", path]}
    for path in ("model.pth", "model.ckpt", "pytorch_model.bin", "hf", "by_another_name"):
        for verb, words in (VERBS if path in ("hf", "by_another_name") else VERBS | alone).items():
            capsys.readouterr()
            assert main(words(path)) == (2 if verb == "import" else 3), (verb, path)
            out, err = capsys.readouterr()
            (said,) = (out + err).splitlines()
            assert f"pocketlm import {path} --allow-pickle --out DIR" in said
    assert main(["import", "hf/config.json", "--allow-pickle", "--out", "out"]) == 2
    assert "config.json is none; leave it out" in capsys.readouterr().err


# --- the process


def inside(code: str, *words: str) -> str:
    command = [sys.executable, "-c", f"from pocketlm.formats import unpickle\n{code}", *words]
    path = {"PYTHONPATH": str(Path(unpickling.__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout.strip()


def test_it_has_no_network() -> None:
    connect = "import socket, sys\ntry:\n socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5)\n"
    connect += "except OSError as error: print('no:', error)\nelse: print('yes')"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert inside(connect, port) == "yes"
        said = inside(f"print(unpickle.leave_network())\n{connect}", port)
    if said.startswith("False"):
        pytest.skip("this kernel gives a user no namespace of his own")
    assert said.startswith("True\nno: ")


def test_python_code_in_it_could_do_nothing(tmp_path: Path) -> None:
    """The second line: what would happen if PyTorch's unpickler were fooled."""
    tries = [
        "os.mkdir('x')",
        "open('x', 'w')",
        "subprocess.run(['true'])",
        "socket.socket()",
        "pickle.loads(b'cos\\nmkdir\\n.')",
    ]
    tries += ["os.open('x', os.O_CREAT)", "ctypes.CDLL(None)", "open(sys.executable, 'rb').close()"]
    code = "import ctypes, os, pickle, socket, subprocess, sys\nsys.addaudithook(unpickle.refuse_event)\n"
    code += f"for one in {tries!r}:\n try: exec(one)\n except unpickle.Forbidden: print('no')\n else: print('yes')"
    assert inside(f"import os\nos.chdir({str(tmp_path)!r})\n{code}").split() == [*["no"] * 7, "yes"]
    assert list(tmp_path.iterdir()) == []


NAMES = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "LC_CTYPE", "KMP_INIT_AT_FORK", *LOADER}
"""LC_CTYPE and KMP_INIT_AT_FORK are set by Python and OpenMP themselves."""
FOOLED = """
import os, resource
from pathlib import Path
from pocketlm.formats import unpickle

def load(size):
    import torch
    limits = [resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_AS]
    links = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    ACT
    most = [resource.getrlimit(kind)[0] for kind in limits]
    return {"w": torch.ones(2), "links": links, "most": most, "names": sorted(os.environ), "at": os.getcwd()}

unpickle.load = load
unpickle.main()
"""
"""The process, its unpickler fooled."""


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_were_it_fooled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of(act: str) -> unpickling.Held:
        code = FOOLED.replace("ACT", act)
        monkeypatch.setattr(unpickling, "COMMAND", (sys.executable, "-P", "-c", code))
        return unpickling.unpickled(Path("a.pth"), Path("out"))

    monkeypatch.setenv("HF_TOKEN", "secret")
    torch.save({"w": torch.ones(1)}, "a.pth")
    held, size = of("pass"), Path("a.pth").stat().st_size
    assert {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS"} <= set(held.values["names"]) <= NAMES
    assert held.values["at"] == "/"
    cpu, file, core, memory = held.values["most"]
    assert (cpu, file, core) == (60, 2 * size + (4 << 20), 0)
    assert 0 < memory < 1 << 40
    assert held.had_network or held.values["links"] == ["lo"]
    with pytest.raises(FileError, match=r"asked for os\.mkdir, of which no weights have need"):
        of(f"os.mkdir({str(tmp_path / 'canary')!r})")
    with pytest.raises(FileError, match="is damaged: it asks for more memory"):
        of("torch.ones(1 << 40)")
    assert [path.name for path in Path().iterdir()] == ["a.pth"]


def test_one_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(unpickling, "COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
    monkeypatch.setattr(unpickling, "cpu_limit_s", lambda size: 0)
    torch.save({"w": torch.ones(1)}, "a.pth")
    assert main(["import", "a.pth", "--allow-pickle", "--out", "out"]) == 3
    assert capsys.readouterr().err.startswith("pocketlm: a.pth was given up: reading it took more than 0 seconds")
    monkeypatch.setattr(unpickling, "cpu_limit_s", lambda size: 60)
    monkeypatch.setattr(unpickling, "COMMAND", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert main(["import", "a.pth", "--allow-pickle", "--out", "out"]) == 3
    assert "the process that unpickles it was ended by signal 9" in capsys.readouterr().err
    full = "import errno, sys; sys.exit(errno.ENOSPC)"
    monkeypatch.setattr(unpickling, "COMMAND", (sys.executable, "-c", full))
    assert main(["import", "a.pth", "--allow-pickle", "--out", "out"]) == 3
    assert "make room and run the command again" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["a.pth"]
