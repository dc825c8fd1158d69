"""`pocketlm eval [MODEL] [--data SOURCE]`: loss, perplexity and bits per byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pocketlm.cli.arguments import Parser, add_device, print_json, print_table, say
from pocketlm.errors import UsageError
from pocketlm.field_types import Dtype

if TYPE_CHECKING:
    from argparse import Namespace

    import torch

    from pocketlm.data.loader import Stream
    from pocketlm.evaluate.loss import LossReport
    from pocketlm.model.arithmetic import Arithmetic
    from pocketlm.text.tokenizer import Tokenizer


def run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)

    import torch

    from pocketlm import checkpoint, machine
    from pocketlm.evaluate.loss import evaluate_stream
    from pocketlm.model.arithmetic import computing

    path = Path(arguments.model) if arguments.model else checkpoint.newest_run()
    folder = checkpoint.find_checkpoint(path, say)
    model, tokenizer, _ = checkpoint.load_model(folder)
    if arguments.document_masks != "auto":
        model.document_end = tokenizer.end_id if arguments.document_masks == "on" else None
    context, stride = _windows(arguments, model.config.max_position_embeddings)
    state = checkpoint.read_state(folder) if (folder / checkpoint.STATE).is_file() else {}
    device = machine.default_device(_device(arguments.device, state))
    arithmetic = _arithmetic(folder, state, device)
    if arguments.dtype != "auto":
        arithmetic = replace(arithmetic, dtype=arguments.dtype)
    data, stream = _text(arguments, folder, tokenizer)
    arithmetic.use()
    if threads := _threads(state):
        torch.set_num_threads(threads)  # sums are split by it: as in training, to the last bit
    else:
        machine.hold_threads()
    model = computing(model.to(device), arithmetic)
    report = evaluate_stream(model, stream, tokenizer, context=context, stride=stride, limit=arguments.limit)
    masks = model.document_end is not None
    if arguments.json:
        how = {"dtype": arithmetic.dtype, "context": context, "document_masks": masks}
        print_json({"model": str(folder), "data": data, **how, **report.tree()})
        return 0
    _print(report)
    apart = ", each document by itself" if masks else ""
    say(f"{folder} on {data} in {arithmetic.dtype}, windows of {context} tokens, stride {stride}{apart}")
    return 0


def _parser() -> Parser:
    parser = Parser("eval", "Loss, perplexity and bits per byte of a model on a text.")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a run, checkpoint or model folder (default: newest run)"
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE|DIR",
        help="a text source, or a data set's held-out part (default: held out of what the model was trained on)",
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window (default: the model's)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: the context)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="score only this many first tokens")
    parser.add_argument("--dtype", choices=["auto", *get_args(Dtype)], default="auto", help="auto: as it was trained")
    add_device(parser, "where it was trained, if that is here")
    parser.add_argument(
        "--document-masks",
        choices=["auto", "on", "off"],
        default="auto",
        help="keep attention inside each document (auto: as it was trained)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _windows(arguments: Namespace, longest: int) -> tuple[int, int]:
    """(context, stride) in tokens; longest: the model's context.

    Raises:
        UsageError: what was given is not possible.
    """
    context = longest if arguments.context is None else arguments.context
    stride = context if arguments.stride is None else arguments.stride
    if not 1 <= context <= longest:
        raise UsageError(f"--context {context} is not in 1..{longest}, the model's longest")
    if not 1 <= stride <= context:
        raise UsageError(f"--stride {stride} is not in 1..{context}, the context")
    if arguments.limit < 0:
        raise UsageError(f"--limit {arguments.limit} is below 0, which scores all")
    return context, stride


def _text(arguments: Namespace, folder: Path, tokenizer: Tokenizer) -> tuple[str, Stream]:
    """What is scored: its name, and its tokens."""
    from pocketlm.evaluate.source import checked, open_stream, own_dataset, own_source

    if arguments.data is None:
        dataset = own_dataset(folder)
        return str(dataset.path), checked(dataset.val, str(dataset.path))
    data, stream = arguments.data, open_stream(arguments.data, tokenizer, folder, limit=arguments.limit, say=say)
    if data == own_source(folder):
        say(f"{folder} was trained on {data}: this is how it remembers; without --data, what was held out is scored")
    return data, stream


def _print(report: LossReport) -> None:
    rows: list[tuple[str, ...]] = [
        ("loss (nats/token)", f"{report.loss:.4f}"),
        ("perplexity", f"{report.perplexity:.2f}"),
        ("bits per byte", f"{report.bits_per_byte:.4f}"),
        ("  with special tokens", f"{report.bits_per_byte_with_special:.4f}"),
        ("tokens", f"{report.tokens:,}"),
        ("bytes", f"{report.bytes:,}"),
    ]
    print_table(rows)


def _arithmetic(folder: Path, state: Mapping[str, Any], device: torch.device) -> Arithmetic:
    """As in training; on another machine what of that can be kept, and says so."""
    from pocketlm import checkpoint, machine
    from pocketlm.model.arithmetic import usable

    arithmetic = checkpoint.trained_with(state)
    then = _tree(state.get("versions")) | {"device": _tree(state.get("resolved")).get("device")}
    if state and not machine.changes(then, device):
        return arithmetic
    arithmetic, why = usable(arithmetic, device)
    if why:
        say(f"{folder} was trained elsewhere: {why}")
    return arithmetic


def _device(asked: str, state: Mapping[str, Any]) -> str:
    """The kind that is asked for, else the one that it was trained on, if that is here."""
    from pocketlm import devices

    trained_on = _tree(state.get("resolved")).get("device")
    return str(trained_on) if asked == "auto" and trained_on in devices.present() else asked


def _threads(state: Mapping[str, Any]) -> int | None:
    """With how many it was trained; None where nothing says so."""
    threads = _tree(state.get("resolved")).get("threads")
    return threads if type(threads) is int and 1 <= threads <= 1024 else None


def _tree(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
