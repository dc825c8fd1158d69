"""From a text source to a data set folder: survey, tokenizer, pieces.

    1. survey     one pass over the texts that are not left out (`data.selection`) counts bytes and chooses the split
                  (`data.split`); of text that comes over a network, only over the first documents, as soon as these
                  say enough
    2. tokenizer  loaded, or for `bpe:SIZE` trained on the training texts only
    3. plan.json  fixes both, with fingerprints of everything that went in
    4. pieces     documents k*piece_documents .. (k+1)*piece_documents - 1 become train-0000k and val-0000k;
                  piece-0000k.json beside them says that they are whole and which plan they belong to
    5. dataset.json, then manifest.json: the mark of a finished set; plan.json and piece-* go

Each file appears whole or not at all. A run that was stopped goes on: a plan that still fits saves steps 1 and 2,
pieces that are whole are kept, and each says where in the source the next begins. Because a piece depends on its
documents only, and where copies are left out on what earlier pieces wrote down, the finished bytes are the same however
often the work was interrupted. The tokens of one piece are in memory at a time.

prepare.lock is in a folder as long as it is worked in or unfinished: a second process waits for the first. What a
finished set has lost or changed is never made again in silence: it is refused, and the user deletes the folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pocketlm.config import DataConfig
from pocketlm.data.pieces import (
    MAX_PIECES,
    PIECE_FILES,
    PLAN,
    PLAN_FILE,
    SEEN_FILES,
    Plan,
    Progress,
    file_of,
    numbered,
    read_plan,
    write_pieces,
)
from pocketlm.data.sealed import Tree, hash_of, json_bytes, sealed, unsealed
from pocketlm.data.selection import Selection, added_up, in_words, memory_in_words, selection_tree
from pocketlm.data.shards import COUNTS, DATASET_FILE, SCHEMA, TOKENIZER_FILE, open_dataset, token_dtype
from pocketlm.data.split import Split, Survey, survey
from pocketlm.data.standing import LOCK_FILE, check_ours, check_same, is_finished, names_in, use_as_it_is
from pocketlm.errors import DataError, Unfetched, one_line
from pocketlm.files import Lock, make_folder, remove_file, sweep, write_file, write_manifest
from pocketlm.reading import Entry
from pocketlm.text.sources import Remembering, Source, open_source
from pocketlm.text.tokenizer import Tokenizer, bpe_size, load_tokenizer, train_tokenizer

REMEMBERED_CHARS = 1 << 26
ENOUGH_DOCUMENTS = 8192  # from a network; 4 MB of short stories, 25 MB of web pages
OWN_FILES = re.compile(r"(dataset|manifest|plan|tokenizer|piece-\d+)\.json|piece-\d+\.seen|(train|val)-\d+\.tokens")


Write = Callable[[Plan, Source, Progress], list[Tree]]
"""What writes all pieces of a set, and returns what piece-*.json says of each."""


def prepare(
    config: DataConfig,
    *,
    progress: Progress,
    root: Path = Path("data"),
    exact: bool = False,
    write: Write = write_pieces,
) -> Path:
    """Makes the data set that `config` describes, or finds it finished, and returns its folder.

    The folder is `config.dir`, else root/NAME-FINGERPRINT. A finished set in `config.dir` is used as it is, whatever
    source the config names, and `progress` is told where they differ; with `exact` that is refused.

    Args:
        config: source, tokenizer, split and piece size.
        progress: called with one line for people, a few times a minute.
        root: where folders go that have no name of their own.
        exact: whether a set that stands in the folder, finished or not, must be the one that `config` describes.
        write: is given the folder with its plan to oneself; a training run lets the pieces come and go (feeder.py).

    Raises:
        DataError: a source or tokenizer that is refused, no text, or a folder that holds something else.
        OSError: the disk refused; the next call goes on.
    """
    progress = _inert(progress)
    named = Path(config.dir) if config.dir else None
    if named and not exact and is_finished(named):
        use_as_it_is(named, config, progress)
        _tidy(named, progress)
        return named
    tokenizer = _given_tokenizer(config)
    source, folder = _open(config, tokenizer, root, progress)
    if source.remote:
        source = Remembering(source, REMEMBERED_CHARS)  # a survey reads them, and then the first piece
    if source.remote and not named and is_finished(folder):
        _tidy(folder, progress)
        return folder
    inputs = _inputs(config, source, tokenizer)
    if exact:
        check_same(folder, inputs)
    if not is_finished(folder):
        check_ours(folder)
        with _alone(folder, progress):
            if exact:
                check_same(folder, inputs)
            if not is_finished(folder):
                _make(folder, inputs, source, tokenizer, config, progress, write)
            elif named and not exact:
                use_as_it_is(folder, config, progress)
    _tidy(folder, progress)
    return folder


def find_prepared(config: DataConfig, root: Path = Path("data")) -> Path | None:
    """The finished set that `prepare` would find; None where it would have to make one. Nothing is read of the text.

    Raises:
        DataError: a source or tokenizer that is refused.
    """
    if config.dir:
        folder = Path(config.dir)
    else:
        source = open_source(config.source)
        if source.remote and not any(root.glob(f"{source.name}-*")):
            return None  # before a tokenizer is looked for, which may be on the Hub, too
        _, folder = _open(config, _given_tokenizer(config), root, progress=lambda line: None)
    return folder if is_finished(folder) else None


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """None for one that is still to be trained."""
    return None if bpe_size(config.tokenizer) else load_tokenizer(config.tokenizer)


def _open(config: DataConfig, tokenizer: Tokenizer | None, root: Path, progress: Progress) -> tuple[Source, Path]:
    """The source, and the folder of its set.

    A source on a network is what it was when the folder was begun: what is recorded there pins it. So the folder is
    named after what the user wrote, not after what the Hub has today, and a set that is finished is found without it.
    """
    source = open_source(config.source, say=progress)
    if source.remote is None:
        return source, Path(config.dir) if config.dir else _own_folder(root, source, _inputs(config, source, tokenizer))
    unpinned = _inputs_of(config, {"spec": config.source, "fingerprint": None}, tokenizer)
    folder = Path(config.dir) if config.dir else _own_folder(root, source, unpinned)
    record = {} if not config.dir and is_finished(folder) else _recorded_source(folder)
    if record.get("spec") == config.source and isinstance(record.get("revision"), str):
        source = open_source(config.source, record=record, say=progress)
    return source, folder


def _recorded_source(folder: Path) -> Tree:
    """What a set, finished or not, says of its source."""
    if is_finished(folder):
        tree: Tree | None = open_dataset(folder).info
    else:
        plan = unsealed(folder / PLAN_FILE, PLAN)
        tree = plan["inputs"] if plan else None
    return dict(tree["source"]) if tree else {}


def _own_folder(root: Path, source: Source, inputs: Tree) -> Path:
    return root / f"{source.name}-{hash_of(inputs)[:12]}"


def _inert(progress: Progress) -> Progress:
    """What is said may quote a folder that others made: a set's names, or who holds its lock."""
    return lambda line: progress(one_line(line))


