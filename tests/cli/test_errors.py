"""Bad input: one clear line, the right exit code, no traceback, and every file that was there stays as it was.

All commands go through `main`, where a traceback would be an exception in the test; some run as processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketlm.cli.main import main
from pocketlm.files import Lock
from pocketlm.training import resolve

TEXT = "".join(f"{n}: the {n * n % 97} ravens flew over {n % 13} hills\n" for n in range(600))
TRAIN = ["train", "debug", "--data.source", "files:text.txt", "--train.total-steps", "10", "--out", "run"]
NEWEST = Path("run/checkpoints/step-00000010")
Refused = Callable[..., str]


def files_of(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts good and bad, and a finished run of ten steps with checkpoints at five and ten."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a few words\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "broken.toml").write_text("[train\nseed = 1\n")
    (folder / "unknown.toml").write_text('preset = "debug"\n[optim]\nlrr = 1\n')
    (folder / "mistyped.toml").write_text("preset = 3\n")
    (folder / "checkpointless").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
        assert main(TRAIN) == 0
    own = {"manifest.json", "training"}
    shutil.copytree(folder / NEWEST, folder / "foreign", ignore=lambda place, names: own & set(names))
    return folder


@pytest.fixture
def workdir(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    return tmp_path / "work"


@pytest.fixture
def refused(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused with `code`; returns its message of one line (or one a problem)."""

    def run(code: int, *words: str) -> str:
        before = files_of(workdir)
        capsys.readouterr()
        assert main(list(words)) == code
        printed = capsys.readouterr()
        assert printed.out == "", "stdout is for results"
        after = files_of(workdir)
        assert {name: after.get(name) for name in before} == before, "something was lost"
        return message_of(printed.err)

    return run


def message_of(stderr: str) -> str:
    """The one refusal in what a command says; it is the last thing said."""
    assert "Traceback" not in stderr
    assert stderr.endswith("\n")
    assert f"\n{stderr}".count("\npocketlm: ") == 1, stderr
    return f"\n{stderr}".partition("\npocketlm: ")[2].rstrip("\n")


