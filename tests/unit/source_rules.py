"""What no line of the package may do, read from its source as a tree: run what a file holds, or write.

`problems` is the reader. It knows names, not values: so a module, `open` and `getattr` may only be used under the names
that their imports give, and what is imported at all is on a list.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

ALLOWED_MODULES = {
    *("__future__", "argparse", "array", "base64", "bisect", "codecs", "collections", "contextlib", "ctypes"),
    "datetime",
    *("dataclasses", "difflib", "errno", "fcntl", "functools", "glob", "hashlib", "html", "importlib", "io"),
    *("queue", "subprocess"),
    *(
        "inspect",
        "itertools",
        "json",
        "math",
        "os",
        "pathlib",
        "platform",
        "random",
        "re",
        "readline",
        "secrets",
        "shlex",
    ),
    *(
        "shutil",
        "resource",
        "signal",
        "socket",
        "stat",
        "statistics",
        "struct",
        "sys",
        "sysconfig",
        "threading",
        "time",
        "tokenize",
        "tomllib",
        "traceback",
    ),
    *("types", "typing", "warnings", "zlib"),
    *(
        "awkward",
        "datasketch",
        "gigatoken",
        "huggingface_hub",
        "jinja2",
        "lightning",
        "logging",
        "markupsafe",
        "numpy",
        "psutil",
        "pyarrow",
        "pydantic",
        "regex",
        "rich",
        "safetensors",
    ),
    *("tensorboard", "tiktoken", "tokenizers", "tomli_w", "torch", "trackio", "wandb", "pocketlm"),
}
"""What may be imported at all: what is today. To add one is to have thought about what it reads, runs and writes."""
MODULES = {
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "dbm", "jsonpickle"),
    *("yaml", "ruamel", "code", "codeop", "runpy", "imp", "zipimport", "pkgutil", "pandas", "h5py", "sqlite3"),
    *("subprocess", "multiprocessing", "asyncio", "concurrent", "pty", "cffi", "zipfile", "tarfile", "mmap"),
    *("torch.serialization", "torch.hub", "torch.package", "torch.jit", "torch.multiprocessing"),
    *("torch.distributed.checkpoint", "torch.distributed.rpc", "torch.distributed.elastic", "torch.distributed.run"),
    *("torch.utils.cpp_extension", "torch.utils.data", "torch.utils.model_zoo", "torch.export", "torch.onnx"),
    *("logging.config", "logging.handlers", "lightning.pytorch.cli", "lightning.fabric.utilities.cloud_io"),
    *("numpy.lib.format", "numpy.lib.npyio", "numpy.ctypeslib", "numpy.f2py", "importlib.util", "importlib.machinery"),
}
"""Never, whatever the list above says."""
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint", "globals", "__builtins__"}
CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.ops.load_library"),
    *("torch.classes.load_library", "np.load", "np.fromregex", "pd.read_pickle", "pd.eval", "numexpr.evaluate"),
    *("pty.spawn", "timeit.timeit", "torch.utils.cpp_extension.load"),
}
RUNS = re.compile(r"os\.(exec|spawn|posix_spawn|system|popen|fork|startfile)\w*")
INSIDES = {"__globals__", "__subclasses__", "__builtins__", "__loader__", "__code__", "__reduce__"}
FROM_JINJA2 = {
    *("jinja2.StrictUndefined", "jinja2.sandbox.SandboxedEnvironment", "jinja2.sandbox.ImmutableSandboxedEnvironment"),
}
OS_READS = {
    *(
        "PathLike",
        "close",
        "cpu_count",
        "devnull",
        "environ",
        "fsdecode",
        "fstat",
        "getpid",
        "getppid",
        "name",
        "open",
        "path",
    ),
    *(
        "pread",
        "sched_getaffinity",
        "set_inheritable",
        "walk",
        "O_RDONLY",
        "O_WRONLY",
        "O_RDWR",
        "O_DIRECTORY",
        "O_CLOEXEC",
    ),
}
"""Of os, what is used today and changes nothing; the rest writes, or may."""
WRITERS = {
    *("tempfile", "io.FileIO", "codecs.open", "pathlib.Path.replace", "torch.from_file", "np.DataSource"),
    *("readline.write_history_file", "readline.append_history_file", "mmap.mmap"),
    *("logging.FileHandler", "logging.basicConfig"),
}
METHODS_THAT_WRITE = {
    *("write_text", "write_bytes", "rename", "unlink", "mkdir", "rmdir", "touch", "symlink_to", "hardlink_to", "chmod"),
    *("lchmod", "link_to", "tofile", "save", "savez", "savez_compressed", "savetxt", "save_file", "save_model"),
    *("save_pretrained", "save_to_disk", "serialize_file", "dump", "write_table", "write_dataset", "ParquetWriter"),
    *("OSFile", "memory_map", "output_stream", "export_chrome_trace"),
}
SWITCHES = ("trust_remote_code", "allow_pickle", "shell")


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
    found |= {(line, "alias") for line in aliases(tree, names)}
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


def modules_of(tree: ast.AST) -> set[str]:
    """The names that `import` binds: modules for certain."""
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {alias.asname or alias.name.partition(".")[0] for alias in imports}


def aliases(tree: ast.AST, names: dict[str, str]) -> Iterator[int]:
    """Lines where a module, `open` or `getattr` is taken as a value: under another name no rule would know it."""
    modules = modules_of(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    asked = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and name_of(node.func) == "hasattr"]
    inner |= {id(node.args[0]) for node in asked}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        opens = resolved(node, names).rpartition(".")[2] in ("open", "getattr", "setattr", "vars")
        if (isinstance(node, ast.Name) and node.id in modules and id(node) not in inner) or (
            opens and id(node) not in called | inner
        ):
            yield node.lineno


def resolved(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what an expression names, modules by their usual short names."""
    first, dot, rest = name_of(node).partition(".")
    full = names.get(first, first) + dot + rest
    for long, short in (("numpy.", "np."), ("pandas.", "pd."), ("builtins.", "")):
        full = short + full.removeprefix(long) if full.startswith(long) else full
    return full


