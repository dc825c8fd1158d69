"""Whatever happens to a checkpoint's files is found and named, and the one before it is used."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import config_of, outcome

from pocketlm import checkpoint
from pocketlm.cli.main import main
from pocketlm.errors import FileError, Unreadable
from pocketlm.training.log import Silent
from pocketlm.training.loop import train

END_TO_END_EVERY = 25
NEWEST, BEFORE = "step-00000008", "step-00000006"
FILES = [*checkpoint.SAVED, "manifest.json"]


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A run that may be broken."""
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def stranger(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another seed, with checkpoints of the same steps."""
    return train(config_of(world, train__seed=7), out=tmp_path_factory.mktemp("stranger") / "run")


@contextmanager
def put_back(path: Path) -> Iterator[bytes]:
    """A file's content; after the block it has it again, whatever stands there."""
    content = path.read_bytes()
    try:
        yield content
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)


def check_refused(run: Path, name: str, newest: str = NEWEST) -> None:
    """The damaged file is named, everywhere; nothing loads it; the checkpoint before it is taken, with a warning."""
    damaged, told = run / "checkpoints" / newest, list[str]()
    with pytest.raises(FileError, match=f"{newest}.*{name}"):
        checkpoint.verify(damaged)
    with pytest.raises(FileError, match=newest):
        checkpoint.find_checkpoint(damaged, print)
    found = checkpoint.newest_valid(run, told.append)
    assert found is not None
    assert found.name == BEFORE
    assert len(told) == 1
    assert newest in told[0]
    assert name in told[0]


def check_verb(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "--json"]) == 3
    printed = capsys.readouterr()
    assert printed.err == ""
    told = json.loads(printed.out)
    (problem,) = [part["problem"] for part in told["parts"] if not part["whole"]]
    assert NEWEST in problem
    assert name in problem
    assert Path(told["resume"]).name == BEFORE


def check_resume(run: Path, world: Path, folder: Path) -> None:
    """A resume says what it takes, and ends where the undamaged run ended."""
    shutil.copytree(run, folder, symlinks=True, copy_function=_copy)
    notes = Notes()
    train(config_of(world), out=folder, listener=notes)
    assert any(NEWEST in line for line in notes.lines)
    assert outcome(folder) == outcome(world / "run")


def _copy(source: str, target: str) -> None:
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target)


def test_these_are_the_checkpoints_of_the_run(run: Path) -> None:
    assert [path.name for path in checkpoint.list_checkpoints(run)][-2:] == [BEFORE, NEWEST]
    names = {str(p.relative_to(run / "checkpoints" / NEWEST)) for p in (run / "checkpoints" / NEWEST).rglob("*")}
    assert names == {*FILES, "training"}


@pytest.mark.goal("R9")
def test_every_flipped_bit_is_found(proof, world: Path, run: Path, tmp_path: Path, capsys) -> None:
    for case in proof.cases(100, 1000):
        luck = proof.random(case)
        path = run / "checkpoints" / NEWEST / FILES[case % len(FILES)]
        with put_back(path) as content:
            damaged, bit = bytearray(content), luck.randrange(8 * len(content))
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            check_refused(run, path.name)
            if case % END_TO_END_EVERY == 0:
                check_verb(run, path.name, capsys)
                check_resume(run, world, tmp_path / f"resumed-{case}")