@contextlib.contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """The folder to oneself, without what stopped processes left half-written in it."""
    make_folder(folder)
    with Lock(folder, LOCK_FILE, lambda holder: progress(f"waiting for {holder}, which prepares {folder}")):
        sweep(folder, OWN_FILES)
        try:
            yield
        finally:
            if is_finished(folder) or names_in(folder) == {LOCK_FILE}:
                remove_file(folder / LOCK_FILE)


def _make(
    folder: Path,
    inputs: Tree,
    source: Source,
    tokenizer: Tokenizer | None,
    config: DataConfig,
    progress: Progress,
    write: Write,
) -> None:
    """All five steps, or those that are left."""
    plan = read_plan(folder, inputs) or _make_plan(folder, inputs, source, tokenizer, config, progress)
    try:
        pieces = write(plan, source, progress)
    except Unfetched as error:  # the plan and the pieces are there
        raise DataError(f"{error}, it goes on where it stopped") from None
    if source.fingerprint() != inputs["source"]["fingerprint"]:
        _clear(folder)
        raise DataError(f"source {config.source!r} changed while it was read; run the command again")
    _finish(plan, pieces)
    for line in in_words(_left_out(pieces)):
        progress(line)
    progress(f"data set ready: {folder}")


def _inputs(config: DataConfig, source: Source, tokenizer: Tokenizer | None) -> Tree:
    """Everything that the bytes of a data set follow from; a tokenizer still to be trained follows from the rest."""
    pin = source.remote.pin if source.remote else {}
    return _inputs_of(config, {"spec": config.source, "fingerprint": source.fingerprint(), **pin}, tokenizer)


