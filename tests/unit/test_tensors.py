"""Tensors come back bit for bit; a file that lies about itself is refused before memory is taken."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocketlm.errors import FileError
from pocketlm.files import write_file
from pocketlm.tensors import NAMES, Copies, read_tensors, serialize


def tree() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    wide = torch.randn(6, 8)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "view": wide[:, 2:5],
        "transposed": wide.t(),
        **{str(dtype): (torch.rand(5) * 9).to(dtype) for dtype in NAMES},
    }


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, serialize(tree()))
    for read in (load_file(path), read_tensors(path)):
        assert read.keys() == tree().keys()
        for name, tensor in tree().items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name


def test_a_view_is_written_without_its_storage_and_the_only_metadata_is_the_format(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, serialize({"row": torch.zeros(1000, 1000)[0]}))
    assert path.stat().st_size < 4200
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}


def test_equal_tensors_make_equal_files() -> None:
    backwards = dict(reversed(tree().items()))
    assert b"".join(map(bytes, serialize(tree()))) == b"".join(map(bytes, serialize(backwards)))


def test_copies_are_private_and_their_buffers_are_kept() -> None:
    copies, originals = Copies(), tree()
    originals["parameter"] = torch.nn.Parameter(torch.ones(3))
    first = copies.of(originals)
    places = {name: copy.data_ptr() for name, copy in first.items()}
    for name, original in originals.items():
        assert torch.equal(first[name], original)
        assert (first[name].dtype, first[name].is_contiguous()) == (original.dtype, True)
        assert not first[name].requires_grad
    assert sum(copy.nbytes for copy in first.values()) == sum(original.nbytes for original in originals.values())
    kept = {name: copy.clone() for name, copy in first.items()}
    with torch.no_grad():
        for original in originals.values():
            original.zero_()
    assert all(torch.equal(copy, kept[name]) for name, copy in first.items())
    second = copies.of(originals)
    assert {name: copy.data_ptr() for name, copy in second.items()} == places
    assert not any(copy.any() for copy in second.values())


def test_names_and_shapes_must_be_the_expected_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, serialize({"a": torch.zeros(2, 3), "b": torch.zeros(4)}))
    assert read_tensors(path, {"a": (2, 3), "b": (4,)}).keys() == {"a", "b"}
    for expected, told in (
        ({"a": (2, 3)}, "b has no place"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "c is missing"),
        ({"a": (3, 2), "b": (4,)}, r"a is \(2, 3\), not \(3, 2\)"),
    ):
        with pytest.raises(FileError, match=told):
            read_tensors(path, expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}junk",
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileError):
        read_tensors(path, {"a": (1,)})


def test_a_header_that_promises_more_than_the_file_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FileError):
        read_tensors(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")
