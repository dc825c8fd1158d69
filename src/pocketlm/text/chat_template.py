"""A conversation as its model reads it: messages -> template -> text -> ids.

    messages     [{"role": "user", "content": "Hi"}, ...]
    template     Jinja, which comes with a model and runs in a process of its own, see template_process.py
    text         <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    ids          special tokens of the template are theirs, those that a message spells are text: control_tokens.py

One process renders one conversation and ends. That costs a twentieth of a second, and leaves nothing that the next
conversation could find, nothing to close, and nothing that could hang: docs/decisions/030.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pocketlm.confined import environment
from pocketlm.errors import DataError, FileError, PocketError, UsageError
from pocketlm.text.control_tokens import ControlTokens
from pocketlm.text.tokenizer import Tokenizer

COMMAND = (sys.executable, "-P", "-S", str(Path(__file__).with_name("template_process.py")))
CPU_S = 2
WALL_S = 10.0  # a template cannot wait, it can only compute; this is for a machine that is busy
REPLY_BYTES = 1 << 26  # twelve for each of the 4,194,304 characters, and then some

INSTEAD = "pocketlm chat --plain does without it"

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What templates call special tokens, as tokenizer_config.json does."""

Message = Mapping[str, Any]
"""role: who speaks; content: what they say; and whatever else a template knows."""

WHAT_IT_DOES = {
    "syntax": "has a mistake in",
    "forbidden": "reaches for what no template may have:",
    "memory": "takes more memory than",
    "long": "writes",
}


class _Endless(Exception):
    """The process said more than it may, or nothing for too long."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's way to write a conversation."""

    source: str
    tokenizer: Tokenizer
    token_names: Mapping[str, str] = field(default_factory=dict)
    """The special tokens that it may call by TOKEN_NAMES; what is not here is empty text there."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text.

        Args:
            messages: from the first one on.
            add_generation_prompt: whether the beginning of an answer comes after it.

        Raises:
            UsageError: what is no message.
            DataError: the template refuses these messages, or fails on them.
            FileError: the template is wrong, does what none may, or takes too long.
        """
        names = {name: token for name, token in self.token_names.items() if name in TOKEN_NAMES}
        values = {"messages": _checked(messages), "add_generation_prompt": add_generation_prompt, "tools": None}
        return run_template(self.source, names | values | {"documents": None})

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of the conversation; takes and raises what `render` does.

        No text of a message makes a special id, unless the template itself makes other letters of it.
        """
        marked = self._control_tokens.marked(messages)
        return self._control_tokens.encode(self.render(marked, add_generation_prompt=add_generation_prompt))

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.tokenizer)


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f'message {message!r:.200}: allowed is {{"role": "user", "content": "..."}}')
    return messages


def run_template(source: str, values: Mapping[str, Any], cpu_s: int = CPU_S) -> str:
    """What a template makes of values, in a process that can do no harm, in bounded time and memory.

    Args:
        source: Jinja.
        values: what it may name; JSON.
        cpu_s: seconds of computing that it gets.

    Raises:
        UsageError: values that are no JSON.
        DataError: the template refuses the values, or fails on them.
        FileError: the template is wrong, does what none may, or takes too long.
    """
    try:
        now = datetime.now().isoformat()  # there the time zone is not known
        request = json.dumps({"template": source, "cpu_s": cpu_s, "now": now, "values": values}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a message holds what JSON cannot say ({error}); allowed are texts, numbers, lists") from None
    reply, code = _told(request)
    try:
        answer = json.loads(reply)
    except ValueError:
        raise _ended(code, cpu_s) from None
    if "text" in answer:
        return str(answer["text"])
    raise _refusal(answer["refused"], answer["why"])


def _told(request: bytes) -> tuple[bytes, int]:
    """What the process answers, and its exit code; it has ended then, whatever it was doing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            COMMAND,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
        with process:
            theirs.close()
            try:
                reply = _exchanged(ours, request)
            except (_Endless, TimeoutError):
                raise FileError(f"the chat template does not come to an end in {WALL_S:g} s; {INSTEAD}") from None
            finally:
                process.kill()  # after its last word it is ending, and its exit code is decided
    return reply, process.returncode


def _exchanged(connection: socket.socket, request: bytes) -> bytes:
    """All that comes back until the other end closes.

    Raises:
        TimeoutError: it does not.
        _Endless: too much comes.
    """
    ends_at, reply = time.monotonic() + WALL_S, bytearray()
    connection.settimeout(WALL_S)
    with suppress(BrokenPipeError, ConnectionResetError):  # it has died; its exit code says why
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(1 << 16):
            reply += chunk
            connection.settimeout(max(0.001, ends_at - time.monotonic()))
            if len(reply) > REPLY_BYTES:
                raise _Endless
    return bytes(reply)


def _refusal(kind: str, why: str) -> PocketError:
    if kind == "words":
        return DataError(f"the chat template refuses these messages: {why}")
    if kind == "fails":
        return DataError(f"the chat template fails on these messages: {why}")
    return FileError(f"the chat template {WHAT_IT_DOES.get(kind, kind)} {why}; {INSTEAD}")


def _ended(code: int, cpu_s: int) -> FileError:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return FileError(f"the chat template computes for more than {cpu_s} s; {INSTEAD}")
    how = f"by signal {-code}" if code < 0 else f"with code {code}"
    return FileError(f"the chat template has brought its process to an end {how}; {INSTEAD}")