def pocketlm(*words: str, program: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; `program` is Python that runs before it."""
    source = f"{program}\nimport sys\nfrom pocketlm.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", source, *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


# words, exit code, what the message must hold
CASES: list[tuple[str, int, list[str]]] = [
    # what is named does not exist
    ("trian debug", 2, ["'trian'", "did you mean train?"]),
    ("train debgu", 2, ["'debgu'", "did you mean debug?", "tiny"]),
    ("train", 2, ["PRESET|FILE.toml", "pocketlm train --help"]),
    ("train debug tiny", 2, ["'tiny'", "--section.field VALUE"]),
    ("train debug --optim.lrr 1", 2, ["'optim.lrr'", "did you mean --optim.lr?"]),
    ("train debug --lr 1", 2, ["'lr'", "did you mean --optim.lr?"]),
    ("train debug --optim.lr", 2, ["--optim.lr needs a value"]),
    ("train --optim.lr --seed 3 debug", 2, ["--optim.lr needs a value"]),
    ("train --optim.lr much debug", 2, ["optim.lr", "'much'"]),
    ("train --optim.lr=much debug", 2, ["optim.lr", "'much'"]),
    ("train --lr 1 debug", 2, ["'lr'", "did you mean --optim.lr?"]),
    ("train debug --out", 2, ["--out"]),
    ("generate run --prompt x --temprature 1", 2, ["--temprature", "did you mean --temperature?"]),
    ("generate run", 2, ["--prompt"]),
    ("generate nowhere --prompt x", 3, ["nowhere does not exist"]),
    ("generate data --prompt x", 3, ["data", "config.json"]),
    ("chat nowhere", 3, ["nowhere does not exist"]),
    ("eval nowhere --data files:text.txt", 3, ["nowhere does not exist"]),
    ("eval foreign", 2, ["foreign was not trained here", "--data"]),
    ("eval run --data nowhere", 3, ["'nowhere'", "files:GLOB"]),
    ("eval run --data files:empty.txt", 3, ["empty.txt"]),
    ("sizes nowhere", 2, ["'nowhere'", "presets:"]),
    ("verify nowhere", 3, ["nowhere does not exist"]),
    (
        "verify checkpointless",
        3,
        ["checkpointless is none of them", "a run, a checkpoint, an imported model or a data set"],
    ),
    ("data show nowhere", 3, ["nowhere", "dataset.json"]),
    ("data show run", 3, ["run", "dataset.json"]),
    ("data shwo run", 2, ["prepare or show"]),
    ("data prepare --source files:text.txt", 2, ["--tokenizer"]),
    ("tokenizer", 2, ["pocketlm tokenizer train --source"]),
    ("train nowhere.toml", 3, ["nowhere.toml", "No such file"]),
    # what is named is not what it should be
    ("train broken.toml", 2, ["broken.toml", "no TOML", "line 1"]),
    ("train unknown.toml", 2, ["'optim.lrr'", "did you mean --optim.lr?"]),
    ("train mistyped.toml", 2, ["'3'", "presets:"]),
    ("train debug --data.source files:nowhere.txt", 3, ["nowhere.txt"]),
    ("train debug --data.source text.txt", 3, ["did you mean files:text.txt?"]),
    ("train debug --data.source files:empty.txt", 3, ["empty.txt", "no text"]),
    ("train debug --data.source files:binary.txt", 3, ["binary.txt", "byte offset 0"]),
    ("train debug --data.source hf:texts", 3, ["hf:texts", "hf:OWNER/NAME[/CONFIG][@REVISION]"]),
    ("train debug --data.tokenizer nowhere/tokenizer.json", 3, ["nowhere/tokenizer.json", "byte"]),
    ("train debug --data.tokenizer run", 3, ["run", "tokenizer.json"]),
    ("train debug --data.tokenizer broken.toml", 3, ["broken.toml", "tokenizer.json"]),
    ("tokenizer train --source files:text.txt --vocab-size 9 --out t.json", 3, ["9", "256"]),
    ("tokenizer train --source files:text.txt --vocab-size 90000 --out t.json", 3, ["90000", "too small", "; take "]),
    # what does not go together
    ("train debug --model.vocab-size 256", 2, ["257", "256", "--model.vocab-size 257"]),
    ("train debug --data.source files:short.txt", 3, ["context 32", "longer than the corpus"]),
    ("train debug --data.context 64", 2, ["64", "32", "--model.max-position-embeddings 64"]),
    ("train debug --train.tokens-per-step 100", 2, ["100", "32", "--train.tokens-per-step 96"]),
    ("train debug --schedule.warmup-steps 99", 2, ["99", "60", "--schedule.warmup-steps"]),
    ("train debug --model.num-attention-heads 3 --model.num-key-value-heads 2", 2, ["3", "2", "no multiple"]),
    ("eval run --data files:text.txt --context 64", 2, ["64", "1..32"]),
    ("train debug --resume nowhere", 3, ["nowhere does not exist"]),
    ("train debug --resume run --out other", 3, ["step-00000010", "other"]),
    ("train debug --additional-steps few", 2, ["--additional-steps", "'few'"]),
    ("train debug --out new --additional-steps 0", 2, ["--additional-steps: given 0", ">= 1"]),
    ("train debug --out new --additional-steps 5", 2, ["new holds no run", "--total-steps"]),
    ("train debug --out new --resume weights-only", 3, ["new has no valid checkpoint"]),
    (
        "train debug --data.source files:text.txt --out run --total-steps 12",
        2,
        ["10 steps", "12", "--additional-steps"],
    ),
    ("train debug --out run --seed 3", 2, ["train.seed: 3, 0", "--out", "--resume weights-only"]),
    # values out of range
    ("train debug --optim.lr -1", 2, ["optim.lr", "'-1'", "greater than 0"]),
    ("train debug --optim.lr 0", 2, ["optim.lr", "'0'", "greater than 0"]),
    ("train debug --optim.lr nan", 2, ["optim.lr", "'nan'", "finite"]),
    ("train debug --optim.lr inf", 2, ["optim.lr", "'inf'", "finite"]),
    ("train debug --optim.lr much", 2, ["optim.lr", "'much'", "number"]),
    ("train debug --total-steps 0", 2, ["train.total_steps", "'0'", "1"]),
    ("train debug --seed -1", 2, ["train.seed", "'-1'", "0"]),
    ("train debug --train.dtype fp8", 2, ["train.dtype", "'fp8'", "'fp32'", "'bf16'"]),
    ("train debug --sample.prompts [x", 2, ["--sample.prompts", "no list"]),
    ("data prepare --source files:text.txt --tokenizer byte --val-fraction 0", 2, ["data.val_fraction", "'0'"]),
    ("eval run --data files:text.txt --context 0", 2, ["--context 0", "1..32"]),
    ("eval run --data files:text.txt --stride 0", 2, ["--stride 0", "1..32"]),
    ("eval run --data files:text.txt --limit -1", 2, ["--limit -1"]),
    ("eval run --data files:text.txt --dtype fp8", 2, ["fp8", "bf16"]),
    ("generate run --prompt x --temperature nan", 2, ["temperature nan"]),
    ("generate run --prompt x --top-p 0", 2, ["top_p 0"]),
    ("generate run --prompt x --max-new-tokens 0", 2, ["max_new_tokens 0"]),
    ("generate run --prompt x --seed -1", 2, ["seed -1"]),
    # places that cannot be written to
    ("train debug --out text.txt", 3, ["text.txt"]),
    ("train debug --out text.txt/run", 3, ["text.txt/run", "Not a directory"]),
    ("data prepare --source files:text.txt --tokenizer byte --out run", 3, ["run", "other files"]),
    ("data prepare --source files:text.txt --tokenizer byte --out text.txt", 3, ["text.txt is a file"]),
    ("tokenizer train --source files:text.txt --vocab-size 260 --out run", 3, ["run", "Is a directory"]),
]


@pytest.mark.parametrize(("words", "code", "parts"), CASES, ids=[words for words, _, _ in CASES])
def test_refused_in_one_line(words: str, code: int, parts: list[str], refused: Refused) -> None:
    message = refused(code, *words.split())
    assert "\n" not in message
    for part in parts:
        assert part in message, (part, message)


def test_every_problem_of_a_configuration_is_named_at_once(refused: Refused) -> None:
    words = "--optim.lr -1 --optim.eps nan --train.total-steps 0 --train.steps 5 --data.context none"
    lines = refused(2, "train", "debug", *words.split()).splitlines()
    assert len(lines) == 5
    for field in ("optim.lr", "optim.eps", "train.total_steps", "train.steps", "data.context"):
        assert any(field in line for line in lines), field


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(refused: Refused) -> None:
    Path("locked").mkdir(mode=0o500)
    assert "locked/run: Permission denied" in refused(3, "train", "debug", "--out", "locked/run")


# --- a run that is already there


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--optim.lr", "0.003"], ["optim.lr: 0.003, 0.01", "--out"]),
        (["--seed", "4", "--model.hidden-size", "64"], ["train.seed: 4, 0", "model.hidden_size: 64, 32", "--out"]),
    ],
)
def test_another_configuration_on_a_run_names_both_values_and_leaves_the_run_alone(
    change: list[str], parts: list[str], refused: Refused
) -> None:
    before = files_of(Path("run"))
    message = refused(2, *TRAIN, *change)
    for part in ["run", *parts]:
        assert part in message, (part, message)
    assert files_of(Path("run")) == before


def test_other_data_on_a_run(refused: Refused) -> None:
    Path("text.txt").write_text(TEXT + "One line more.\n")
    Path("run/checkpoints/step-00000010/manifest.json").unlink()  # so that there is something left to train
    before = files_of(Path("run"))
    assert "other data" in refused(3, *TRAIN)
    assert files_of(Path("run")) == before


def test_the_own_data_of_a_run_are_not_there_any_more(refused: Refused) -> None:
    Path("data").rename("elsewhere")
    message = refused(2, "eval", "run")
    assert f"the data set that {NEWEST} was trained on is not in data/; give the text to score: --data" in message


def test_prepare_says_what_another_set_is(refused: Refused) -> None:
    words = ["data", "prepare", "--source", "files:text.txt", "--tokenizer", "byte", "--out", "set"]
    assert main(words) == 0
    Path("other.txt").write_text(TEXT)
    message = refused(3, *words, "--source", "files:other.txt", "--tokenizer", "bpe:300")
    assert message == (
        "set holds another data set (given, there): source: files:other.txt, files:text.txt; "
        "tokenizer: bpe:300, byte; give another folder, or delete it"
    )


def test_a_run_in_use_names_the_process(refused: Refused) -> None:
    with Lock(Path("run")):
        assert f"run is in use by pid {os.getpid()}" in refused(3, *TRAIN)


def test_two_processes_in_one_run(workdir: Path) -> None:
    holder = "import sys; from pathlib import Path; from pocketlm.files import Lock\n"
    holder += "with Lock(Path('run')): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        done = pocketlm(*TRAIN)
        process.communicate()
    assert done.returncode == 3
    assert f"in use by pid {process.pid}" in message_of(done.stderr)
    assert main(TRAIN) == 0, "a lock dies with its process"


# --- damaged files


def damage(path: Path) -> None:
    """Changes one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


WHOLE = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training/config.toml",
    "training/optimizer.safetensors",
    "training/state.json",
]