def _inputs_of(config: DataConfig, source: Tree, tokenizer: Tokenizer | None) -> Tree:
    return {
        "schema": SCHEMA,
        "source": source,
        "tokenizer": {"spec": config.tokenizer, "fingerprint": tokenizer.fingerprint if tokenizer else None},
        "val_fraction": config.val_fraction,
        "piece_documents": config.piece_documents,
        **_limit(config.max_documents, selection_tree(config)),
    }


def _limit(max_documents: int, selection: Tree) -> Tree:
    """Nothing for a source that is taken whole, as all were before there was a choice."""
    return ({"max_documents": max_documents} if max_documents else {}) | ({"selection": selection} if selection else {})


def _working_files(folder: Path) -> list[Path]:
    """What is in a folder while it is worked in, the lock last."""
    return [path for name in (PIECE_FILES, SEEN_FILES, PLAN_FILE, LOCK_FILE) for path in sorted(folder.glob(name))]


def _remove_working_files(folder: Path) -> None:
    """All but the lock, which is held and goes when it is let go."""
    for path in _working_files(folder)[:-1]:
        remove_file(path)


def _tidy(folder: Path, progress: Progress) -> None:
    """Ends the work of a process that was stopped after the manifest, in a folder that may be written to."""
    if _working_files(folder):
        with contextlib.suppress(OSError), _alone(folder, progress):
            _remove_working_files(folder)


# --- the plan


def _make_plan(
    folder: Path, inputs: Tree, source: Source, tokenizer: Tokenizer | None, config: DataConfig, progress: Progress
) -> Plan:
    progress(f"reading {config.source}")
    _clear(folder)
    chosen = inputs.get("selection", {})
    counted, left_out = _surveyed(source, config, Selection(chosen))
    surveyed = f"{counted.documents:,} documents, {counted.text_bytes / 1e6:,.1f} MB{left_out}"
    if counted.whole:
        _check_number_of_pieces(counted.documents, config.piece_documents)
        progress(f"{surveyed}; {counted.split.words()}")
    else:
        assert source.remote is not None
        about, rough = source.remote.outlook(counted.documents)
        progress(f"the first {surveyed}, of about {about:,} (an estimate); {counted.split.words()}")
        if words := memory_in_words(chosen, min(about, config.max_documents or about)):
            progress(words)
        if words := _outlook(min(about, config.max_documents or about), config.piece_documents):
            if not rough:
                raise DataError(words)
            progress(f"{words}; the files hold more than the text, so it may be far fewer")
    if size := bpe_size(config.tokenizer):
        progress(
            f"training a tokenizer of {size:,} tokens on the training documents"
            + ("" if counted.whole else f" of the first {counted.documents:,}")
        )
        limit = config.max_documents if counted.whole else counted.documents
        tokenizer = train_tokenizer(_training_texts(source, limit, Selection(chosen), counted.split), size)
    assert tokenizer is not None
    entry = write_file(folder / TOKENIZER_FILE, tokenizer.to_json().encode())
    tree = _plan_tree(inputs, counted, source, tokenizer, entry)
    write_file(folder / PLAN_FILE, sealed(tree))
    return Plan(folder, tree, tokenizer)


def _surveyed(source: Source, config: DataConfig, selection: Selection) -> tuple[Survey, str]:
    """What the documents are that are not left out, and how many are, in words."""
    texts = (selection.text(*item) for item in numbered(source, config.max_documents))
    counted = survey(texts, config.val_fraction, ENOUGH_DOCUMENTS if source.remote else None)
    dropped = selection.take()
    left_out = sum(count["documents"] for count in dropped.values())
    if counted.text_bytes == 0:
        empty = f"source {config.source!r} holds no text ({counted.documents - left_out} empty documents"
        raise DataError("; ".join([empty, *in_words(dropped)]) + ")")
    return counted, f" without {left_out:,} that are left out" if dropped else ""


