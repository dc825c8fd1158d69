"""Text in, text out: a model together with its tokenizer and its way of speaking.

    prompt   -> tokenizer     -+
    messages -> chat template -+-> engine -> token ids -> TextStream -> StopStrings -> pieces of text

Both filters at the end hold back what is not yet certain: `TextStream` the bytes of an unfinished character,
`StopStrings` what may be the beginning of a stop string. So a piece that was given out is never taken back, and the
pieces joined are the text, whatever the tokens were cut into.

`stream` completes a text as it stands; `reply` answers in a conversation, where the model has a template for it.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Unpack, get_args

import torch

from pocketlm.checkpoint import Warn, find_checkpoint, newest_run, read_release
from pocketlm.errors import DataError, UsageError
from pocketlm.generate import engine
from pocketlm.generate.engine import Window
from pocketlm.generate.sampling import Sampling, SamplingOptions
from pocketlm.machine import default_device
from pocketlm.model.arithmetic import ATTENTION_ON
from pocketlm.model.transformer import Transformer
from pocketlm.text.chat_template import ChatTemplate, Message
from pocketlm.text.tokenizer import TextStream, Tokenizer

LoadDtype = Literal["auto", "fp32", "bf16"]
FinishReason = Literal["end", "stop", "length"]

DEFAULT_NEW_TOKENS = 128


class CompletionOptions(SamplingOptions, total=False):
    """What `generate`, `stream` and `reply` take beside the prompt; every sampling field is among them."""

    max_new_tokens: int
    """It may go far beyond the model's context, see `window`."""
    stop: str | Sequence[str]
    """Strings that end the text, and are not part of it."""
    seed: int | None
    """Repeats a completion; by default another one each time, told in `Completion.seed`."""
    window: Window
    """What is kept when the context is full: `halves` is fast, `exact` slow; see generate/engine.py."""


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: LoadDtype = "auto",
    device: str = "auto",
    warn: Warn = warnings.warn,
) -> LanguageModel:
    """The model of a run (its newest valid checkpoint), of a checkpoint, of a Hugging Face folder or of a model file
    (.gguf, llama2.c .bin).

    Args:
        model: the folder or file; by default the newest run under `runs/`.
        dtype: the precision it computes in; `auto` is fp32, as stored.
        device: cuda, xpu, mps or cpu; `auto` is a GPU if there is one.
        warn: told of each damaged checkpoint that was passed over.

    Raises:
        FileError: nothing there, or nothing whole.
        UsageError: no such dtype, or device.
    """
    if dtype not in get_args(LoadDtype):
        raise UsageError(f"dtype {dtype!r}: allowed is {', '.join(get_args(LoadDtype))}")
    here = default_device(device)
    path = find_checkpoint(newest_run() if model is None else Path(model), warn)
    release = read_release(path)
    transformer = release.transformer().to(here, torch.bfloat16 if dtype == "bf16" else None)
    if here.type in ATTENTION_ON:
        transformer.use_attention(ATTENTION_ON[here.type][0])
    sample = release.sample
    sampling = Sampling(temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p)
    template = release.chat_template and ChatTemplate(release.chat_template, release.tokenizer, release.token_names)
    return LanguageModel(transformer, release.tokenizer, sampling, path, template or None, release.other_end_ids)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model that reads and writes text."""

    model: Transformer
    """Token ids (B, T) -> logits (B, T, V), both on `device`."""
    tokenizer: Tokenizer
    sampling: Sampling = field(default_factory=Sampling)
    """How it speaks unless told otherwise: its generation_config.json."""
    folder: Path | None = None
    """The folder, or file, that it was loaded from."""
    chat_template: ChatTemplate | None = None
    """How it reads a conversation; None of a base model, which was never taught one."""
    other_end_ids: frozenset[int] = frozenset()
    """What ends a text beside the tokenizer's own id."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.head.device

    def generate(self, prompt: str, **options: Unpack[CompletionOptions]) -> str:
        """The text that follows `prompt`, all at once; takes what `stream` takes."""
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str, **options: Unpack[CompletionOptions]) -> Completion:
        """The text that follows `prompt`, piece by piece, until the end-of-text id, a stop string or the last token.

        Args:
            prompt: what is continued; an empty one begins a new document. Special tokens in it are plain text.
            options: see `CompletionOptions`; fields of `Sampling` replace the model's own.

        Raises:
            UsageError, DataError: a setting or a prompt that is not allowed, before anything is generated.
            FileError: while reading: the model's logits are not finite.
        """
        begin_id = self.tokenizer.begin_id
        begin = [] if begin_id is None else [begin_id]
        ids = [*begin, *self.tokenizer.encode(prompt)] or [self.tokenizer.end_id]
        return self._completion(ids, begin, whole=not prompt, **options)  # where the next would begin, this has ended

    def reply(self, messages: Sequence[Message], **options: Unpack[CompletionOptions]) -> Completion:
        """The model's next message in a conversation, piece by piece.

        It ends at what ends a text, and at every special token that the template wrote into the conversation: these
        stand between messages, and a model that comes to one has gone on to the next.

        Args:
            messages: `{"role": "user", "content": "Hi"}` and so on. Special tokens in them are plain text.
            options: see `CompletionOptions`; fields of `Sampling` replace the model's own.

        Raises:
            UsageError: the model has no chat template; or a setting, or a message, that is not allowed.
            DataError: the template refuses these messages, or fails on them.
            FileError: the template is wrong, or takes too long; while reading: the model's logits are not finite.
        """
        if self.chat_template is None:
            raise UsageError(f"{self.folder or 'this model'} has no chat template: it completes text, and answers none")
        ids = self.chat_template.encode(messages)
        if not ids:
            raise DataError("the chat template makes nothing of these messages")
        return self._completion(ids, self.tokenizer.special_ids.intersection(ids), whole=True, **options)

    def _completion(
        self,
        ids: Sequence[int],
        end_ids: Collection[int],
        *,
        whole: bool,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        window: Window = "halves",
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """What follows these ids; the other options are those of `CompletionOptions`.

        Args:
            end_ids: what ends it, beside what always does.
            whole: whether it is a text of its own, and not the rest of one.
        """
        rules = replace(self.sampling, **sampling)
        _check(max_new_tokens, seed, window)
        seed = secrets.randbits(32) if seed is None else seed
        end_ids = {self.tokenizer.end_id, *self.other_end_ids, *end_ids}
        tokens = engine.generate(
            self.model,
            ids,
            rules,
            max_new_tokens=max_new_tokens,
            stop_ids=end_ids,
            window=window,
            generator=torch.Generator().manual_seed(seed),  # on the CPU: a seed means the same on every device
            num_ids=self.tokenizer.vocab_size,
        )
        text = TextStream(self.tokenizer, whole=whole)
        return Completion(tokens, text, StopStrings(stop), end_ids, seed)


class Completion(Iterator[str]):
    """Pieces of a text while it is written, never empty; afterwards, how it ended.

    `num_tokens` counts the tokens chosen so far, the end-of-text id included. `finish_reason` is None until the last
    piece was read: then `end` (the model ended the text), `stop` (a stop string) or `length`. `seed` repeats it.
    """

    def __init__(
        self, tokens: Iterator[int], text: TextStream, stops: StopStrings, end_ids: Collection[int], seed: int
    ) -> None:
        self.seed = seed
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._pieces = self._read(tokens, text, stops, end_ids)

    def __next__(self) -> str:
        return next(self._pieces)

    def _read(
        self, tokens: Iterator[int], text: TextStream, stops: StopStrings, end_ids: Collection[int]
    ) -> Iterator[str]:
        reason: FinishReason = "length"
        for token in tokens:
            self.num_tokens += 1
            if token in end_ids:
                reason = "end"
                break
            if piece := stops.feed(text.feed(token)):
                yield piece
            if stops.found:
                break
        if rest := stops.feed(text.flush()) + stops.flush():
            yield rest
        self.finish_reason = "stop" if stops.found else reason


class StopStrings:
    """Lets text through up to the first stop string, which ends it and is not part of it.

    First is the one whose last character comes first, and of those that end together the longest: a rule that does not
    depend on the pieces in which the text arrives. Held back is the longest end of the text that begins a stop string.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self.stops:
            raise UsageError("a stop string is empty; give the text to stop at, or none")
        self.held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Takes the next piece of text and returns what is certain to be before any stop string."""
        if self.found:
            return ""
        text = self.held + piece
        places = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if places:
            _, cut = min(places)
            self.found = True
        else:
            cut = len(text) - self._num_held(text)
        self.held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back and turned out to begin no stop string: the text is over."""
        rest = "" if self.found else self.held
        self.held = ""
        return rest

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning, but not the whole, of a stop string."""
        sizes = ((stop, size) for stop in self.stops for size in range(1, min(len(stop), len(text) + 1)))
        return max((size for stop, size in sizes if stop.startswith(text[-size:])), default=0)


def _check(max_new_tokens: int, seed: int | None, window: Window) -> None:
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}: allowed is 1 or more")
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed}: allowed is 0 to 2^63 - 1")
    if window not in get_args(Window):
        raise UsageError(f"window {window!r}: allowed is {' or '.join(get_args(Window))}")
