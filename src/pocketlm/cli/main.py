"""`pocketlm VERB ...`: finds the verb's file, runs it, and turns refusals into one line and an exit code.

Exit codes: 0 done, 2 usage or configuration, 3 data or file refused, 4 training diverged, 130 and 143 on signals.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import stat
import sys
from importlib import import_module
from typing import TextIO

from pocketlm import __version__
from pocketlm.cli.arguments import refusal, say, silence
from pocketlm.errors import PocketError, UsageError

VERBS = {
    "train": "train a model from a preset or a .toml file",
    "generate": "complete a prompt",
    "chat": "talk to a model in the terminal",
    "eval": "loss and bits per byte of a model on a text",
    "plan": "what training would take: memory, time and disk",
    "bench": "tokens/s and MFU of this machine",
    "sizes": "parameters, FLOPs and memory of a preset or model",
    "data": "prepare a data set, or look into one",
    "tokenizer": "train a tokenizer, or bring one to another tool",
    "runs": "list runs, or compare some of them",
    "export": "write a model for transformers, llama.cpp or Ollama",
    "import": "make a model folder of a .gguf or a llama2.c .bin",
    "verify": "say whether a run, checkpoint or data set is whole",
}

HELP = f"""usage: pocketlm VERB [...]

Train, understand and ship small language models on the hardware you have.

{chr(10).join(f"  {verb:<11}{text}" for verb, text in VERBS.items())}

  pocketlm VERB --help     what a verb takes
  pocketlm --version       {__version__}

Begin with:  pocketlm train tiny"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    _open_what_is_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding without a character must not cost the rest of the text
    try:
        _refuse_windows()
        return _said(run(words))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of stdout, as `say` survives that of stderr: who reads the result has had enough of it
        silence(sys.stdout)
        return 0
    except (PocketError, OSError) as error:
        message, code = refusal(error)
        say(f"pocketlm: {message}")
        return code


def run(words: list[str]) -> int:
    """Runs a command.

    Raises:
        PocketError: it was refused.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if words else UsageError.exit_code
    if words[0] == "--version":
        print(f"pocketlm {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no verb {verb!r}; {hint}verbs: {', '.join(VERBS)}")
    module = "import_" if verb == "import" else verb  # no module can have the name of a keyword
    code: int = import_module(f"pocketlm.cli.{module}").run(rest)
    return code


def _said(code: int) -> int:
    """What a verb ends with, once all that it has printed is out; it stays where nobody is left to read that.

    Raises:
        OSError: what was printed is lost, for instance on a full disk.
    """
    try:
        print(end="", flush=True)  # unbuffered, this too is a write, which a terminal that is gone refuses
    except OSError as error:
        has_gone = error.errno == errno.EPIPE or (error.errno == errno.EIO and _is_terminal(sys.stdout))
        silence(sys.stdout)
        if not (has_gone or code):
            raise
    return code


def _is_terminal(stream: TextIO) -> bool:
    """Also of one that is gone, which `isatty` does not know for one."""
    return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)


def _open_what_is_closed() -> None:
    """Opens to nowhere what the caller has closed (`2>&-`): else the next file opened would be stdout or stderr."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115


def _refuse_windows() -> None:
    if os.name == "nt":
        raise UsageError("pocketlm runs on Linux and macOS; on Windows, run it inside WSL2")


if __name__ == "__main__":
    sys.exit(main())