@pytest.mark.goal("R10")
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_is_refused(name: str, run: Path, proof, capsys) -> None:
    path = run / "checkpoints" / NEWEST / name
    with put_back(path) as content:
        edges = {0, 1, 7, 8, 9, len(content) - 1, len(content) // 2}
        lengths = edges | set(proof.random(0).sample(range(len(content)), min(40 - len(edges), len(content))))
        for length in sorted(lengths):
            path.write_bytes(content[:length])
            check_refused(run, path.name)
        check_verb(run, path.name, capsys)


def remove(path: Path, stranger: Path) -> None:
    path.unlink()


def folder(path: Path, stranger: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_the_same(path: Path, stranger: Path) -> None:
    shutil.copy(path, stranger / "same")
    path.unlink()
    path.symlink_to(stranger / "same")


def link_to_nothing(path: Path, stranger: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path: Path, stranger: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def fifo(path: Path, stranger: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def longer(path: Path, stranger: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def zeros(path: Path, stranger: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def of_the_step_before(path: Path, stranger: Path) -> None:
    path.write_bytes(Path(str(path).replace(NEWEST, BEFORE)).read_bytes())


def of_another_run(path: Path, stranger: Path) -> None:
    inside = str(path)[str(path).index("checkpoints/") :]
    path.write_bytes((stranger / inside).read_bytes())


EQUAL_ANYWHERE = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.goal("R10")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "replace",
    [
        *(remove, folder, link_to_the_same, link_to_nothing, link_to_itself, fifo, longer, zeros),
        *(of_the_step_before, of_another_run),
    ],
)
def test_a_file_that_is_none_or_another_is_refused(
    replace: Callable[[Path, Path], None], name: str, world: Path, run: Path, stranger: Path, tmp_path: Path, capsys
) -> None:
    path = run / "checkpoints" / NEWEST / name
    before = path.read_bytes()
    replace(path, stranger)
    if path.is_file() and not path.is_symlink() and path.read_bytes() == before:
        assert name in EQUAL_ANYWHERE or (name, replace) == ("training/config.toml", of_the_step_before)
        return
    # a manifest is believed once it verifies itself: then one of the files that it speaks of is not the one it names
    named = "" if name == "manifest.json" and replace in (of_the_step_before, of_another_run) else path.name
    check_refused(run, named)
    check_verb(run, named, capsys)
    if name in ("model.safetensors", "manifest.json"):
        check_resume(run, world, tmp_path / "resumed")


@pytest.mark.goal("R10")
@pytest.mark.parametrize("kind", ["another step", "no manifest", "only training", "data set", "file"])
def test_a_folder_that_is_none_or_another_is_refused(kind: str, world: Path, run: Path, tmp_path: Path, capsys) -> None:
    newest = run / "checkpoints" / NEWEST
    shutil.rmtree(newest)
    if kind == "another step":
        shutil.copytree(newest.with_name(BEFORE), newest)
    elif kind == "no manifest":
        shutil.copytree(world / "run" / "checkpoints" / NEWEST, newest)
        (newest / "manifest.json").unlink()
    elif kind == "only training":
        (newest / "training").mkdir(parents=True)
    elif kind == "data set":
        shutil.copytree(world / "data", newest)
    else:
        newest.write_text("a file")
    named = "state.json" if kind == "another step" else "manifest.json"
    check_refused(run, named)
    check_verb(run, named, capsys)
    check_resume(run, world, tmp_path / "resumed")


@pytest.mark.goal("R10")
def test_a_whole_checkpoint_of_another_run_is_refused(
    world: Path, run: Path, stranger: Path, tmp_path: Path, capsys
) -> None:
    """It is valid in itself; only the run can tell."""
    newest = run / "checkpoints" / NEWEST
    shutil.rmtree(newest)
    shutil.copytree(stranger / "checkpoints" / NEWEST, newest)
    checkpoint.verify(newest)
    told: list[str] = []
    found = checkpoint.newest_valid(run, told.append)
    assert (found and found.name, len(told)) == (BEFORE, 1)
    assert "another run: train.seed: 7, " in told[0]
    check_verb(run, "another run", capsys)
    check_resume(run, world, tmp_path / "resumed")


@pytest.mark.goal("R10")
def test_a_linked_training_folder_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    training = run / "checkpoints" / NEWEST / "training"
    training.rename(tmp_path / "elsewhere")
    training.symlink_to(tmp_path / "elsewhere")
    check_refused(run, "training")
    check_verb(run, "training", capsys)


@pytest.mark.goal("R9")
def test_a_flipped_configuration_of_the_run_takes_no_checkpoint_from_it(run: Path, capsys) -> None:
    """The checkpoints agree, so they are believed and not the one file that says otherwise."""
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("lr = 0.01", "lr = 0.03"))
    assert (run / "config.toml").read_text() != text
    told: list[str] = []
    found = checkpoint.newest_valid(run, told.append)
    assert (found and found.name, told) == (NEWEST, [])
    assert main(["verify", str(run)]) == 3
    assert "config.toml is damaged" in capsys.readouterr().out


@pytest.mark.goal("R10")
def test_a_run_whose_checkpoints_cannot_be_read_now_is_not_begun_afresh(
    world: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    real = Path.open

    def refusing(self: Path, *args, **kwargs):
        if self.name == "model.safetensors":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(self))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refusing)
        with pytest.raises(Unreadable, match=f"{NEWEST}/model.safetensors: Too many open files; .* again") as caught:
            train(config_of(world), out=run)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names, "nothing is set aside"
    train(config_of(world), out=run)
    assert outcome(run) == outcome(world / "run")


@pytest.mark.goal("R21")
def test_a_start_sweeps_what_is_the_runs_and_nothing_of_its_users(world: Path, run: Path) -> None:
    mine = [run / "notes.tmp-2024", run / "checkpoints" / "best.tmp-1", run / "metrics.jsonl.old.tmp-1"]
    left = [run / f"{name}.tmp-1" for name in ("config.toml", "resolved.toml", "metrics.jsonl", "report.html")]
    left += [run / "checkpoints" / f"step-00000009{old}.tmp-1" for old in ("", ".old")]
    for path in (*mine, *left):
        path.mkdir()
        (path / "text").write_text("mine")
    left[-1].rename(left[-1].with_name("step-00000008.old.tmp-1"))  # the new one is whole
    notes = Notes()
    train(config_of(world), out=run, listener=notes)
    assert [path for path in run.rglob("*.tmp-*") if path not in mine] == []
    assert sum("removed what a stopped process had left" in line for line in notes.lines) == len(left)
    assert [(path / "text").read_text() for path in mine] == ["mine"] * len(mine)
    assert outcome(run) == outcome(world / "run")
