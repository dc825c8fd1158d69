"""Training on text that streams, while the network fails and either process is killed.

The oracle is a run on the finished set of the same texts, from local files: what a stream brings is what was there, in
the same order, and what becomes of the run is the same to the last bit. The server is tests/stand_in.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.errors import Interrupted
from pocketlm.journal import Journal
from pocketlm.training import halving
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from pocketlm.training.state import TrainState
from stand_in import Request, StandIn, standing_in

PROGRAM = str(Path(__file__).with_name("streaming.py"))
NAME = "someone/texts"
WORDS = ["apples", "pears", "plums", "figs", "kiwis", "dates", "limes"]
PIECE, SEGMENT, KEEP = 32, 2, 2
FIELDS = {
    "data.val_fraction": 0.1,
    "data.piece_documents": PIECE,
    "data.val_tokens": 3000,
    "train.tokens_per_step": 2048,
    "train.checkpoint_every": 100,
    "train.eval_every": 40,
    "train.keep_last": 4,
    "sample.every": 0,
}
STREAMED = {"data.segment_pieces": SEGMENT, "data.keep_segments": KEEP}
REQUESTS = 60  # an undisturbed run makes a few more
STEPS = 110  # one and a half epochs, of five segments each

Process = subprocess.Popen[str]
Fault = Callable[[Request, Process], str | None]


def texts() -> list[str]:
    drawn = random.Random(7)
    return [" ".join([f"{number}:", *drawn.choices(WORDS, k=drawn.randrange(50, 200))]) for number in range(300)]


def parquet(rows: list[str], group: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), sink, row_group_size=group)
    return sink.getvalue()


def parts() -> dict[str, bytes]:
    """Of the same texts; the last file is one row group."""
    rows = texts()
    return {
        "0.parquet": parquet(rows[:90], 20),
        "1.parquet": parquet(rows[90:150], 7),
        "2.parquet": parquet(rows[150:], 999),
    }


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standing_in() as stand_in:
        stand_in.add(NAME, parts())
        yield stand_in


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run on the finished set of local files, in the same order."""
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    where = {"data.source": f"files:{folder}/texts.jsonl", "data.dir": str(folder / "data"), "data.shuffle": "piece"}
    assert main(words(folder / "run", FIELDS | where)) == 0
    return outcome(folder / "run")


def words(out: Path, fields: dict[str, Any], *more: str) -> list[str]:
    flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return ["train", "debug", "--out", str(out), "--total-steps", str(STEPS), *flags, *more]


Outcome = tuple[str, list[tuple[Any, ...]]]


