"""`pocketlm verify PATH`: whole or not, naming the file."""

from __future__ import annotations

from pathlib import Path

from pocketlm.cli.arguments import Parser, print_json
from pocketlm.errors import FileError, PocketError


def run(argv: list[str]) -> int:
    parser = Parser("verify", "Say whether a run, a checkpoint or a data set is whole: exit 0 if so, 3 if not.")
    parser.add_argument("path", metavar="PATH", help="a run, a checkpoint or a data set")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    results = check(Path(arguments.path))
    whole = all(problem is None for _, problem in results)
    if arguments.json:
        parts = [{"path": str(path), "whole": problem is None, "problem": problem} for path, problem in results]
        print_json({"path": arguments.path, "whole": whole, "parts": parts})
    else:
        for path, problem in results:
            print(f"{path}: whole" if problem is None else problem)
    return 0 if whole else FileError.exit_code


def check(path: Path) -> list[tuple[Path, str | None]]:
    """Each part of what stands at `path`, with its problem or None.

    Raises:
        FileError: nothing there that pocketlm knows.
    """
    if (path / "dataset.json").exists():
        return _check_dataset(path)
    from pocketlm.files import MANIFEST, verify_folder

    if (path / "checkpoints").is_dir():
        from pocketlm.checkpoint import list_checkpoints

        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise FileError(f"{path} has no checkpoint yet")
        return [(folder, _problem(lambda folder=folder: verify_folder(folder))) for folder in checkpoints]
    if (path / MANIFEST).exists() or (path / "training").is_dir():
        return [(path, _problem(lambda: verify_folder(path)))]
    if (path / "config.json").is_file():
        problem = f"{path} is a model folder but no checkpoint: it has no {MANIFEST}, so nothing to check it against"
        return [(path, problem)]
    what = "is none of them" if path.exists() else "does not exist"
    raise FileError(f"{path} {what}; give a run, a checkpoint or a data set")


def _check_dataset(path: Path) -> list[tuple[Path, str | None]]:
    """Opening a data set checks its sizes and its tokenizer; each shard is hashed when it is first read."""
    from pocketlm.data.shards import open_dataset

    try:
        dataset = open_dataset(path)
    except PocketError as error:
        return [(path, str(error))]
    shards = [shard for stream in (dataset.train, dataset.val) for shard in stream.shards]
    return [(shard.path, _problem(lambda shard=shard: shard.tokens)) for shard in shards]


def _problem(check_it: object) -> str | None:
    assert callable(check_it)
    try:
        check_it()
    except PocketError as error:
        return str(error)
    return None
