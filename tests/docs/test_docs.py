"""The documentation is run: every command and every Python block of README.md and docs/, page by page, in order.

A page's blocks share one folder and one Python namespace, as a reader's terminal would. The folder holds `book.txt`
and `my-texts/`, which stand for the reader's own text, and the prepared data of `pocketlm train tiny`. Comments that
a reader does not see stand before a block and say what the test does with it:

    <!-- test: not-run REASON -->      it needs a network, a GPU or days; it is listed as skipped, with the reason
    <!-- test: prepared -->            `pocketlm train tiny` has been run before it (three steps of it)
    <!-- test: quick -->               the block's first command trains three steps only; `own-text` says the same
    <!-- test: args FLAGS -->          appended to the block's first command
    <!-- test: input LINE | LINE -->   what is typed into the block's first command; by default nothing
    <!-- test: exit N -->              the exit code of the block's commands, if it is not 0
    <!-- test: file NAME -->           the block is the content of that file
    <!-- test: output -->              the block is, to the letter, what the command before it wrote to stdout
    <!-- test: messages -->            the same for stderr

In a `sh` block every line is a command: `pocketlm ...`, `python examples/...`, or `make TARGET`, of which only the
target's existence is checked.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketlm.cli.main import VERBS, main
from pocketlm.config import FIELDS, Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = shlex.split("--total-steps 3 --train.eval-tokens 2048 --sample.max-new-tokens 4 --train.threads 1")
OWN_TEXT = ("argparse", "ast", "configparser", "datetime", "difflib", "inspect", "logging/__init__", "typing")


@dataclass
class Block:
    """A fenced block and the test comments before it."""

    page: Path
    line: int
    language: str
    text: str = ""
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The lines of a `sh` block, those that end in a backslash joined with the next."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
COMMENT = re.compile(r"<!-- test: ([a-z-]+) ?(.*?) -->")
WORDS = {"not-run", "prepared", "quick", "own-text", "args", "input", "exit", "file", "output", "messages"}


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    comments: dict[str, str] = {}
    open_block: Block | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if open_block is not None:
            if line == "```":
                blocks.append(open_block)
                open_block = None
            else:
                open_block.text += line + "\n"
        elif line.startswith("```"):
            open_block, comments = Block(page, number, line[3:], comments=comments), {}
        elif match := COMMENT.fullmatch(line):
            assert match[1] in WORDS, f"{page}:{number}: {line}"
            comments[match[1]] = match[2]
        elif line.strip():
            assert not comments, f"{page}:{number}: a test comment stands before a block, not before text"
    assert open_block is None, f"{page}: a block without its end"
    return blocks


ALL_BLOCKS = [block for page in PAGES for block in blocks_of(page)]
NOT_RUN = [block for block in ALL_BLOCKS if "not-run" in block.comments]


def name_of(value: Any) -> str:
    return value.where if isinstance(value, Block) else value.relative_to(ROOT).as_posix()


# --- running a page


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `pocketlm train tiny` has been run, for three steps."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [(Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8") for name in OWN_TEXT]
    (folder / "book.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "my-texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "my-texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    with contextlib.chdir(folder), torch_settings_kept():
        assert main(["train", "tiny", *QUICK]) == 0
    return folder


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """A run sets threads and determinism for its process, and other tests live in this one."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def reader(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a page's own; runs change their files in place, data sets do not."""
    shutil.copytree(trained_folder / "data", tmp_path / "data", copy_function=os.link)
    shutil.copytree(trained_folder / "my-texts", tmp_path / "my-texts")
    shutil.copy(trained_folder / "book.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch_settings_kept():
        yield tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_runs_as_it_is_written(page: Path, reader: Path, trained_folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    written = {"output": "", "messages": ""}
    for block in blocks_of(page):
        if "not-run" in block.comments:
            continue
        if "prepared" in block.comments and not Path("runs/tiny").exists():
            shutil.copytree(trained_folder / "runs", "runs")
        if name := block.comments.get("file"):
            Path(name).write_text(block.text, encoding="utf-8")
        for stream in written.keys() & block.comments.keys():
            assert plain(written[stream]) == plain(block.text), f"{block.where}: the {stream} shown are not those"
        if block.language == "sh":
            for number, command in enumerate(block.commands):
                written = run_command(block, command, first=number == 0)
        elif block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
            written = {"output": out.getvalue(), "messages": ""}


def plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def run_command(block: Block, command: str, first: bool) -> dict[str, str]:
    """Runs one line in this process and returns what it wrote."""
    words = [path for word in shlex.split(command, comments=True) for path in sorted(glob.glob(word)) or [word]]
    if words[0] == "make":
        check_target(block, words[1:])
        return {"output": "", "messages": ""}
    typed = ""
    if first:
        words += shlex.split(block.comments.get("args", ""))
        words += QUICK if {"quick", "own-text"} & block.comments.keys() else []
        typed = block.comments.get("input", "").replace(" | ", "\n")
    out, err = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_words(block, words)
    finally:
        sys.stdin = stdin
    assert code == int(block.comments.get("exit", 0)), f"{block.where}: {command}\n{err.getvalue()}"
    return {"output": out.getvalue(), "messages": err.getvalue()}


def run_words(block: Block, words: list[str]) -> int:
    if words[0] == "pocketlm":
        try:
            return main(words[1:])
        except SystemExit as leave:  # --help
            return int(leave.code or 0)
    assert words[0] == "python", f"{block.where}: {words[0]} is not run by the test; mark it not-run"
    assert words[1].startswith("examples/"), f"{block.where}: {words[1]}"
    arguments, sys.argv = sys.argv, words[1:]
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as leave:
        return int(leave.code or 0)
    finally:
        sys.argv = arguments
    return 0


def check_target(block: Block, words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets, f"{block.where}: make {word}; targets: {', '.join(sorted(targets))}"


@pytest.mark.parametrize("block", NOT_RUN, ids=name_of)
def test_what_is_not_run_has_a_reason(block: Block) -> None:
    assert len(block.comments["not-run"]) > 10
    pytest.skip(f"{block.where}: {block.comments['not-run']}")


# --- what pages say


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = without_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(goal), f"{page}: {target} has no such heading"


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+\.md)", index.read_text())}
    missing = set((ROOT / "docs").rglob("*.md")) - linked - {index}
    assert not missing


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page(verb: str) -> None:
    page = ROOT / "docs" / f"{verb}.md"
    assert f"pocketlm {verb}" in page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """What each verb takes, by its own help, and the fields of the configuration."""
    commands = {verb: [[verb]] for verb in VERBS}
    commands["data"] = [["data", "prepare"], ["data", "show"]]
    commands["runs"] = [["runs"], ["runs", "compare"]]
    commands["tokenizer"] = [["tokenizer", each] for each in ("train", "export", "import")]
    known = {verb: set().union(*(flags_of(words) for words in each)) for verb, each in commands.items()}
    known["fields"] = {f"--{name.replace('_', '-')}" for name in FIELDS}
    known["main"] = {"--help", "--version", "--section.field"}
    return known


def flags_of(words: list[str]) -> set[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return {flag for flag in FLAG.findall(out.getvalue()) if "." not in flag} - {"--name"}  # the others are fields


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_that_is_mentioned_exists(page: Path, flags: dict[str, set[str]]) -> None:
    known = set().union(*flags.values())
    assert mentioned(page) <= known, f"{page}: {sorted(mentioned(page) - known)}"


def mentioned(page: Path) -> set[str]:
    """Flags in code spans and in commands of pocketlm that are not there to be refused."""
    spans = re.findall(r"`([^`\n]+)`", without_blocks(page))
    blocks = [block for block in blocks_of(page) if block.language == "sh" and "exit" not in block.comments]
    lines = [line for block in blocks for line in block.commands if line.startswith("pocketlm")]
    return set(FLAG.findall("\n".join(spans + lines)))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_page_has_every_flag_of_the_verb(verb: str, flags: dict[str, set[str]]) -> None:
    missing = flags[verb] - mentioned(ROOT / "docs" / f"{verb}.md") - {"--help"}
    assert not missing, f"docs/{verb}.md leaves out {sorted(missing)}"


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_rates_is_up_to_date() -> None:
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    assert page == tool("schedule_table").page(), "run: python tools/schedule_table.py"


def test_the_page_of_fields_is_up_to_date() -> None:
    module = tool("config_page")
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == module.page(), "run: python tools/config_page.py"
    for name in FIELDS:
        assert f"`{name}`" in page
    assert Config.preset("tiny").optim.kind in page


def test_contributing_stays_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80
