"""`pocketlm tokenizer train`."""

from __future__ import annotations

from pathlib import Path

from pocketlm.cli.arguments import Parser, print_json, say
from pocketlm.errors import UsageError

USAGE = "pocketlm tokenizer train --source SOURCE --vocab-size N --out FILE"


def run(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: {USAGE}\n\nTrain a byte-level BPE tokenizer.")
        return 0
    if argv[:1] != ["train"]:
        raise UsageError(f"tokenizer takes train; usage: {USAGE}")
    parser = Parser("tokenizer train", "Train a byte-level BPE tokenizer and write it as a tokenizer.json.")
    parser.add_argument("--source", required=True, help="stdlib | files:GLOB | hf:OWNER/NAME[/CONFIG][@REVISION]")
    parser.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="ids, the end-of-text token among them"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the tokenizer.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv[1:])

    from pocketlm.files import write_file
    from pocketlm.text.sources import open_source
    from pocketlm.text.tokenizer import train_tokenizer

    documents = open_source(arguments.source, say=say).documents()
    tokenizer = train_tokenizer((document.text for document in documents), arguments.vocab_size)
    out = Path(arguments.out)
    write_file(out, tokenizer.to_json().encode())
    if arguments.json:
        print_json({"path": str(out), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint})
    else:
        say(f"{tokenizer.vocab_size} tokens in {out}; next: pocketlm train tiny --data.tokenizer {out}")
    return 0
