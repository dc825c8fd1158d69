"""Chat templates that try to get out, to go on for ever, or to take all memory: each is refused in one clear line.

The oracles are a secret in the environment, in a file and in a value that no template is given; the kernel's account of
the memory; and an environment without a sandbox, in which payloads of every kind that reaches for something find it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import jinja2
import pytest

from pocketlm import confined
from pocketlm.errors import DataError, FileError, PocketError
from pocketlm.text import chat_template
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
    "strftime": ("{{ strftime_now.__self__ }}", None),
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
FORBIDDEN = "reaches for what no template may have: '"
NO_LOADER = "fails on these messages: TypeError: no loader"
OTHER_WORDS = {
    "unicode name": "has a mistake in line 1: Invalid character in identifier",
    **dict.fromkeys(("include", "import", "extends"), NO_LOADER),
}
LASTING = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "tower": "{{ 9 ** (9 ** 9) }}",
    "shift by hand": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "fork of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "lipsum": "{{ lipsum(n=10**6, min=10**6, max=10**6 + 1) }}",
    "filters": "{% for a in range(99999) %}{{ (a ~ 'a <' * 9999)|striptags|urlize|title|wordwrap|length }}{% endfor %}",
}
DEEP = {
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop recursion": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "deep source": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep list": "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
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
}
LONG = {"output": "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}"}
MEASURES = [  # the seconds that each gets: a slow machine comes to what it shall show, too
    *((name, source, 1, "computes for more than 1 s; ") for name, source in LASTING.items()),
    (
        "big range",
        "{% for i in range(10**9) %}{% endfor %}",
        9,
        "fails on these messages: OverflowError: Range too big",
    ),
    *((name, source, 9, "fails on these messages: RecursionError: ") for name, source in DEEP.items()),
    *((name, source, 9, "takes more memory than 512 MiB; ") for name, source in LARGE.items()),
    *((name, source, 9, "writes 99,899,001 characters; allowed are 4,194,304; ") for name, source in LONG.items()),
]


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Messages that name a file with the secret; it is in the environment, too."""
    monkeypatch.setenv("CANARY", SECRET)
    (tmp_path / "secret").write_text(SECRET)
    path = str(tmp_path / "secret")
    return {"messages": [MESSAGES[0] | {"path": path}, MESSAGES[1]], "path": path}


def refusal(source: str, values: dict[str, object], why: str, cpu_s: int = 9) -> None:
    """It is refused with these words, behind the usual first ones."""
    before = json.dumps(values)
    with pytest.raises(PocketError) as caught:
        run_template(source, values, cpu_s)
    assert type(caught.value) in (DataError, FileError)
    assert caught.value.exit_code == 3
    words = str(caught.value)
    assert words.startswith(f"the chat template {why}")
    assert len(words) < 700
    assert "\n" not in words
    assert SECRET not in words
    assert json.dumps(values) == before


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_that_reaches_out_is_refused(name: str, values: dict[str, object]) -> None:
    refusal(ESCAPES[name][0], values, OTHER_WORDS.get(name, FORBIDDEN))


@pytest.mark.parametrize("name", [name for name, (_, there) in ESCAPES.items() if there])
def test_the_same_template_gets_out_where_there_is_no_sandbox(name: str, values: dict[str, object]) -> None:
    source, there = ESCAPES[name]
    rendered = jinja2.Environment().from_string(source).render(values)
    assert there is not None
    assert there in rendered


@pytest.mark.parametrize(("source", "cpu_s", "why"), [pytest.param(*one, id=name) for name, *one in MEASURES])
def test_a_template_without_end_or_measure_is_ended(
    source: str, cpu_s: int, why: str, values: dict[str, object]
) -> None:
    refusal(source, values, why, cpu_s)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a b c'|wordwrap(3) }}", "a b\nc"),
        ("{{ '<b>1 &lt; 2</b>'|striptags }}", "1 < 2"),
        ("{{ 'at example.org'|urlize|striptags }}", "at example.org"),
        ("{{ lipsum(1, html=false)|length > 9 }}", "True"),
        ("{{ {'b': 1, 'a': ['\\u00e9']}|pprint }}", "{'a': ['\u00e9'], 'b': 1}"),
        (
            "{{ 1.5|filesizeformat }}{{ 'a b'|urlencode }}{{ [3, 1]|sort|tojson(indent=1) }}",
            "1 Bytesa%20b[\n 1,\n 3\n]",
        ),
        ("{{ ('%.3f'|format(2)) ~ [1]|random ~ {'a': '\"'}|xmlattr ~ 'x'|e }}", '2.0001 a="&#34;"x'),
    ],
)
def test_what_jinja2_imports_late_is_there(source: str, text: str) -> None:
    assert run_template(source, {}) == text