def _check_number_of_pieces(documents: int, piece_documents: int) -> None:
    if -(-documents // piece_documents) > MAX_PIECES:
        raise DataError(
            f"piece_documents {piece_documents:,} makes more than {MAX_PIECES:,} pieces of {documents:,} documents; "
            f"take {-(-documents // MAX_PIECES)} or more"
        )


def _outlook(about: int, piece_documents: int) -> str:
    """Says before hours of work what can not be finished. An estimate that is twice too high says nothing."""
    if about > 2 * MAX_PIECES * piece_documents:
        most = MAX_PIECES * piece_documents
        return (
            f"piece_documents {piece_documents:,} makes more than {MAX_PIECES:,} pieces of about {about:,} documents "
            f"(an estimate); take {-(-about // MAX_PIECES):,} or more, or max_documents {most:,}"
        )
    return ""


def _plan_tree(inputs: Tree, counted: Survey, source: Source, tokenizer: Tokenizer, entry: Entry) -> Tree:
    return {
        "inputs": inputs,
        "attempt": 0,
        "documents": counted.documents if counted.whole else None,
        "text_bytes": counted.text_bytes,
        "split": counted.split.tree(),
        "dropped": dict(source.dropped),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "end_token": tokenizer.end_token} | entry,
    }


def _training_texts(source: Source, limit: int, selection: Selection, split: Split) -> Iterator[str]:
    documents = numbered(source, limit)
    return (split.parts(item[0], selection.text(*item))[0] for item in documents)


def _clear(folder: Path) -> None:
    """Removes what an earlier plan left, dataset.json first: without its plan it would be that of a finished set."""
    for pattern in (DATASET_FILE, PLAN_FILE, TOKENIZER_FILE, PIECE_FILES, SEEN_FILES, "train-*.tokens", "val-*.tokens"):
        for path in folder.glob(pattern):
            remove_file(path)


# --- the finished set


def _finish(plan: Plan, pieces: list[Tree]) -> None:
    """Writes what the set is, and the manifest with the hashes of what was written, not of what is on the disk now."""
    shards = [shard for piece in pieces for split in ("train", "val") if (shard := piece[split])]
    files = {shard["name"]: file_of(shard) for shard in shards}
    files[TOKENIZER_FILE] = file_of(plan.tree["tokenizer"])
    files[DATASET_FILE] = write_file(plan.folder / DATASET_FILE, json_bytes(dataset_info(plan, pieces)))
    write_manifest(plan.folder, files)
    _remove_working_files(plan.folder)


def dataset_info(plan: Plan, pieces: Sequence[Tree]) -> Tree:
    """dataset.json. It holds no clock and no path but what the user wrote."""
    tokenizer, empty = plan.tokenizer, sum(piece["empty_documents"] for piece in pieces)
    return {
        "schema": SCHEMA,
        "source": plan.tree["inputs"]["source"],
        "tokenizer": {
            "spec": plan.tree["inputs"]["tokenizer"]["spec"],
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_token": tokenizer.end_token,
            "end_id": tokenizer.end_id,
        },
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "split": plan.tree["split"] | {"words": plan.split.words()},
        "piece_documents": plan.piece_documents,
        **_limit(plan.max_documents, plan.selection),
        "dropped": plan.tree["dropped"] | {"empty_documents": empty} | _left_out(pieces),
        "train": _split_entry(piece["train"] for piece in pieces),
        "val": _split_entry(piece["val"] for piece in pieces),
    }


def _left_out(pieces: Sequence[Tree]) -> Tree:
    return added_up(piece.get("dropped", {}) for piece in pieces)


def _split_entry(shards: Iterable[Tree | None]) -> Tree:
    own = [{name: shard[name] for name in ("name", *COUNTS)} for shard in shards if shard]
    return {name: sum(shard[name] for shard in own) for name in COUNTS} | {"shards": own}