def test_these_are_all_files_of_a_checkpoint(workdir: Path) -> None:
    names = [str(path.relative_to(NEWEST)) for path in NEWEST.rglob("*") if path.is_file()]
    assert sorted(names) == sorted([*WHOLE, "manifest.json"])


@pytest.mark.parametrize("name", WHOLE)
def test_a_checkpoint_with_one_byte_changed(name: str, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    damage(NEWEST / name)
    for command in (["eval", str(NEWEST), "--data", "files:text.txt"], ["generate", str(NEWEST), "--prompt", "the"]):
        message = refused(3, *command)
        assert f"{NEWEST / name} is damaged" in message

    assert main(["verify", "run"]) == 3
    assert f"{NEWEST / name} is damaged" in capsys.readouterr().out
    assert main(["verify", str(NEWEST), "--json"]) == 3
    (part,) = json.loads(capsys.readouterr().out)["parts"]
    assert f"{NEWEST / name} is damaged" in part["problem"]

    # the run goes on with the checkpoint before, and says so
    assert main(["eval", "run", "--data", "files:text.txt", "--json"]) == 0
    printed = capsys.readouterr()
    assert f"{NEWEST / name} is damaged" in printed.err
    assert json.loads(printed.out)["model"] == "run/checkpoints/step-00000005"


@pytest.mark.parametrize("manifest", ["", "{}", '{"files": {"../../x": {}}}', "[1, 2", '{"files": {"config.json": 3}}'])
def test_a_manifest_that_is_none(manifest: str, refused: Refused) -> None:
    (NEWEST / "manifest.json").write_text(manifest)
    assert f"{NEWEST / 'manifest.json'} is damaged" in refused(3, "eval", str(NEWEST), "--data", "files:text.txt")


def test_a_checkpoint_without_manifest_is_no_model(refused: Refused) -> None:
    (NEWEST / "manifest.json").unlink()
    assert "manifest.json" in refused(3, "generate", str(NEWEST), "--prompt", "the")


def test_training_goes_on_from_the_checkpoint_before(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = files_of(NEWEST)
    damage(NEWEST / "model.safetensors")
    assert main(TRAIN) == 0
    said = capsys.readouterr().err
    assert "model.safetensors is damaged" in said
    assert "going on from step 5" in said
    mended = files_of(NEWEST)
    clocks = {str(NEWEST / name) for name in ("training/state.json", "manifest.json")}
    assert {name: mended[name] for name in whole if name not in clocks} == {
        name: whole[name] for name in whole if name not in clocks
    }


def test_a_run_without_any_whole_checkpoint(refused: Refused) -> None:
    for checkpoint in Path("run/checkpoints").iterdir():
        damage(checkpoint / "config.json")
    assert "no valid checkpoint" in refused(3, "generate", "run", "--prompt", "the")


@pytest.mark.parametrize("name", ["train-00000.tokens", "val-00000.tokens", "tokenizer.json", "dataset.json"])
def test_a_data_set_with_one_byte_changed(name: str, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = Path("data").iterdir()
    if name == "dataset.json":
        (folder / name).write_text((folder / name).read_text()[:-9])
    else:
        damage(folder / name)
    assert f"{folder / name} is damaged" in refused(3, "train", "debug", "--data.dir", str(folder), "--out", "new")
    assert main(["verify", str(folder)]) == 3
    assert f"{folder / name} is damaged" in capsys.readouterr().out
    assert main(["verify", str(folder), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["whole"] is False


# --- as processes


@pytest.mark.parametrize(
    ("words", "code"),
    [(["generate", "nowhere", "--prompt", "x"], 3), (["train", "debug", "--data.source", "files:binary.txt"], 3)],
)
def test_a_process_leaves_with_the_code_and_says_one_line(words: list[str], code: int, workdir: Path) -> None:
    done = pocketlm(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert "\n" not in message_of(done.stderr)


def test_a_hub_tokenizer_without_a_network(workdir: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        done = pocketlm(
            *["train", "debug", "--data.source", "files:text.txt", "--data.tokenizer", "someone/model"],
            program="import time; time.sleep = lambda seconds: None",  # the Hub library waits between its attempts
            HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}",
            HF_HOME=str(tmp_path / "hub"),
            HF_HUB_OFFLINE="0",
            no_proxy="127.0.0.1",
        )
    assert done.returncode == 3
    message = message_of(done.stderr)
    assert "\n" not in message
    assert "someone/model" in message
    assert "--data.tokenizer PATH" in message


PROBELESS = "from pocketlm.training import resolve; resolve.matmul_rate = lambda *words: 1e9"


@pytest.mark.parametrize("both", [False, True], ids=["stderr", "stdout and stderr"])
def test_a_run_goes_on_when_nobody_hears_it(both: bool, workdir: Path) -> None:
    """As `pocketlm train ... 2>&1 | head -1` has it."""
    source = f"{PROBELESS}\nimport sys; from pocketlm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", source, *TRAIN, "--out", "unheard"]
    stdout = subprocess.STDOUT if both else subprocess.DEVNULL
    reading, writing = os.pipe()
    with subprocess.Popen(command, stdout=writing if both else stdout, stderr=writing) as process:
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
    assert process.returncode == 0
    assert Path("unheard/checkpoints/step-00000010/manifest.json").exists()


@pytest.mark.parametrize("words", [["sizes", "debug"], ["generate", "run", "--prompt", "the"], ["train", "--help"]])
def test_a_result_that_nobody_reads_is_no_error(words: list[str], workdir: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    source = "import sys; from pocketlm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", source, *words], stdout=writing, stderr=subprocess.PIPE, check=False, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_refusal_that_nobody_hears_keeps_its_code(workdir: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    source = "import sys; from pocketlm.cli.main import main; sys.exit(main(['train', 'debgu']))"
    done = subprocess.run([sys.executable, "-c", source], stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == 2


def test_characters_that_stdout_cannot_have_cost_no_other(workdir: Path) -> None:
    Path("text.txt").write_text("caf\u00e9 " * 9000)
    assert main(["data", "prepare", "--source", "files:text.txt", "--tokenizer", "byte", "--out", "coffee"]) == 0
    shown = pocketlm("data", "show", "coffee", PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "caf? caf?" in shown.stdout
    described = pocketlm("data", "show", "coffee", "--json", PYTHONIOENCODING="ascii")
    assert json.loads(described.stdout)["samples"][0].startswith("caf\u00e9 caf\u00e9")


def test_a_model_folder_of_others_is_not_called_damaged(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "foreign"]) == 3
    printed = capsys.readouterr()
    assert (printed.out.count("\n"), printed.err) == (1, "")
    assert "foreign is a model folder" in printed.out
    assert "nothing to check it against" in printed.out
    assert "damaged" not in printed.out
    Path("foreign/training").mkdir()
    assert main(["verify", "foreign"]) == 3
    assert "damaged" in capsys.readouterr().out


def test_a_reader_that_has_gone_is_no_error(workdir: Path) -> None:
    source = "import sys; from pocketlm.cli.main import main; sys.exit(main(['train', '--help']))"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")
