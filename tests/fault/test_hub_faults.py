"""Data sets made from the Hub while the network fails, and while the process is killed.

The oracle is the folder that an undisturbed preparation makes, compared byte for byte; the server is tests/stand_in.py.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import Contents, contents

from pocketlm.cli.main import main
from pocketlm.config import DataConfig
from pocketlm.data.prepare import prepare
from pocketlm.errors import DataError
from pocketlm.text import hub
from pocketlm.text.sources import open_source
from stand_in import Repository, Request, StandIn, standing_in

PROGRAM = str(Path(__file__).with_name("preparing.py"))
NAME = "someone/texts"
TEXTS = [f"text {number} of many: " + f"{number * 7919 % 1000} apples and pears. " * 40 for number in range(400)]

AGAIN_FROM_HERE = "run the command again, it goes on where it stopped"
Fault = Callable[[Request], str | None]


def parquet(texts: list[str], rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), sink, row_group_size=rows)
    return sink.getvalue()


FILES = {
    "0.parquet": parquet(TEXTS[:150], 40),
    "1.parquet": parquet(TEXTS[150:300], 150),
    "2.parquet": parquet(TEXTS[300:], 25),
}


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays that were asked for; none of them is waited."""
    waits: list[float] = []
    monkeypatch.setattr(hub, "PATIENCE", hub.Patience(sleep=waits.append))
    monkeypatch.setattr("pocketlm.data.prepare.ENOUGH_DOCUMENTS", 200)
    return waits


@pytest.fixture
def server(waited: list[float]) -> Iterator[StandIn]:
    with standing_in() as stand_in:
        stand_in.add(NAME, FILES)
        yield stand_in


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"source": f"hf:{NAME}", "tokenizer": "byte", "val_fraction": 0.1, "piece_documents": 64}
    return given | {"dir": str(folder)} | changes


def prepared(folder: Path, said: list[str] | None = None) -> Contents:
    prepare(DataConfig(**config(folder)), progress=(said if said is not None else []).append)
    return contents(folder)


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepared(folder)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def at(number: int, fault: str) -> Fault:
    return lambda request: fault if request.number == number else None


# --- what passes


@pytest.mark.parametrize("fault", ["truncate", "429", "503", "reset", "no json", "no ranges"])
def test_a_fault_at_any_request_changes_nothing(
    server: StandIn, waited: list[float], tmp_path: Path, fault: str
) -> None:
    """Of a file no byte comes twice where a response broke off."""
    whole = prepared(tmp_path / "whole")
    number_of_requests, sent = len(server.requests), dict(server.sent)
    for number in range(1, number_of_requests + 1, 2 if fault == "truncate" else 5):
        server.forget()
        server.fault = at(number, fault)
        said: list[str] = []
        assert prepared(tmp_path / str(number), said) == whole, number
        met = any("asking again in 1 s (1 of 7)" in line for line in said)
        assert waited == [1.0] * met
        if fault in ("truncate", "429", "503", "reset"):
            assert {path: count for path, count in server.sent.items() if path} == {
                path: count for path, count in sent.items() if path
            }
        waited.clear()


