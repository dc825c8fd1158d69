"""What is saved comes back bit for bit: dtype, shape and every element, of any tensor that a state can hold."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from populations import CONFIG, snapshot_of
from torch import Tensor

from pocketlm import checkpoint
from pocketlm.files import write_file
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import allocate
from pocketlm.tensors import NAMES, read_tensors, serialize


def random_tensor(luck: random.Random) -> Tensor:
    """Any bits: also infinities, numbers that are none, and every kind of zero."""
    dtype = luck.choice(list(NAMES))
    shape = [luck.choice([0, 1, 1, 2, 3, 5, 8]) for _ in range(luck.randint(0, 4))]
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.tensor([luck.random() < 0.5 for _ in range(count)], dtype=dtype).reshape(shape)
    raw = torch.frombuffer(bytearray(luck.randbytes(max(1, count) * dtype.itemsize)), dtype=dtype)
    return raw[:count].reshape(shape)


def random_view(tensor: Tensor, luck: random.Random) -> Tensor:
    """The same storage seen in another way: not contiguous, with an offset, or with elements that overlap."""
    kind = luck.choice(["as it is", "transposed", "every second", "without the first", "expanded", "parameter"])
    if kind == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1)
    if kind == "every second" and tensor.dim():
        return tensor[::2]
    if kind == "without the first" and tensor.dim() and tensor.shape[0]:
        return tensor[1:]
    if kind == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    if kind == "parameter" and tensor.is_floating_point():
        return torch.nn.Parameter(tensor)
    return tensor


def random_tree(luck: random.Random) -> dict[str, Tensor]:
    """Up to twelve tensors; some share their storage, some are the same one."""
    tree: dict[str, Tensor] = {}
    for number in range(luck.randint(0, 12)):
        again = tree and luck.random() < 0.3
        tensor = luck.choice(list(tree.values())).detach() if again else random_tensor(luck)
        name = luck.choice(["model.layers.{}.weight", "{}", "a.{}.b", "ü{}", 'quote"{}', "__{}__"]).format(number)
        tree[name] = random_view(tensor, luck)
    return tree


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[bytes]]:
    """By way of Python's own values: each element's bytes, one by one."""
    flat = tensor.detach().clone().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), [bytes(element.reshape(1).view(torch.uint8).tolist()) for element in flat]


def check_equal(read: dict[str, Tensor], written: dict[str, Tensor]) -> None:
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert bits(read[name]) == bits(tensor), name


@pytest.mark.goal("R12")
def test_any_tree_of_tensors_comes_back(proof, tmp_path: Path) -> None:
    for case in proof.cases(100, 200):
        tree, path = random_tree(proof.random(case)), tmp_path / f"{case}.safetensors"
        write_file(path, serialize(tree))
        check_equal(read_tensors(path), tree)
        check_equal(safetensors.torch.load_file(path), tree)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size <= header + 1.01 * sum(tensor.nbytes for tensor in tree.values())


def of_types(tree: dict[str, Tensor], dtypes: set[torch.dtype]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tree.items() if tensor.dtype in dtypes}


@pytest.mark.goal("R12")
def test_any_state_comes_back(proof, tmp_path: Path) -> None:
    for case in proof.cases(20, 200):
        luck = proof.random(case)
        weights = of_types(random_tree(luck), {torch.float32})  # what training keeps; other types are refused
        optimizer = of_types(random_tree(luck), {torch.float32, torch.int64})
        state = {
            "step": case,
            "float": luck.random(),
            "deep": {"list": [1, None, "é", True], "none": None, "empty": {}},
        }
        path = checkpoint.save(tmp_path, replace(snapshot_of(case), weights=weights, optimizer=optimizer, state=state))
        checkpoint.verify(path)
        shapes = [{name: tuple(tensor.shape) for name, tensor in tree.items()} for tree in (weights, optimizer)]
        for restored, tree in zip(checkpoint.restore(path, *shapes), (weights, optimizer), strict=True):
            check_equal(restored, tree)
        assert checkpoint.read_state(path) == state


@pytest.mark.goal("R12")
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_matrix_is_one_before_and_after(tied: bool, tmp_path: Path) -> None:
    config = CONFIG.model.model_copy(update={"tie_word_embeddings": tied})
    model = allocate(config)
    init_weights(model, CONFIG.init, seed=3)
    weights = dict(model.named_parameters())
    path = checkpoint.save(tmp_path, replace(snapshot_of(1), model=config, weights=weights))
    assert ("lm_head.weight" in read_tensors(path / checkpoint.WEIGHTS)) != tied
    loaded, _, _ = checkpoint.load_model(path)
    embedding = loaded.get_parameter("model.embed_tokens.weight")
    assert (loaded.head.data_ptr() == embedding.data_ptr()) == tied
    check_equal(dict(loaded.named_parameters()), weights)


def test_the_hash_of_a_state_sees_every_leaf(tmp_path: Path) -> None:
    """Each change of one leaf gives another hash, but for the clocks, which give none."""
    plain = replace(snapshot_of(1), state={"step": 1, "elapsed_s": 1.5, "a": {"b": [1, 2]}, "resolved": {"dtype": "x"}})
    changes = {
        "weight": replace(
            plain, weights={"model.weight": torch.nextafter(plain.weights["model.weight"], torch.ones(5))}
        ),
        "name": replace(plain, weights={"model.wight": plain.weights["model.weight"]}),
        "dtype": replace(plain, weights={"model.weight": plain.weights["model.weight"].view(torch.int32)}),
        "shape": replace(plain, weights={"model.weight": plain.weights["model.weight"].reshape(5, 1)}),
        "moment": replace(plain, optimizer={**plain.optimizer, "model.weight.m": torch.zeros(5)}),
        "none": replace(plain, optimizer={}),
        "leaf": replace(plain, state={**plain.state, "a": {"b": [1, 3]}}),
        "type": replace(plain, state={**plain.state, "a": {"b": [1, 2.0]}}),
        "empty": replace(plain, state={**plain.state, "c": {}}),
        "named like a clock": replace(plain, state={**plain.state, "elapsed_steps": 3}),
    }
    hashes = {
        name: checkpoint.state_hash(checkpoint.save(tmp_path / name, snapshot))
        for name, snapshot in {"plain": plain, **changes}.items()
    }
    assert len(set(hashes.values())) == len(hashes)
    clocks = plain.state | {"elapsed_s": 99.0, "resolved": {"dtype": "x", "peak_flops": 3, "reasons": {"dtype": "y"}}}
    assert checkpoint.state_hash(checkpoint.save(tmp_path / "clocks", replace(plain, state=clocks))) == hashes["plain"]
