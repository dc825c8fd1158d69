"""The process in which one chat template runs, once. `chat_template.py` starts it, at its other end.

    python -P -S template_process.py

It reads one JSON value from stdin, answers with one on stdout, and ends:

    {"template": TEXT, "cpu_s": SECONDS, "now": TIME, "values": {"messages": ..., "add_generation_prompt": ...}}
    {"text": RENDERED} | {"refused": KIND, "why": WORDS}

A template is a program of a stranger. jinja2's sandbox keeps the language inside. Whoever leaves it is in a process to
which the kernel gives no new file or socket, little time and memory, and no other process where the user is not
root. It has no environment. What needs none of these, as to remove a file or to send a signal, Python refuses: see
confined.py, which says what that does not hold. All is imported before, for afterwards nothing can be.
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

from pocketlm import confined
from pocketlm.confined import Forbidden

MEMORY_BYTES = 1 << 29
TEXT_CHARS = 1 << 22
WHY_CHARS = 500
WARM_UP = "{{ 1|pprint ~ ''|wordwrap ~ '&lt;'|striptags ~ lipsum(1, min=1, max=2) ~ 1|tojson }}"
"""Has in it what jinja2 imports only when a template first needs it."""


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

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """jinja2's makes code that shows up in a traceback, and making code is refused; here is no traceback."""
        raise


def environment(now: datetime) -> Sandbox:
    """What templates are written for: the settings and the names that transformers gives them."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
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


def answer(template: str, values: dict[str, Any], now: datetime) -> dict[str, str]:
    """The rendered text, or why there is none; whatever a template does, it is told and not raised."""
    try:
        text = environment(now).from_string(template).render(values)
        if len(text) > TEXT_CHARS:
            return {"refused": "long", "why": f"{len(text):,} characters; allowed are {TEXT_CHARS:,}"}
        return {"text": text}
    except Refused as error:
        return _refused("words", str(error))
    except TemplateSyntaxError as error:
        return _refused("syntax", f"line {error.lineno}: {error.message}")
    except (SecurityError, Forbidden) as error:
        return _refused("forbidden", str(error))
    except MemoryError:
        return {"refused": "memory", "why": f"{MEMORY_BYTES >> 20} MiB"}
    except Exception as error:
        return _refused("fails", f"{type(error).__name__}: {error}")


def _refused(kind: str, why: str) -> dict[str, str]:
    return {"refused": kind, "why": why[:WHY_CHARS]}


def confine(cpu_s: int) -> None:
    """Takes from this process what it needs no more; from here on it has its memory, some time, and two open files.

    Python's hook is left in place for good.
    """
    os.environ.clear()
    used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _limit(resource.RLIMIT_CPU, round(used_s) + cpu_s, more=1)  # a signal that tells why, and one more for good
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        _limit(kind, 0)
    sys.addaudithook(refuse_event)


def refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    """What the interpreter asks before it does a thing; all that is needed has been read and imported."""
    if event in ("open", "import"):
        raise Forbidden(f"{event} {str(arguments[0])[:WHY_CHARS]}")
    confined.refuse_event(event, arguments)


def _limit(kind: int, soft: int, more: int = 0) -> None:
    """One limit, where the system has it: macOS knows RLIMIT_AS and may refuse it."""
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (soft, soft + more))


def main(read: Callable[[], bytes], write: Callable[[bytes], Any]) -> None:
    request = json.loads(read())
    now = datetime.fromisoformat(request["now"])
    said = answer(WARM_UP, {}, now)
    assert "text" in said, said
    confine(request["cpu_s"])
    write(json.dumps(answer(request["template"], request["values"], now)).encode())


if __name__ == "__main__":
    main(sys.stdin.buffer.read, sys.stdout.buffer.write)