def test_a_connection_that_stalls_is_given_up_and_taken_up_again(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared(tmp_path / "whole")
    waits: list[float] = []
    monkeypatch.setattr(hub, "PATIENCE", hub.Patience(timeout_s=0.5, sleep=waits.append))
    for kind in ("info", "tree", "resolve"):
        server.forget()
        stalled = iter([kind])  # the first request of its kind
        server.fault = lambda request, left=stalled, kind=kind: (
            "stall" if request.kind == kind and next(left, None) else None
        )
        said: list[str] = []
        assert prepared(tmp_path / kind, said) == whole
        assert waits[:1] == [1.0]
        assert any("ReadTimeout" in line for line in said)
        waits.clear()


@pytest.mark.parametrize("fault", ["page", "sized page"])
def test_a_page_of_a_proxy_is_no_text(server: StandIn, waited: list[float], fault: str) -> None:
    """Any bytes are a text, so they must not be taken for it before the response says which they are."""
    server.add(NAME, {"small.txt": b"a text", "large.txt": b"more text " * 2000})
    for number in (3, 4, 5):  # the first of each file; of the large one also where it redirects
        server.forget()
        server.fault = at(number, fault)
        assert [one.text for one in open_source(f"hf:{NAME}").documents()] == ["more text " * 2000, "a text"]
    assert waited == [1.0] * 2, "a redirect has no body"


@pytest.mark.parametrize("status", [408, 429, 500, 501, 507, 520, 599])
def test_a_status_that_may_pass_is_asked_again(server: StandIn, waited: list[float], status: int) -> None:
    server.add(NAME, {"small.txt": b"a text"})
    server.fault = at(3, str(status))
    assert [one.text for one in open_source(f"hf:{NAME}").documents()] == ["a text"]
    assert waited == [1.0]


def test_what_breaks_off_behind_the_last_byte_has_come(server: StandIn, waited: list[float]) -> None:
    server.add(NAME, {"small.txt": b"a text"})
    server.fault = at(3, "longer")
    assert [one.text for one in open_source(f"hf:{NAME}").documents()] == ["a text"]
    assert [one.range for one in server.asked("resolve")] == ["bytes=0-5"], "no empty range"
    assert waited == [1.0]


def test_every_third_request_fails(server: StandIn, waited: list[float], tmp_path: Path) -> None:
    whole = prepared(tmp_path / "whole")
    server.forget()
    kinds = ["truncate", "503", "reset", "429"]
    server.fault = lambda request: kinds[request.number // 3 % 4] if request.number % 3 == 0 else None
    assert prepared(tmp_path / "set") == whole
    assert set(waited) <= {1.0, 2.0, 4.0}


def test_what_the_server_asks_to_wait_is_waited(server: StandIn, waited: list[float], tmp_path: Path) -> None:
    server.fault = lambda request: "429 55" if request.number in (3, 4) else None
    prepared(tmp_path / "set")
    assert waited == [55.0, 55.0]


def test_packed_lines_are_read_through_faults_and_from_the_file_that_is_needed(server: StandIn, tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    files = {f"{number}.jsonl.gz": gzip.compress("".join(rows[number::4]).encode()) for number in range(4)}
    server.add(NAME, files)
    whole = prepared(tmp_path / "whole")
    sent = {path: size for path, size in server.sent.items() if path}
    server.forget()
    server.fault = lambda request: ["truncate", "reset"][request.number % 2] if request.number % 3 == 0 else None
    assert prepared(tmp_path / "set") == whole
    assert {path: size for path, size in server.sent.items() if path} == sent
    server.fault = lambda request: "418" if request.path == "3.jsonl.gz" else None
    refused(tmp_path / "again")
    server.forget()
    server.fault = lambda request: None
    assert prepared(tmp_path / "again") == whole
    assert set(path for path in server.sent if path) == {"2.jsonl.gz", "3.jsonl.gz"}, "piece 4 begins in the third"


# --- what does not pass


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", "the Hub answers 503, 8 times in a row"),
        ("429", "the Hub answers 429, 8 times in a row"),
        ("reset", "8 times in a row"),
        ("truncate", "8 times in a row"),
    ],
)
def test_after_the_last_repetition_there_is_one_line(
    server: StandIn,
    waited: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    words: str,
    kept: bool,
) -> None:
    """It promises to go on where something is kept: in the survey nothing is."""
    if not kept:
        monkeypatch.setattr("pocketlm.data.prepare.ENOUGH_DOCUMENTS", 10_000)
    whole = prepared(tmp_path / "whole")
    server.forget()
    server.fault = lambda request: fault if "2.parquet" in request.path else None
    message = refused(tmp_path / "set")
    assert message.startswith(f"source 'hf:{NAME}': {NAME}/2.parquet: ")
    assert words in message
    assert message.endswith(AGAIN_FROM_HERE if kept else "times in a row; run the command again")
    assert (tmp_path / "set" / "plan.json").exists() == kept
    assert waited == [1, 2, 4, 8, 16, 32, 64]
    server.fault = lambda request: None
    assert prepared(tmp_path / "set") == whole


def test_who_is_offline_hears_it_soon(
    server: StandIn, waited: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault = lambda request: "reset"
    assert "cannot be reached" in refused(tmp_path / "set")
    assert waited == [1.0, 2.0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused(tmp_path / "set") == f"source 'hf:{NAME}': HF_HUB_OFFLINE is set; unset it, or give files:GLOB"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "access refused (401); give a token that may read it (hf auth login, or HF_TOKEN)"),
        ("403", "access refused (403); give a token"),
        ("404", "1.parquet is no longer there"),
        ("418", "the Hub answers 418; run the command again"),
    ],
)
def test_what_will_not_pass_is_not_repeated(
    server: StandIn, waited: list[float], tmp_path: Path, fault: str, words: str
) -> None:
    server.fault = lambda request: fault if request.path == "1.parquet" else None
    assert words in refused(tmp_path / "set")
    assert waited == []


