"""No line of the package can run what a file holds, and only files.py writes: held by reading the source as a tree.

`problems` is the reader. The first tests hand it what it must catch and what it must let pass.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.goal("R22")

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("src/pocketlm", "examples", "tools") for path in (ROOT / folder).rglob("*.py"))

MODULES = {
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "dbm", "jsonpickle"),
    *("yaml", "ruamel", "torch.serialization", "torch.hub", "torch.package", "torch.jit", "code", "runpy", "imp"),
    *("numpy.lib.format", "pandas", "h5py"),
}
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "os.system", "os.popen", "np.save", "np.savez"),
    *("os.execv", "os.execve", "os.execvp", "os.spawnv", "os.spawnl", "pty.spawn", "subprocess.getoutput"),
    *("torch.utils.cpp_extension.load", "pd.read_pickle", "pd.eval", "numexpr.evaluate", "timeit.timeit"),
}
IMPORTERS = {
    "import_module",
    "importlib.import_module",
    "importlib.util.spec_from_file_location",
    "pkgutil.resolve_name",
}
WRITERS = {
    *("os.rename", "os.renames", "os.replace", "os.unlink", "os.remove", "os.mkdir", "os.makedirs", "os.rmdir"),
    *("os.removedirs", "os.truncate", "os.ftruncate", "os.write", "os.pwrite", "os.link", "os.symlink", "os.chmod"),
    *("os.fsync", "os.fdatasync", "os.fdopen", "tempfile", "np.memmap.flush", "np.tofile"),
}
METHODS_THAT_WRITE = {
    *("write_text", "write_bytes", "rename", "unlink", "mkdir", "rmdir", "touch", "symlink_to", "hardlink_to", "chmod"),
    *("tofile",),
}

# Where a rule may be broken, and why. (file, rule): reason
ALLOWED = {
    ("src/pocketlm/__init__.py", "import by name"): "one of its own three modules",
    ("src/pocketlm/cli/main.py", "import by name"): "the verb is one of VERBS",
    ("src/pocketlm/cli/main.py", "writes"): "stdout and stderr that the caller has closed are opened to /dev/null",
    ("src/pocketlm/training/signals.py", "writes"): "a last line on stderr",
    ("src/pocketlm/cli/arguments.py", "writes"): "a stream that nobody reads is pointed to /dev/null",
}
WRITING_FILES = {"src/pocketlm/files.py", "src/pocketlm/disk.py"}
"""The one door to the disk, and the operations behind it."""


def name_of(node: ast.expr) -> str:
    """`a.b.c` of a chain of names; what is not one begins with a dot: `.b.c`."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def problems(source: str, *, may_write: bool = False) -> set[tuple[int, str]]:
    """(line, rule) of everything in a Python source that a rule forbids."""
    tree = ast.parse(source)
    names = full_names(tree)
    found = {(node.lineno, rule) for node in ast.walk(tree) for rule in rules_broken(node, names)}
    return {(line, rule) for line, rule in found if not (may_write and rule == "writes")}


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` is numpy, `load` of `from torch import load` is torch.load."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def resolved(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what an expression names, modules by their usual short names."""
    first, dot, rest = name_of(node).partition(".")
    full = names.get(first, first) + dot + rest
    for long, short in (("numpy.", "np."), ("pandas.", "pd."), ("builtins.", "")):
        full = short + full.removeprefix(long) if full.startswith(long) else full
    return full


def rules_broken(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from rules_of_import(node)
    elif isinstance(node, ast.Call):
        yield from rules_of_call(node, names)
    elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
        yield node.arg
    elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
        yield str(node.value)
    elif isinstance(node, ast.keyword) and node.arg == "shell":
        yield "shell"
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield from rules_of_name(resolved(node, names))


def rules_of_import(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    else:
        modules = [f"{node.module}.{alias.name}" for alias in node.names]
    for module in modules:
        parts = module.split(".")
        if any(".".join(parts[:length]) in MODULES for length in range(1, len(parts) + 1)):
            yield "module that runs files"
        if parts[0] == "jinja2" and parts[1:2] != ["sandbox"] and parts[1:] != ["StrictUndefined"]:
            yield "unsandboxed template"
        if parts[0] == "tempfile":
            yield "writes"


def rules_of_name(name: str) -> Iterator[str]:
    """Names count wherever they stand: `f = eval` is as good as a call."""
    if name in BUILTINS or name in CALLS:
        yield "runs code"
    if name in IMPORTERS:
        yield "import by name"
    if name.startswith(("jinja2.Environment", "jinja2.Template", "jinja2.environment.", "jinja2.nativetypes.")):
        yield "unsandboxed template"
    if name.startswith(("torch.serialization.", "torch.hub.", "torch.package.")):
        yield "module that runs files"
    if name in WRITERS or name.startswith("shutil."):
        yield "writes"


def rules_of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = resolved(node.func, names)
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    opens = name in ("open", "io.open", "os.open") or method == "open"
    if method in METHODS_THAT_WRITE or (opens and writes(node, name)):
        yield "writes"
    if name in ("np.memmap", "np.lib.format.open_memmap") and mode_of(node, place=2, default="r+") != "r":
        yield "writes"


def writes(node: ast.Call, name: str) -> bool:
    """Whether an `open` may write: its mode says so, or is not written out."""
    if name == "os.open":
        return len(node.args) < 2 or name_of(node.args[1]) != "os.O_RDONLY"
    mode = mode_of(node, place=1 if name in ("open", "io.open") else 0)
    return mode is None or bool(set(mode) & set("wax+"))


def mode_of(node: ast.Call, place: int, default: str = "r") -> str | None:
    """The mode of an `open`; None where it is not a constant."""
    given = [word.value for word in node.keywords if word.arg == "mode"] or node.args[place : place + 1]
    mode = given[0] if given else ast.Constant(default)
    return str(mode.value) if isinstance(mode, ast.Constant) else None


CAUGHT = {
    "module that runs files": [
        "import pickle",
        "import pickle as json",
        "from pickle import loads",
        "from _pickle import Unpickler",
        "import torch.serialization",
        "from torch import serialization",
        "from torch.serialization import load",
        "import joblib, json",
        "def f():\n    import dill",
        "import marshal",
        "import shelve",
        "import yaml",
        "torch.serialization.load(f)",
        "torch.hub.load_state_dict_from_url(u)",
    ],
    "runs code": [
        "import torch\ntorch.load(p, weights_only=True)",
        "from torch import load\nload(p)",
        "import torch as t\nt.load(p)",
        "eval(text)",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "f = eval\nf(text)",
        "import builtins\nbuiltins.exec(text)",
        "import os\nos.system(c)",
        "from os import system\nsystem(c)",
        "import os as o\no.popen(c)",
        "list(map(eval, lines))",
        "torch.save(x, p)",
    ],
    "shell": ["subprocess.run(c, shell=True)", "run(c, shell=flag)"],
    "trust_remote_code": ["AutoModel.from_pretrained(p, trust_remote_code=False)", "f(**{'trust_remote_code': 1})"],
    "allow_pickle": ["np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)"],
    "unsandboxed template": [
        "import jinja2\njinja2.Environment()",
        "from jinja2 import Environment",
        "from jinja2 import Template as T",
        "import jinja2.nativetypes",
    ],
    "import by name": [
        "import importlib\nimportlib.import_module(n)",
        "from importlib import import_module\nimport_module(n)",
        "from importlib import import_module as i\ni(n)",
        "import importlib.util\nimportlib.util.spec_from_file_location(n, p)",
    ],
    "writes": [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "open(p, 'r+')",
        "open(p, mode)",
        "p.open('x')",
        "p.open(mode='wb')",
        "p.write_text(t)",
        "p.write_bytes(t)",
        "p.unlink(missing_ok=True)",
        "p.rename(q)",
        "p.mkdir()",
        "p.touch()",
        "import os\nos.replace(a, b)",
        "from os import rename\nrename(a, b)",
        "os.makedirs(p)",
        "os.open(p, os.O_WRONLY)",
        "os.open(p, flags)",
        "os.truncate(p, 0)",
        "import shutil\nshutil.rmtree(p)",
        "from shutil import copyfile\ncopyfile(a, b)",
        "import tempfile",
        "from tempfile import mkdtemp",
        "np.memmap(p)",
        "np.memmap(p, 'uint8', 'w+')",
        "np.memmap(p, mode='r+')",
        "array.tofile(p)",
    ],
}
PASSED = [
    "model.eval()",
    "re.compile(p)",
    "torch.compile(model)",
    "p.open()",
    "p.open('rb')",
    "open(p)",
    "open(p, encoding='utf-8')",
    "os.open(p, os.O_RDONLY)",
    "np.memmap(p, mode='r')",
    "text.replace('a', 'b')",
    "from jinja2.sandbox import ImmutableSandboxedEnvironment",
    "from jinja2 import StrictUndefined",
    "json.loads(t)",
    "from safetensors import safe_open",
    "subprocess.run([a, b])",
    "file.write(t)",
    "sys.stdout.write(t)",
    "checkpoint.load(p)",
    "'import pickle'",
]


@pytest.mark.parametrize(("rule", "source"), [(rule, source) for rule, given in CAUGHT.items() for source in given])
def test_the_reader_catches(rule: str, source: str) -> None:
    assert rule in {rule for _, rule in problems(source)}


@pytest.mark.parametrize("source", PASSED)
def test_the_reader_lets_pass(source: str) -> None:
    assert problems(source) == set()


def test_every_source_is_read() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"src/pocketlm/files.py", "src/pocketlm/checkpoint.py", "examples/one_file.py"} <= names
    assert len(names) > 50


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_runs_or_writes_what_it_should_not(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    product = name.startswith("src/")
    found = problems(path.read_text(encoding="utf-8"), may_write=not product or name in WRITING_FILES)
    assert {(line, rule) for line, rule in found if (name, rule) not in ALLOWED} == set()


def test_no_allowance_is_left_over() -> None:
    for name, rule in ALLOWED:
        assert rule in {rule for _, rule in problems((ROOT / name).read_text(encoding="utf-8"))}, (name, rule)
