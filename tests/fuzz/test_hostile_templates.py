"""Chat templates that try to get out, to go on for ever, or to take all memory: each is refused in one clear line.

The oracles are a secret in the environment, in a file and in a value that no template is given; the kernel's account of
the memory; and an environment without a sandbox, in which payloads of every kind that reaches for something find it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from pocketlm.errors import DataError, FileError, PocketError
from pocketlm.text import chat_template, template_process
from pocketlm.text.chat_template import run_template
from pocketlm.text.template_process import MEMORY_BYTES

pytestmark = pytest.mark.goal("R24")

SECRET = "the-canary-sings"
MESSAGES = [{"role": "user", "content": "Hi", "tags": ["a", "b"]}, {"role": "assistant", "content": "Yes."}]

READS_A_FILE = "['__import__']('pathlib').Path(messages[0].path).read_text() }}"
# What each renders outside of a sandbox that shows it has got there; None where nobody should try.
ESCAPES = {
    "class": ("{{ ''.__class__ }}", "<class 'str'>"),
    "mro": ("{{ messages.__class__.__mro__[1] }}", "<class 'object'>"),
    "subclasses": ("{{ ().__class__.__base__.__subclasses__()[0] }}", "<class"),
    "subscript": ("{{ ''['__cla' ~ 'ss__'] }}", "<class 'str'>"),
    "attr filter": ("{{ ''|attr('__class__')|attr('__mro__') }}", "<class 'object'>"),
    "map attribute": ("{{ ['']|map(attribute='__class__')|list }}", "<class 'str'>"),
    "join attribute": ("{{ messages|join(',', attribute='__class__.__name__') }}", "dict["),
    "unicode": ("{{ ''['\\x5f\\u005fclass\\137_'] }}", "<class 'str'>"),
    "unicode name": (
        "{{ ''.\uff3f\uff3fclass\uff3f\uff3f.mro() }}",
        None,
    ),  # full-width, which Python reads as __class__
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "<class 'object'>"),
    "format_map": ("{{ '{m.__class__}'.format_map({'m': 1}) }}", "<class 'int'>"),
    "format by attr": ("{{ ('{0.__class__}'|attr('format'))(1) }}", "<class 'int'>"),
    "cycler": ("{{ cycler.__init__.__globals__.os.environ.CANARY }}", SECRET),
    "joiner": ("{{ joiner.__init__.__globals__.os.environ['CANARY'] }}", SECRET),
    "namespace": ("{{ namespace.__init__.__globals__['__builtins__']" + READS_A_FILE, SECRET),
    "lipsum": ("{{ lipsum.__globals__.os.system('exit 3') }}", "768"),
    "strftime": ("{{ strftime_now.__globals__['os'].environ.CANARY }}", None),
    "raise_exception": ("{{ raise_exception.__globals__ }}", None),
    "macro": ("{% macro f() %}{% endmacro %}{{ f.__init__.__globals__.sys.modules.os.environ.CANARY }}", SECRET),
    "self": ("{{ self._TemplateReference__context.cycler.__init__.__globals__.os.environ.CANARY }}", SECRET),
    "loop": (
        "{% for m in messages %}{{ loop.__init__.__globals__.sys.modules.os.environ.CANARY }}{% endfor %}",
        SECRET,
    ),
    "loop cycle": ("{% for m in messages %}{{ loop.cycle.__func__.__globals__.sys.modules.os }}{% endfor %}", "module"),
    "generator": ("{{ (messages|map('upper')).gi_frame.f_builtins" + READS_A_FILE, SECRET),
    "undefined": ("{{ nobody.__class__ }}{{ nobody._fail_with_undefined_error.__globals__ }}", None),
    "append": ("{{ messages.append(1) }}{{ messages }}", "1]"),
    "update": ("{{ messages[0].update(role='system') }}{{ messages[0].role }}", "system"),
    "include": ("{% include path %}", None),
    "import": ("{% import '/etc/passwd' as p %}{{ p }}", None),
    "extends": ("{% extends messages[0].path %}", None),
}
LASTING = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "big range": "{% for i in range(10**9) %}{% endfor %}",
    "tower": "{{ 9 ** (9 ** 9) }}",
    "shift by hand": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "fork of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loop recursion": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "deep source": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep list": "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
    "words": "{{ (('a ' * 100000) ~ 'b')|wordwrap(1)|wordcount }}{% for a in range(99999) %}"
    "{{ ('<' * 99999)|striptags|urlize|title }}{% endfor %}",
}
LARGE = {
    "product": "{{ 'a' * 10**10 }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "list": "{{ ([0] * 10**9)|length }}",
    "percent": "{{ '%1000000000d'|format(1) }}",
    "braces": "{{ '{:>1000000000}'.format(1) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "indent": "{{ ('a\\n' * 10**5)|indent(10**5) }}",
    "replace": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "batch": "{{ range(9)|batch(10**9, 0)|list|length }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**6, min=10**6, max=10**6 + 1) }}",
}


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Messages that name a file with the secret; it is in the environment, too."""
    monkeypatch.setenv("CANARY", SECRET)
    (tmp_path / "secret").write_text(SECRET)
    path = str(tmp_path / "secret")
    return {"messages": [MESSAGES[0] | {"path": path}, MESSAGES[1]], "path": path}


