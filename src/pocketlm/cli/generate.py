"""`pocketlm generate [MODEL] --prompt TEXT`: the completion on stdout as it comes, and nothing else there."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, add_device, print_json, say, shown

if TYPE_CHECKING:
    from pocketlm.language_model import Completion

HELP = "Complete a prompt: the completion goes to stdout, everything else to stderr."


def run(argv: list[str]) -> int:
    options = vars(_parser().parse_args(argv))
    path, prompt, device, as_json = (options.pop(name) for name in ("model", "prompt", "device", "json"))

    from pocketlm.language_model import load
    from pocketlm.machine import hold_threads

    hold_threads()
    language_model = load(path, device=device, warn=say)
    completion = language_model.stream(prompt, **options)
    started_at = time.perf_counter()
    text = "".join(completion) if as_json else _print_pieces(completion)
    tokens_per_s = completion.num_tokens / (time.perf_counter() - started_at)
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "completion": text,
                "tokens": completion.num_tokens,
                "finish_reason": completion.finish_reason,
                "tokens_per_s": tokens_per_s,
                "seed": completion.seed,
                "model": str(language_model.folder),
            }
        )
    else:
        say(
            f"{completion.num_tokens} tokens ({completion.finish_reason}), {tokens_per_s:,.0f} tokens/s, "
            f"seed {completion.seed}, {language_model.folder}"
        )
    return 0


def _print_pieces(completion: Completion) -> str:
    """Writes each piece at once and returns the whole; a terminal gets a line end on stderr."""
    pieces = []
    for piece in completion:
        pieces.append(piece)
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    if sys.stdout.isatty():
        say("")
    return "".join(pieces)


def _parser() -> Parser:
    """The flags; those that are not given are absent from the result, and the model's own settings stand."""
    parser = Parser(
        "generate", HELP, usage="pocketlm generate [MODEL] --prompt TEXT [...]", argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=None, help="run or model folder (default: newest run)"
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what is continued")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="at most N tokens (default: 128)")
    parser.add_argument("--temperature", metavar="T", type=float, help="0 is greedy (default: the model's own)")
    parser.add_argument("--top-k", metavar="K", type=int, help="only the K likeliest tokens; 0 for all")
    parser.add_argument("--top-p", metavar="P", type=float, help="only the likeliest tokens that reach P; 1 for all")
    parser.add_argument(
        "--min-p", metavar="P", type=float, help="only tokens P times as likely as the likeliest; 0 for all"
    )
    parser.add_argument("--repetition-penalty", metavar="P", type=float, help="above 1: seen tokens become less likely")
    parser.add_argument("--repetition-rule", choices=("ctrl", "count"), help="once per token seen, or per time seen")
    parser.add_argument("--repetition-window", metavar="N", type=int, help="how far back (default: ctrl all, count 64)")
    parser.add_argument("--stop", metavar="TEXT", action="append", help="end before TEXT; may be given several times")
    parser.add_argument("--window", choices=("halves", "exact"), help="what is kept when the context is full")
    parser.add_argument("--seed", metavar="N", type=int, help="repeats a completion (default: another each time)")
    add_device(parser)
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object at the end")
    return parser