def test_a_number_of_ten_million_digits_is_none() -> None:
    assert run_template("{{ ('9' * 10**7)|int }}", {}, cpu_s=1) == "0"


CONFINED = """
import json, os, resource, socket, subprocess, sys
from pathlib import Path
from pocketlm.text import template_process
template_process.confine(1)
here = Path("here")

def outcome(act):
    try:
        exec(act)
    except BaseException as error:
        return type(error).__name__
    return "done"

print(json.dumps([{act: outcome(act) for act in json.loads(sys.argv[1])}, dict(os.environ)]), flush=True)
while True:
    pass
"""
DEEDS = {
    "OSError": ["os.pipe()", "os.dup(1)", "os.listdir()"],
    "MemoryError": ["bytearray(template_process.MEMORY_BYTES)"],
    "Forbidden": [
        *("here.read_text()", "here.write_text('x')", "os.open('new', os.O_CREAT)", "socket.socket()"),
        *(
            "os.remove('here')",
            "here.rename('there')",
            "os.truncate('here', 0)",
            "os.mkdir('new')",
            "os.rmdir('empty')",
        ),
        *("os.symlink('here', 'new')", "os.link('here', 'new')", "os.chmod('here', 0)", "os.utime('here', (0, 0))"),
        *("os.chdir('/')", "os.kill(os.getppid(), 0)", "os.killpg(os.getppid(), 0)", "os.fork()", "os.system('true')"),
        *("os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])", "subprocess.Popen('true')"),
        *("import ctypes", "import sqlite3", "resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))"),
        "outcome.__code__.replace(co_code=b'')",
    ],
}


def test_whoever_leaves_the_sandbox_is_in_a_process_that_python_lets_do_nothing(tmp_path: Path) -> None:
    """The program runs in the process as a template would that has got out: no file, no socket, no other program."""
    (tmp_path / "here").write_text(SECRET)
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-P", "-c", CONFINED, json.dumps([act for acts in DEEDS.values() for act in acts])]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=confined.environment()
    )
    tried, environment = json.loads(ended.stdout)
    assert tried == {act: name for name, acts in DEEDS.items() for act in acts}
    assert environment == {}
    assert ended.returncode < 0, "ended by the kernel"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "here"]
    assert (tmp_path / "here").read_text() == SECRET


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
    payloads = json.dumps([LARGE["product"], LARGE["doubling"], LARGE["percent"], LONG["output"]])
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
    monkeypatch.setattr(chat_template, "COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
    monkeypatch.setattr(chat_template, "WALL_S", 0.01)
    with pytest.raises(FileError, match="does not come to an end"):
        run_template("x", {})
    assert len(started) == 3
    assert all(process.returncode is not None for process in started)


ELSEWHERE = """
from datetime import datetime
from pocketlm.text.chat_template import run_template
before = datetime.now()
said = run_template("{{ strftime_now('%j %H') }}", {})
print(said in {time.strftime("%j %H") for time in (before, datetime.now())})
"""


def test_jinja2_is_found_where_the_caller_finds_it(tmp_path: Path) -> None:
    """An environment without packages, which are on PYTHONPATH; in a time zone of its own."""
    venv.create(tmp_path / "bare", symlinks=True)
    environment = confined.environment() | {"TZ": "Etc/GMT+12"}
    command = [str(tmp_path / "bare/bin/python"), "-c", ELSEWHERE]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ended.stdout, ended.stderr) == ("True\n", "")
