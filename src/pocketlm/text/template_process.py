"""The process in which one chat template runs, once. `chat_template.py` starts it, at its other end.

    python -I template_process.py

It reads one JSON value from stdin, answers with one on stdout, and ends:

    {"template": TEXT, "cpu_s": SECONDS, "values": {"messages": ..., "add_generation_prompt": ..., "bos_token": ...}}
    {"text": RENDERED} | {"refused": KIND, "why": WORDS}

A template is a program of a stranger. The language is kept inside by jinja2's sandbox, and whoever leaves it is in a
process that can open no file and no socket, start nothing, write nothing, has no environment, and little time and
memory. This file imports nothing of pocketlm: what is not here cannot be reached.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 29
TEXT_CHARS = 1 << 22
WHY_CHARS = 500


class Refused(TemplateError):
    """What a template says by `raise_exception`."""


class Generation(Extension):
    """`{% generation %}` marks for trainers what a model has said; it renders as what is inside."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's, which lets a template name what is forbidden as long as nothing is done with it; this one does not."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"{attribute[:WHY_CHARS]!r} of a {type(obj).__name__}")


def environment() -> Sandbox:
    """What templates are written for: the settings and the names that transformers gives them."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return sandbox


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja2's own filter makes it fit for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(words: str) -> NoReturn:
    raise Refused(words)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def answer(template: str, values: dict[str, Any]) -> dict[str, str]:
    """The rendered text, or why there is none; whatever a template does, it is told and not raised."""
    try:
        text = environment().from_string(template).render(values)
        if len(text) > TEXT_CHARS:
            return {"refused": "long", "why": f"{len(text):,} characters; allowed are {TEXT_CHARS:,}"}
        return {"text": text}
    except Refused as error:
        return _refused("words", str(error))
    except TemplateSyntaxError as error:
        return _refused("syntax", f"line {error.lineno}: {error}")
    except SecurityError as error:
        return _refused("forbidden", str(error))
    except MemoryError:
        return {"refused": "memory", "why": f"{MEMORY_BYTES >> 20} MiB"}
    except Exception as error:
        return _refused("fails", f"{type(error).__name__}: {error}")


def _refused(kind: str, why: str) -> dict[str, str]:
    return {"refused": kind, "why": why[:WHY_CHARS]}


def confine(cpu_s: int) -> None:
    """Takes from this process what it needs no more; from here on it has its memory, some time, and two open files."""
    os.environ.clear()
    used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _limit(resource.RLIMIT_CPU, round(used_s) + cpu_s, more=1)  # a signal that tells why, and one more for good
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        _limit(kind, 0)


def _limit(kind: int, soft: int, more: int = 0) -> None:
    """One limit, where the system has it: macOS knows RLIMIT_AS and may refuse it."""
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (soft, soft + more))


def main(read: Callable[[], bytes], write: Callable[[bytes], Any]) -> None:
    request = json.loads(read())
    answer("{{ '%s' % (1 / 0) | tojson }}", {})  # jinja2 imports some of itself when it first needs it
    confine(request["cpu_s"])
    write(json.dumps(answer(request["template"], request["values"])).encode())


if __name__ == "__main__":
    main(sys.stdin.buffer.read, sys.stdout.buffer.write)