def outcome(run: Path) -> Outcome:
    """The weights at the end, and every loss."""
    weights = (run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()
    records = Journal.read(run / "metrics.jsonl")
    return hashlib.sha256(weights).hexdigest(), [(one["kind"], one["step"], one.get("loss")) for one in records]


class Stream:
    """A run on the server's texts, in processes of their own."""

    def __init__(self, server: StandIn, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.said = ""
        self.most_shards = 0
        fields = FIELDS | STREAMED | {"data.source": f"hf:{NAME}", "data.dir": str(folder / "data")}
        self.words = words(folder / "run", fields)

    def begun(self, *more: str, **environment: str) -> Process:
        hub = {"HF_ENDPOINT": self.server.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, PROGRAM, *self.words, *more],
            env=os.environ | hub | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *more: str, fault: Fault = lambda request, process: None, **environment: str) -> int:
        """From here to its end; the server asks `fault` before each answer."""
        process = self.begun(*more, **environment)

        def asked(request: Request) -> str | None:
            self.look()
            return fault(request, process)

        self.server.forget()
        self.server.fault = asked
        _, self.said = process.communicate()
        self.server.fault = lambda request: None
        self.look()
        return process.returncode

    def look(self) -> None:
        """Shards on the disk; one may be half-written beside them."""
        self.most_shards = max(self.most_shards, len(list(self.folder.glob("data/train-*.tokens"))))

    def outcome(self) -> Outcome:
        assert self.most_shards <= KEEP * SEGMENT
        return outcome(self.folder / "run")


@pytest.fixture
def stream(server: StandIn, tmp_path: Path) -> Stream:
    return Stream(server, tmp_path)


def kill(process: Process) -> None:
    process.kill()
    process.wait()


def kill_feeder(process: Process) -> None:
    [feeder] = psutil.Process(process.pid).children()
    feeder.kill()


def at(number: int, then: Callable[[Process], None]) -> Fault:
    """What is done at a request, once."""
    return lambda request, process: then(process) if request.number == number else None


def test_a_stream_is_the_run_on_the_finished_set(stream: Stream, oracle: Outcome) -> None:
    """Also where each piece is made twice, because the second epoch comes when it is gone."""
    assert stream.run() == 0
    assert stream.outcome() == oracle
    assert "training waited" in stream.said
    assert not list(stream.folder.glob("data/manifest.json")), "a set that is never whole is not finished"
    checkpoints = {path.name for path in stream.folder.glob("run/checkpoints/step-*")}
    assert {f"step-{STEPS:08d}", "step-00000100"} < checkpoints, "those of the last segments"
    requests = len(stream.server.asked("resolve"))
    assert stream.run() == 0, "it is complete"
    assert "is complete" in stream.said
    assert stream.server.requests == []
    assert requests > 0


# --- killed


@pytest.mark.goal("R8", "R21")
def test_killed_while_text_is_fetched(stream: Stream, oracle: Outcome, proof: Any, tmp_path: Path) -> None:
    """At a request of the network, drawn anew."""
    for case in proof.cases(1, 20):
        each = Stream(stream.server, tmp_path / f"case-{case}")
        number = proof.random(case).randint(3, REQUESTS)
        assert each.run(fault=at(number, kill)) == -signal.SIGKILL, number
        assert each.run() == 0, each.said
        assert each.outcome() == oracle, (case, number)
        assert not list(each.folder.rglob("*.tmp-*"))


@pytest.mark.goal("R8", "R21")
def test_the_feeder_is_killed_while_it_fetches(stream: Stream, oracle: Outcome, proof: Any, tmp_path: Path) -> None:
    """Where rows are lacking then, another one begins; the run does not end."""
    for case in proof.cases(1, 20):
        each = Stream(stream.server, tmp_path / f"case-{case}")
        number = proof.random(case).randint(REQUESTS // 2, REQUESTS)
        assert each.run(fault=at(number, kill_feeder)) == 0, each.said
        assert "Traceback" not in each.said
        assert each.outcome() == oracle, (case, number)


@pytest.mark.goal("R8", "R21")
def test_the_feeder_dies_while_it_writes(stream: Stream, oracle: Outcome, proof: Any, tmp_path: Path) -> None:
    """In an operation of its disk, of a write in the middle, and each one after it too, until none brings a piece."""
    for case in proof.cases(1, 20):
        each = Stream(stream.server, tmp_path / f"case-{case}")
        number = proof.random(case).randint(20, 650)
        assert each.run(DIE_AT=str(number)) in (0, 3), each.said
        if "is complete" not in each.said:
            assert each.run() == 0, each.said
        assert each.outcome() == oracle, (case, number)


def test_a_feeder_that_dies_again_and_again_ends_the_run_with_a_line_and_a_checkpoint(stream: Stream) -> None:
    assert stream.run("--train.stop-at-step", "30") == 0
    assert stream.run(DIE_AT="1") == 3
    assert stream.said.splitlines()[-1].endswith("the data ended with code 137; run the command again")
    assert "Traceback" not in stream.said
    assert any(stream.folder.glob("run/checkpoints/step-*"))


@pytest.mark.goal("R1", "R8")
def test_killed_while_it_trains(stream: Stream, oracle: Outcome, proof: Any, tmp_path: Path) -> None:
    """When a checkpoint is there, some further steps on; again and again until it is done."""
    for case in proof.cases(1, 10):
        each, code, kills = Stream(stream.server, tmp_path / f"case-{case}"), 1, 0
        while code != 0:
            wanted = proof.random(case * 100 + kills).randint(1, 4)
            with each.begun() as process:
                assert process.stderr is not None
                for line in process.stderr:
                    wanted -= line.startswith("saved")
                    if not wanted:
                        kill(process)
                        kills += 1
            code = process.returncode
            each.look()
            assert code in (0, -signal.SIGKILL)
        assert kills > 1
        assert each.outcome() == oracle, case


def test_from_a_checkpoint_whose_pieces_are_gone(stream: Stream, oracle: Outcome) -> None:
    """They are fetched and made again, and are what they were."""
    assert stream.run("--train.stop-at-step", "60") == 0
    early = sorted(stream.folder.glob("run/checkpoints/step-*"))[0]
    assert stream.run("--resume", str(early)) == 0
    assert stream.outcome() == oracle


def test_without_the_folder_of_the_data(stream: Stream, oracle: Outcome) -> None:
    """All is fetched again, and goes again, up to what the run needs."""
    assert stream.run("--train.stop-at-step", "60") == 0
    shutil.rmtree(stream.folder / "data")
    assert stream.run() == 0
    assert stream.outcome() == oracle


# --- what networks do


def test_faults_of_the_network_change_nothing(stream: Stream, oracle: Outcome) -> None:
    """Every third request fails."""
    kinds = ["truncate", "503", "reset", "429"]

    def each_third(request: Request, process: Process) -> str | None:
        return kinds[request.number // 3 % 4] if request.number % 3 == 0 else None

    assert stream.run(fault=each_third) == 0, stream.said
    assert stream.outcome() == oracle
    assert "asking again" in stream.said


def test_a_file_that_vanishes_ends_the_run_with_a_line_and_a_checkpoint(stream: Stream, oracle: Outcome) -> None:
    """Once it is there again the run goes on, also where the branch has moved on meanwhile."""
    repository = stream.server.repositories[NAME]
    files = repository.commits[repository.main]
    there = files["2.parquet"]

    def vanish(request: Request, process: Process) -> None:
        if any(stream.folder.glob("run/checkpoints/step-*")):
            files.pop("2.parquet", None)

    assert stream.run(fault=vanish) == 3
    assert f"source 'hf:{NAME}': {NAME}/2.parquet is no longer there at commit" in stream.said
    last = stream.said.splitlines()[-1]
    assert last.startswith(f"pocketlm: source 'hf:{NAME}': commit {repository.main} has other files than"), last
    assert len(list(stream.folder.glob("run/checkpoints/step-*"))) > 1
    files["2.parquet"] = there
    repository.commit({"0.parquet": parquet(["another text"], 1)})
    assert stream.run() == 0
    assert stream.outcome() == oracle


def local(folder: Path, *more: str, name: str = "run", **fields: Any) -> list[str]:
    """The command on a file of the same texts, which streams."""
    where = {"data.source": f"files:{folder}/texts.jsonl", "data.dir": str(folder / "data"), "data.stream": "on"}
    return words(folder / name, FIELDS | STREAMED | where | fields, *more)


def write_texts(folder: Path, rows: list[str]) -> Path:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return file


def test_a_piece_that_is_not_what_it_was_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each time. The file has other text, as long and as old, behind the validation text: only the piece can tell."""
    file = write_texts(tmp_path, texts())
    before = file.stat()
    assert main(local(tmp_path, "--train.stop-at-step", "60")) == 0
    write_texts(tmp_path, [*texts()[:150], *(text.replace("apples", "garlic") for text in texts()[150:])])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    early = sorted(tmp_path.glob("run/checkpoints/step-*"))[0]
    for resume in (["--resume", str(early)], [], []):
        capsys.readouterr()
        assert main(local(tmp_path, *resume)) == 3
        assert "is not what it was when it was first made" in capsys.readouterr().err


class StopsAfterRollback(Silent):
    """Hears of ways back, and stops the process at the first one, once."""

    def __init__(self, *, stops: bool) -> None:
        self.stops, self.back_to = stops, list[int]()

    def record(self, record: Any) -> None:
        if record["kind"] == "rollback":
            self.back_to.append(record["step"])
            if self.stops:
                self.stops = False
                os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_after_a_way_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that was gone back to, made where a segment begins, is still one to go back to."""
    write_texts(tmp_path, texts())
    real = halving.train_step

    def step(state: TrainState, *arguments: Any, **options: Any) -> Any:
        now = state.progress
        if now.position == 64 * 22 or (now.rollbacks, now.step) == (1, 22):
            next(iter(state.precision.model.parameters())).data.view(-1)[7] = math.nan
            state.precision.refresh()
        return real(state, *arguments, **options)

    monkeypatch.setattr(halving, "train_step", step)
    ends = []
    for name in ("undisturbed", "stopped"):
        listener = StopsAfterRollback(stops=name == "stopped")
        given = local(
            tmp_path, name=name, **{"data.segment_pieces": 1, "data.keep_segments": 0, "train.eval_every": 10}
        )
        fields = dict(zip((word[2:] for word in given[6::2]), given[7::2], strict=True))
        config = Config.preset("debug", fields | {"train.total_steps": "60"})
        with contextlib.suppress(Interrupted):
            train(config, out=tmp_path / name, listener=listener)
        train(config, out=tmp_path / name, listener=listener)
        records = Journal.read(tmp_path / name / "metrics.jsonl")
        ends.append([(one["step"], one["loss"]) for one in records if one["kind"] == "train"])
        assert len(set(listener.back_to)) == 1, listener.back_to
        assert len(listener.back_to) == 2
        assert listener.back_to[0] % 100, "a checkpoint that only a segment has made"
    assert ends[0] == ends[1]


# --- the command


def test_a_stop_ends_both_processes(stream: Stream, oracle: Outcome) -> None:
    """Also while the run waits for text that does not come."""
    feeders = list[psutil.Process]()

    def stop(process: Process) -> None:
        feeders.extend(psutil.Process(process.pid).children())
        process.terminate()
        process.wait()

    assert stream.run(fault=at(30, stop)) == 143
    assert "stopped by SIGTERM" in stream.said
    psutil.wait_procs(feeders, timeout=30)
    assert [feeder.is_running() for feeder in feeders] == [False]
    assert stream.run() == 0
    assert stream.outcome() == oracle


def test_a_run_that_keeps_everything_finishes_the_set(server: StandIn, tmp_path: Path, oracle: Outcome) -> None:
    """And another one on it needs no network; its order and its held-out text are the same."""
    stream = Stream(server, tmp_path)
    stream.words += ["--data.keep-segments", "0"]
    assert stream.run() == 0
    assert outcome(tmp_path / "run") == oracle
    assert (tmp_path / "data" / "manifest.json").exists()
    server.forget()
    shutil.rmtree(tmp_path / "run")
    assert stream.run() == 0
    assert outcome(tmp_path / "run") == oracle
    assert server.requests == []


def test_what_was_held_out_is_found_again(stream: Stream, oracle: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pocketlm eval` gives the loss that the run has given."""
    assert stream.run() == 0
    process = subprocess.run(
        [sys.executable, PROGRAM, "eval", str(stream.folder / "run"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    last = [loss for kind, _, loss in oracle[1] if kind == "eval"][-1]
    assert json.loads(process.stdout)["loss"] == last
