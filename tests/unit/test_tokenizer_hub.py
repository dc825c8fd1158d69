"""Tokenizers from the Hub: fetched from a server on this machine, and the refusal when there is none."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer


@pytest.fixture
def own() -> Tokenizer:
    return byte_tokenizer()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of huggingface.co as a download needs."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        body = self.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(own: Tokenizer) -> Iterator[str]:
    Hub.files = {"/someone/model/resolve/main/tokenizer.json": own.to_json().encode()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


LOAD = "import sys; from pocketlm.text.tokenizer import load_tokenizer; print(load_tokenizer(sys.argv[1]).fingerprint)"


def run_load(spec: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the Hub library reads its environment when it is imported."""
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1"} | environment
    return subprocess.run([sys.executable, "-c", LOAD, spec], capture_output=True, text=True, env=env, check=False)


def test_a_hub_id_is_fetched_and_cached(hub: str, own: Tokenizer, tmp_path: Path) -> None:
    fetched = run_load("someone/model", HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert fetched.stdout.strip() == own.fingerprint, fetched.stderr
    offline = run_load("someone/model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline.stdout.strip() == own.fingerprint, offline.stderr
    missing = run_load("someone/else", HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert "DataError" in missing.stderr
    assert "has no tokenizer.json; give a local tokenizer.json by --data.tokenizer PATH" in missing.stderr


def test_a_hub_id_offline_says_what_to_give(tmp_path: Path) -> None:
    offline = run_load("someone/model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "DataError: no path 'someone/model' here, and its tokenizer.json cannot be fetched" in offline.stderr
    assert "--data.tokenizer PATH" in offline.stderr