def test_a_server_that_wants_an_hour_is_not_waited_for(server: StandIn, waited: list[float], tmp_path: Path) -> None:
    server.fault = at(3, "429 3600")
    message = refused(tmp_path / "set")
    assert "the Hub asks to wait 3,600 s, with a token (hf auth login, or HF_TOKEN) often less; then run the" in message
    assert message.endswith("run the command again")
    assert waited == []


def test_a_file_that_vanished_is_named(server: StandIn, waited: list[float], tmp_path: Path) -> None:
    repository = server.repositories[NAME]
    opened = open_source(f"hf:{NAME}").documents()
    next(opened)
    repository.commits[repository.main] = {name: data for name, data in FILES.items() if name != "2.parquet"}
    with pytest.raises(DataError, match=rf"{NAME}/2\.parquet is no longer there at commit {repository.main}; give"):
        list(opened)
    assert waited == []


def test_a_file_of_another_size_or_commit_is_refused(server: StandIn, tmp_path: Path) -> None:
    repository = server.repositories[NAME]
    opened = open_source(f"hf:{NAME}").documents()
    next(opened)
    repository.commits[repository.main] = FILES | {"1.parquet": FILES["1.parquet"] + b"\0"}
    with pytest.raises(DataError, match=r"1\.parquet is not what the Hub listed at commit"):
        list(opened)


# --- a branch that moves


def moved(repository: Repository) -> str:
    return repository.commit({"0.parquet": parquet(["something else"], 1)})