def prefixes(name: str) -> set[str]:
    """a, a.b and a.b.c of a.b.c."""
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def rules_broken(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from rules_of_import(node)
    elif isinstance(node, ast.Call):
        yield from rules_of_call(node, names)
    elif isinstance(node, ast.keyword) and node.arg in SWITCHES:
        yield node.arg
    elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
        yield str(node.value)
    elif isinstance(node, ast.Dict) and any(
        isinstance(key, ast.Constant) and key.value == "shell" for key in node.keys
    ):
        yield "shell"
    elif "Disk" in (getattr(node, "name", ""), getattr(node, "value", "")) or getattr(node, "value", "") == "DISK":
        yield "disk"
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield from rules_of_name(resolved(node, names))
        yield from rules_of_last(resolved(node, names))


def rules_of_import(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    else:
        modules = [f"{node.module}.{alias.name}" for alias in node.names]
    for module in modules:
        top, _, rest = module.partition(".")
        if top not in ALLOWED_MODULES or (isinstance(node, ast.ImportFrom) and node.level):
            yield "module not on the list"
        if prefixes(module) & MODULES:
            yield "module that runs files"
        if top == "jinja2" and module not in FROM_JINJA2:
            yield "unsandboxed template"
        if top == "ctypes":
            yield "C code"
        if top == "tempfile":
            yield "writes"
        if rest.endswith("*"):
            yield "star import"
        if module == "pocketlm.disk" or {"DISK", "Disk"} & set(rest.split(".")):
            yield "disk"
        if rest:
            yield from rules_of_name(module)


def rules_of_name(name: str) -> Iterator[str]:
    """Names count wherever they stand, `f = eval` is as good as a call; and through others: `shutil.os.system`."""
    if name in BUILTINS:
        yield "runs code"
    parts = name.replace("numpy.", "np.").split(".")
    for start in range(len(parts)):
        yield from rules_of_full_name(".".join(parts[start:]))


def rules_of_full_name(name: str) -> Iterator[str]:
    top, _, rest = name.partition(".")
    if name in CALLS or RUNS.fullmatch(name):
        yield "runs code"
    if name == "sys.modules" or (top == "importlib" and rest and rest.split(".")[0] != "resources"):
        yield "import by name"
    if top == "jinja2" and rest and name not in FROM_JINJA2:
        yield "unsandboxed template"
    if any("." in module for module in prefixes(name) & MODULES):
        yield "module that runs files"
    if top == "ctypes" and rest and rest != "CDLL":
        yield "loads a library"
    if name in WRITERS or (top == "shutil" and rest) or (top == "os" and rest and rest.split(".")[0] not in OS_READS):
        yield "writes"


def rules_of_last(name: str) -> Iterator[str]:
    """What a method's name alone says, called or not."""
    before, dot, last = name.rpartition(".")
    if dot and last in METHODS_THAT_WRITE and not before.startswith("pocketlm."):
        yield "writes"
    if last == "load_from_checkpoint":  # of a LightningModule: a pickle
        yield "runs code"
    if last == "from_pretrained" and name != "torch.nn.Embedding.from_pretrained":
        yield "loads by name"
    if last in INSIDES or (before == "torch.distributed" and "object" in last):  # those messages are pickles
        yield "runs code"
    if last in ("DISK", "Disk"):
        yield "disk"


def rules_of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = resolved(node.func, names)
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if (name in ("open", "io.open", "os.open") or method == "open") and writes(node, name):
        yield "writes"
    if method == "replace" and len(node.args) == 1 and not node.keywords:  # a text's has two, dataclasses' has names
        yield "writes"
    if name in ("np.memmap", "np.lib.format.open_memmap") and mode_of(node, place=2, default="r+") != "r":
        yield "writes"
    if name == "ctypes.CDLL" and [getattr(argument, "value", node) for argument in node.args] != [None]:
        yield "loads a library"
    if name in ("getattr", "setattr", "delattr", "vars") and node.args and is_module(node.args[0], names):
        yield "attribute by name"


def is_module(node: ast.expr, names: dict[str, str]) -> bool:
    """Whether an expression is a module as far as one can see: an allowed one's name, or what an import gives."""
    if isinstance(node, ast.Call):
        return resolved(node.func, names) in ("importlib.import_module", "__import__")
    full = resolved(node, names)
    return full in names.values() or full in ALLOWED_MODULES | {"np"}


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
