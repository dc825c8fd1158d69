"""No line of the package can run what a file holds, and only files.py writes: held by reading the source as a tree.

`source_rules.problems` is the reader. The first tests hand it what it must catch and what it must let pass.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_rules import ALLOWED_MODULES, OS_READS, name_of, problems

pytestmark = pytest.mark.goal("R22")

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("src/pocketlm", "examples", "tools") for path in (ROOT / folder).rglob("*.py"))

# Where a rule may be broken, and why. (file, rule): reason
ALLOWED = {
    ("src/pocketlm/__init__.py", "attribute by name"): "of one of its own three modules, and only what it names",
    ("src/pocketlm/machine.py", "C code"): "mallopt, of the C library that is in the process already",
    ("src/pocketlm/files.py", "disk"): "the one door",
    ("src/pocketlm/journal.py", "disk"): "the door of lines that are added: append, sync, truncate",
    ("src/pocketlm/disk.py", "disk"): "what is behind it",
    ("src/pocketlm/__init__.py", "import by name"): "one of its own three modules",
    ("src/pocketlm/export/modeling_pocketlm.py", "module not on the list"): "written into folders, never imported here",
    ("src/pocketlm/cli/main.py", "import by name"): "the verb is one of VERBS",
    ("src/pocketlm/cli/main.py", "writes"): "stdout and stderr that the caller has closed are opened to /dev/null",
    ("src/pocketlm/cli/parent.py", "C code"): "prctl, of the C library that is in the process already",
    ("src/pocketlm/cli/launch.py", "module that runs files"): "this Python on torch, to count GPUs",
    ("src/pocketlm/cli/supervise.py", "module that runs files"): "this Python on agent.py, with the words of launch.py",
    ("src/pocketlm/cli/agent.py", "module that runs files"): "torchrun, in the process that is there for it",
    ("src/pocketlm/cli/agent.py", "writes"): "its own stderr is the log that files.py has opened",
    ("src/pocketlm/data/feed.py", "module that runs files"): "this Python on the feeder's module, and nothing else",
    ("src/pocketlm/confined.py", "writes"): "the flags that it refuses",
    ("src/pocketlm/text/chat_template.py", "module that runs files"): "this Python on template_process.py, confined",
    ("src/pocketlm/data/feeder.py", "writes"): "its own stdout, a pipe to the run; and it ends itself when that ends",
    (
        "src/pocketlm/formats/unpickle.py",
        "runs code",
    ): "torch.load with weights_only: the one place, a process of its own",
    ("src/pocketlm/formats/unpickle.py", "module that runs files"): "torch.serialization's lists; zip files' tables",
    ("src/pocketlm/formats/unpickle.py", "module not on the list"): "zipfile, of which nothing is unpacked",
    ("src/pocketlm/formats/unpickle.py", "C code"): "unshare, of the C library that is in the process already",
    ("src/pocketlm/formats/unpickle.py", "writes"): "its two files, which files.py has made; and it ends itself",
    ("src/pocketlm/formats/unpickling.py", "module that runs files"): "this Python on unpickle.py, and nothing else",
    ("src/pocketlm/training/signals.py", "writes"): "a last line on stderr",
    ("src/pocketlm/cli/arguments.py", "writes"): "a stream that nobody reads is pointed to /dev/null",
}
UNPICKLES = "src/pocketlm/formats/unpickle.py"
WRITING_FILES = {"src/pocketlm/files.py", "src/pocketlm/disk.py"}
"""The one door to the disk, and the operations behind it."""


CAUGHT = {
    "disk": [
        "from pocketlm.files import DISK",
        "from pocketlm.disk import Disk",
        "from pocketlm import files\nfiles.DISK.remove_file(p)",
        "import pocketlm.disk",
        "from pocketlm import disk",
        "DISK = None\nprint(DISK)",
        "getattr(files, 'DISK')",
        "class Disk: ...",
    ],
    "loads a library": [
        "import ctypes\nctypes.CDLL('x.so')",
        "import ctypes\nctypes.CDLL(p)",
        "import ctypes\nctypes.cdll.LoadLibrary(p)",
        "import ctypes\nctypes.PyDLL(None)",
        "from ctypes import CDLL\nCDLL(p)",
        "import ctypes\nctypes.CDLL()",
    ],
    "C code": [
        "import ctypes",
        "from ctypes import CDLL",
        "import ctypes.util",
    ],
    "star import": [
        "from os import *",
        "from torch.serialization import *",
        "from pocketlm.files import *",
    ],
    "alias": [
        "import os\no = os",
        "import os\nf(os)",
        "import os as p\nq = [p]",
        "import torch\ndef f(t=torch): ...",
        "o = open",
        "list(map(open, paths))",
        "f = p.open",
        "g = getattr",
        "import io\no = io.open",
        "(o := open)",
    ],
    "attribute by name": [
        "import os\ngetattr(os, n)",
        "import numpy as np\ngetattr(np, n)",
        "from torch import nn\ngetattr(nn, n)",
        "from importlib import import_module\ngetattr(import_module(n), f)",
        "import torch\nsetattr(torch, n, f)",
        "import torch\ngetattr(torch, 'lo' + 'ad')",
        "from os import path\nvars(path)",
    ],
    "loads by name": [
        "AutoModel.from_pretrained(n)",
        "f = Tokenizer.from_pretrained",
        "from x import nn\nnn.Embedding.from_pretrained(w)",
    ],
    "allow_pickle": [
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "load(p, **{'allow_pickle': True})",
    ],
    "shell": [
        "subprocess.run(c, shell=True)",
        "run(c, shell=flag)",
        "run(c, **{'shell': True})",
        "options = {'shell': True}",
    ],
    "module not on the list": [
        "import requests",
        "import pickle",
        "from transformers import AutoModel",
        "import operator",
        "from . import files",
        "import urllib.request",
        "import builtins",
    ],
    "module that runs files": [
        "import subprocess",
        "from subprocess import run",
        "import multiprocessing as mp",
        "import asyncio.subprocess",
        "from concurrent.futures import ProcessPoolExecutor",
        "import sqlite3",
        "import zipfile",
        "import mmap",
        "import logging.config",
        "from logging import handlers",
        "from lightning.fabric.utilities.cloud_io import _load",
        "from torch import jit",
        "import torch\ntorch.jit.script(f)",
        "from torch.utils.data import DataLoader",
        "from torch.utils import cpp_extension",
        "import torch\nf = torch.utils.cpp_extension.load",
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
        "import torch.distributed as dist\ndist.broadcast_object_list(values)",
        "np.load(p)",
        "import numpy\nnumpy.load(p)",
        "from numpy import load",
        "from torch import save as s",
        "Module.load_from_checkpoint(p)",
        "os.execv(p, a)",
        "os.execlpe(p)",
        "os.posix_spawn(p, a, e)",
        "os.spawnvp(m, p, a)",
        "os.fork()",
        "import shutil\nshutil.os.system(c)",
        "torch.ops.load_library(p)",
        "torch.classes.load_library(p)",
        "f.__globals__['x']",
        "().__class__.__base__.__subclasses__()",
        "globals()['eval']",
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
    "trust_remote_code": ["AutoModel.from_pretrained(p, trust_remote_code=False)", "f(**{'trust_remote_code': 1})"],
    "unsandboxed template": [
        "from jinja2.sandbox import Environment",
        "from jinja2.sandbox import *",
        "import jinja2.sandbox",
        "from jinja2.sandbox import SandboxedEnvironment as S, Environment",
        "import jinja2\njinja2.Environment()",
        "from jinja2 import Environment",
        "from jinja2 import Template as T",
        "import jinja2.nativetypes",
    ],
    "import by name": [
        "import importlib.machinery\nimportlib.machinery.SourceFileLoader(n, p)",
        "from importlib.util import module_from_spec",
        "from importlib import reload",
        "import importlib\nimportlib.reload(m)",
        "import sys\nsys.modules[n]",
        "from sys import modules",
        "import importlib\nimportlib.import_module(n)",
        "from importlib import import_module\nimport_module(n)",
        "from importlib import import_module as i\ni(n)",
        "import importlib.util\nimportlib.util.spec_from_file_location(n, p)",
    ],
    "writes": [
        "p.replace(q)",
        "Path(p).replace(Path(q))",
        "from pathlib import Path\nmap(Path.replace, a, b)",
        "map(Path.unlink, paths)",
        "p.symlink_to(q)",
        "p.chmod(0)",
        "p.rmdir()",
        "io.FileIO(p, 'w')",
        "import logging\nlogging.FileHandler(p)",
        "from io import FileIO",
        "io.open(p, 'w')",
        "codecs.open(p, 'w')",
        "tokenizer.save(p)",
        "from safetensors.torch import save_file\nx.save_file(t, p)",
        "safetensors.torch.save_file(t, p)",
        "np.save(p, a)",
        "np.savez_compressed(p, a)",
        "np.savetxt(p, a)",
        "array.dump(p)",
        "os.truncate(p, 0)",
        "os.mkfifo(p)",
        "os.utime(p)",
        "from os import link",
        "import pathlib\npathlib.os.remove(p)",
        "pq.write_table(t, p)",
        "readline.write_history_file(p)",
        "import os\nf = os.unlink",
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
    "text.replace(a, b, 1)",
    "dataclasses.replace(session, name=value)",
    "replace(session)",
    "from torch import nn\nnn.Embedding.from_pretrained(w, freeze=False)",
    "from importlib import resources\nresources.files('pocketlm')",
    "getattr(config, name)",
    "import torch\ntorch.compile(model)",
    "import torch.distributed as dist\ndist.all_reduce(tensor)",
    "import os\nos.path.exists(p)",
    "import os\nos.fstat(f)",
    "import fcntl\nhasattr(fcntl, n)",
    "import numpy as np\nnp.asarray(a)",
    "from pocketlm import checkpoint\ncheckpoint.save(folder, snapshot)",
    "f(**{'name': 1})",
    "from jinja2.sandbox import SandboxedEnvironment",
    "f(shells=1)",
    "disk = 1\nprint(disk)",
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


def test_what_is_written_for_transformers_is_imported_nowhere() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name != "modeling_pocketlm.py")
    assert "import modeling_pocketlm" not in text
    assert "export.modeling_pocketlm" not in text


def test_one_file_unpickles() -> None:
    """A process of its own: no other file imports what loads, and the child is told so itself."""
    loaders = {name for name, rule in ALLOWED if rule == "runs code"}
    assert {name for name in loaders if "weights_only" in (ROOT / name).read_text(encoding="utf-8")} == {UNPICKLES}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    froms = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {alias.name for node in froms if node.module == "pocketlm.formats.unpickle" for alias in node.names}
    assert imported == {"cpu_limit_s"}
    calls = [node for node in ast.walk(trees[ROOT / UNPICKLES]) if isinstance(node, ast.Call)]
    (load,) = [node for node in calls if name_of(node.func) == "torch.load"]
    given = {word.arg: getattr(word.value, "value", None) for word in load.keywords}
    assert given["weights_only"] is True


def test_no_allowance_is_left_over() -> None:
    for name, rule in ALLOWED:
        assert rule in {rule for _, rule in problems((ROOT / name).read_text(encoding="utf-8"))}, (name, rule)


def test_nothing_is_on_a_list_that_is_not_used() -> None:
    elsewhere = {name for name, rule in ALLOWED if rule == "module not on the list"}
    ours = [path for path in SOURCES if path.relative_to(ROOT).as_posix() not in elsewhere]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ours]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} == ALLOWED_MODULES
    used = {name_of(node).partition(".")[2] for node in nodes if isinstance(node, ast.Attribute)}
    assert used >= OS_READS