def refusal(source: str, values: dict[str, object]) -> PocketError:
    before = json.dumps(values)
    with pytest.raises(PocketError) as caught:
        run_template(source, values, cpu_s=1)
    assert type(caught.value) in (DataError, FileError)
    assert caught.value.exit_code == 3
    words = str(caught.value)
    assert words.startswith("the chat template ")
    assert len(words) < 700
    assert "\n" not in words
    assert SECRET not in words
    assert json.dumps(values) == before
    return caught.value


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_that_reaches_out_is_refused(name: str, values: dict[str, object]) -> None:
    refusal(ESCAPES[name][0], values)


@pytest.mark.parametrize("name", [name for name, (_, there) in ESCAPES.items() if there])
def test_the_same_template_gets_out_where_there_is_no_sandbox(name: str, values: dict[str, object]) -> None:
    source, there = ESCAPES[name]
    rendered = jinja2.Environment().from_string(source).render(values)
    assert there is not None
    assert there in rendered


@pytest.mark.parametrize("name", [*LASTING, *LARGE])
def test_a_template_without_end_or_measure_is_ended(name: str, values: dict[str, object]) -> None:
    refusal((LASTING | LARGE)[name], values)


def test_a_number_of_ten_million_digits_is_none() -> None:
    assert run_template("{{ ('9' * 10**7)|int }}", {}, cpu_s=1) == "0"


CONFINED = """
import json, os, socket, subprocess, sys
sys.path.insert(0, {folder!r})
import template_process
template_process.confine(1)
def outcome(f, *args):
    try:
        f(*args)
    except Exception as error:
        return type(error).__name__
    return "done"
tried = [
    outcome(open, {secret!r}), outcome(open, {new!r}, "w"), outcome(socket.socket), outcome(os.pipe),
    outcome(subprocess.run, ["true"]), outcome(bytearray, template_process.MEMORY_BYTES), dict(os.environ),
]
print(json.dumps(tried), flush=True)
while True:
    pass
"""


def test_whoever_leaves_the_sandbox_is_in_a_process_that_can_do_nothing(tmp_path: Path) -> None:
    """The program runs in the process as a template would that has got out: no file, no socket, no other program."""
    (tmp_path / "secret").write_text(SECRET)
    folder = str(Path(template_process.__file__).parent)
    program = CONFINED.format(folder=folder, secret=str(tmp_path / "secret"), new=str(tmp_path / "new"))
    ended = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    *tried, environment = json.loads(ended.stdout)
    assert tried == ["OSError"] * 5 + ["MemoryError"]
    assert environment == {}
    assert ended.returncode < 0, "ended by the kernel"
    assert not (tmp_path / "new").exists()


MEASURED = """
import json, resource, sys
from pocketlm.errors import PocketError
from pocketlm.text.chat_template import run_template
for source in json.load(sys.stdin):
    try:
        run_template(source, {}, cpu_s=1)
    except PocketError:
        pass
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux only, and ru_maxrss is in KiB there")
def test_no_template_gets_more_memory_than_it_may() -> None:
    payloads = json.dumps([LARGE[name] for name in ("product", "doubling", "percent", "output")])
    ended = subprocess.run([sys.executable, "-c", MEASURED], input=payloads, capture_output=True, text=True, check=True)
    assert int(ended.stdout) << 10 < MEMORY_BYTES


def test_the_caller_is_told_and_no_process_is_left_when_one_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[subprocess.Popen[bytes]]()
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *given, **named: started.append(start(*given, **named)) or started[-1]
    )
    monkeypatch.setattr(chat_template, "COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    with pytest.raises(FileError, match="to an end with code 7"):
        run_template("x", {"long": "x" * (1 << 22)})
    monkeypatch.setattr(chat_template, "COMMAND", (sys.executable, "-c", "while True: print('x' * 65536)"))
    with pytest.raises(FileError, match="does not come to an end"):
        run_template("x", {})
    monkeypatch.setattr(chat_template, "COMMAND", (sys.executable, "-c", "input(); input()"))
    monkeypatch.setattr(chat_template, "WALL_S", 0.01)
    with pytest.raises(FileError, match="does not come to an end"):
        run_template("x", {})
    assert len(started) == 3
    assert all(process.returncode is not None for process in started)