def interrupted(server: StandIn, folder: Path, number: int) -> int:
    """A preparation in a process of its own, killed when it sends its n-th request; its exit code."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen([sys.executable, PROGRAM, json.dumps(config(folder))], env=environment, text=True)

    def kill(request: Request) -> None:
        if request.number == number:
            process.send_signal(signal.SIGKILL)
            process.wait()

    server.forget()
    server.fault = kill
    process.wait()
    server.fault = lambda request: None
    return process.returncode


def test_a_killed_preparation_goes_on_from_the_row_group_it_needs(
    server: StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed at requests in all phases, then finished; also where the branch moved meanwhile, to the same bytes."""
    assert interrupted(server, tmp_path / "whole", 0) == 0
    whole, requests = contents(tmp_path / "whole"), list(server.requests)
    repository, first = server.repositories[NAME], server.repositories[NAME].main
    for number in (2, len(requests) // 2, len(requests) - 5, len(requests) - 1):
        folder = tmp_path / str(number)
        assert interrupted(server, folder, number) == -signal.SIGKILL
        begun = (folder / "plan.json").exists()
        finished = len(list(folder.glob("piece-*.json")))
        if begun:
            moved(repository)
        server.forget()
        assert prepared(folder) == whole, number
        assert {request.path for request in server.asked("info")} == {""}
        read = {request.path for request in server.asked("resolve")}
        first_needed = (finished * 64 // 150) if begun else 0
        assert read == {f"{file}.parquet" for file in range(first_needed, 3)}, (number, finished)
        repository.main = first
    assert "piece" not in capfd.readouterr().err


def test_of_a_row_group_nothing_is_read_before_the_one_that_is_needed(server: StandIn, tmp_path: Path) -> None:
    """Piece 5 begins at document 320, in the third row group of the last file; it breaks off in the sixth."""
    data = parquet(TEXTS[300:], 10)
    server.add(NAME, FILES | {"2.parquet": data})
    whole = prepared(tmp_path / "whole")
    allowed = iter(range(6))  # the footer and five row groups
    server.fault = lambda request: (
        "503 9999" if (request.kind, request.path) == ("resolve", "2.parquet") and next(allowed, None) is None else None
    )
    refused(tmp_path / "set")
    assert len(list((tmp_path / "set").glob("piece-*.json"))) == 5
    server.fault = lambda request: None
    server.forget()
    assert prepared(tmp_path / "set") == whole
    groups = [pq.ParquetFile(io.BytesIO(data)).metadata.row_group(number) for number in range(10)]
    rest = sum(group.column(0).total_compressed_size for group in groups[2:])
    assert {path: sent for path, sent in server.sent.items() if path} == {"2.parquet": min(65_536, len(data)) + rest}


def test_a_commit_that_is_gone_is_one_line(server: StandIn, tmp_path: Path) -> None:
    server.fault = lambda request: "503 9999" if request.path == "2.parquet" else None
    refused(tmp_path / "set")
    repository, first = server.repositories[NAME], server.repositories[NAME].main
    moved(repository)
    del repository.commits[first]
    server.fault = lambda request: None
    message = refused(tmp_path / "set")
    assert f"commit {first}, with which this set was begun, is gone; delete its folder to begin anew" in message


def test_a_commit_with_other_files_than_were_recorded_is_one_line(server: StandIn, tmp_path: Path) -> None:
    server.fault = lambda request: "503 9999" if request.path == "2.parquet" else None
    refused(tmp_path / "set")
    repository = server.repositories[NAME]
    repository.commits[repository.main] = FILES | {"3.parquet": FILES["2.parquet"]}
    server.fault = lambda request: None
    assert "has other files than when this data set was begun; delete its folder" in refused(tmp_path / "set")


# --- the command


def test_the_command_with_a_hub(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data", "prepare", "--source", f"hf:{NAME}", "--tokenizer", "byte", "--val-fraction", "0.1"]
    assert main([*words, "--max-documents", "300", "--json"]) == 0
    shown, said = capsys.readouterr()
    assert json.loads(shown)["source"] == f"hf:{NAME}"
    assert f"hf:{NAME} at commit {server.repositories[NAME].main[:12]}: 3 files" in said
    server.repositories[NAME].gated = True
    assert main([*words, "--out", "other"]) == 3
    shown, said = capsys.readouterr()
    assert f"{NAME} is gated" in said
    assert "Traceback" not in said


def test_training_on_a_hub_goes_on_without_it(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [
        "--data.source",
        f"hf:{NAME}",
        "--data.max-documents",
        "300",
        "--data.val-fraction",
        "0.1",
        "--data.stream",
        "off",
    ]
    words = ["train", "debug", "--out", "run", *data, "--total-steps", "3"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "300 documents" in said
    [folder] = tmp_path.glob("data/texts-*")
    recorded = json.loads((folder / "dataset.json").read_bytes())
    assert recorded["source"]["revision"] == server.repositories[NAME].main
    assert recorded["max_documents"] == 300
    moved(server.repositories[NAME])
    server.forget()
    assert main(words) == 0
    assert "complete" in capsys.readouterr().err
    assert main(["train", "debug", "--out", "another", *data, "--total-steps", "2"]) == 0
    assert server.requests == []


def test_a_hub_is_scored_up_to_a_limit(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of the same text on the disk, and no file is read that is not needed."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "debug", "--out", "run", "--data.source", "synthetic", "--total-steps", "1"]) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--data", f"hf:{NAME}"]) == 2
    assert "pocketlm data prepare --max-documents" in capsys.readouterr().err
    assert server.requests == []
    Path("0.parquet").write_bytes(FILES["0.parquet"])
    figures = []
    for source in (f"hf:{NAME}", "files:0.parquet"):
        assert main(["eval", "run", "--data", source, "--limit", "700", "--json"]) == 0
        shown, said = capsys.readouterr()
        figures.append({name: value for name, value in json.loads(shown).items() if name != "data"})
        assert (f"hf:{NAME} at commit" in said) == (source != "files:0.parquet")
    assert figures[0] == figures[1]
    assert figures[0]["tokens"] == 700
    assert {request.path for request in server.asked("resolve")} == {"0.parquet"}


# --- real text, and much of it


def test_real_web_text_gives_the_tokens_of_the_local_files(server: StandIn, shared: Path, tmp_path: Path) -> None:
    rows = [one.text for one in open_source(f"files:{shared}/text/fineweb-sample.jsonl.gz").documents()]
    files = {f"sample/10BT/{number:03}.parquet": parquet(rows[number::2], 1000) for number in range(2)}
    files["sample/first.parquet"] = (shared / "text" / "fineweb-sample-first100.parquet").read_bytes()
    train = [{"split": "train", "path": "sample/10BT/*"}]
    server.add("HuggingFaceFW/fineweb", files, {"configs": [{"config_name": "sample-10BT", "data_files": train}]})
    for name, data in files.items():
        (tmp_path / Path(name).name).write_bytes(data)
    source = f"files:{tmp_path}/000.parquet,{tmp_path}/001.parquet"
    sets = [
        prepare(DataConfig(**config(tmp_path / name, source=spec, piece_documents=500)), progress=print)
        for name, spec in (("local", source), ("hub", "hf:HuggingFaceFW/fineweb/sample-10BT"))
    ]
    local, there = ({k: v for k, v in contents(one).items() if k.endswith(".tokens")} for one in sets)
    assert local == there
    assert len(local) == 10
    server.add("someone/first", {"train.parquet": files["sample/first.parquet"]})
    assert [one.text for one in open_source("hf:someone/first").documents()] == rows[:100]


MEASURED = """
import re, sys
from pathlib import Path
from pocketlm.text import hub
from pocketlm.text.sources import open_source

def peak_kb():  # getrusage begins with the peak of the process that started this one
    return re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]

before = peak_kb()
count = sum(1 for _ in open_source("hf:someone/large").documents())
print(count, before, peak_kb(), "torch" in sys.modules)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_flat_while_a_row_group_of_200_mb_passes(server: StandIn) -> None:
    """Every byte of the text column once, 4 MiB at a time; without torch."""
    texts = [os.urandom(5000).hex() for _ in range(21_000)]
    data = parquet(texts, len(texts))
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).total_compressed_size
    assert chunk > 200e6
    server.add("someone/large", {"train.parquet": data})
    environment = os.environ | {"HF_ENDPOINT": server.url}
    done = subprocess.run([sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, check=True)
    count, before_kb, peak_kb, torch = done.stdout.split()
    assert (int(count), torch) == (len(texts), "False")
    assert server.sent["train.parquet"] == 65_536 + chunk
    assert int(peak_kb) < 250_000
    assert int(peak_kb) - int(before_kb) < 150_000
