"""Text on the Hub: which files a name means, and what is read of them. The server is tests/stand_in.py."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocketlm.config import DataConfig
from pocketlm.data.prepare import find_prepared, prepare
from pocketlm.data.shards import open_dataset
from pocketlm.data.split import is_validation, survey
from pocketlm.errors import DataError
from pocketlm.text import documents, hub, hub_requests
from pocketlm.text.documents import Place
from pocketlm.text.hub_names import Address, configs_of, held_out, kind, pattern_regex
from pocketlm.text.sources import Source, open_source
from stand_in import StandIn, standing_in

TEXTS = [f"document {number}: " + "the quick brown fox \U0001f98a " * (number % 7 * 5 + 1) for number in range(500)]


def silent(line: str) -> None:
    pass


def parquet(texts: list[str], rows: int = 100, **columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"id": [f"<{number}>" for number in range(len(texts))], "text": texts} | columns)
    pq.write_table(table, sink, row_group_size=rows, compression="zstd")
    return sink.getvalue()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(hub, "PATIENCE", hub.Patience(delays_s=()))  # here nothing fails that may pass
    with standing_in() as stand_in:
        yield stand_in


def texts_of(spec: str, start: Place = documents.BEGINNING) -> list[str]:
    return [document.text for document in open_source(spec).documents(start)]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_the_client_has_what_is_imported_of_it() -> None:
    """parse_ratelimit_headers came with 1.2."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [least] = [line for line in project["dependencies"] if line.startswith("huggingface_hub")]
    assert least == "huggingface_hub>=1.2"


# --- what a name means


@pytest.mark.parametrize(
    ("spec", "expected", "name"),
    [
        ("hf:a/b", ("a/b", None, None), "b"),
        ("hf:HuggingFaceFW/fineweb/sample-10BT", ("HuggingFaceFW/fineweb", "sample-10BT", None), "fineweb-sample-10bt"),
        ("hf:a/b@v1.0", ("a/b", None, "v1.0"), "b"),
        ("hf:a/B.c/x/y@refs/pr/1", ("a/B.c", "x/y", "refs/pr/1"), "b-c-x-y"),
    ],
)
def test_a_spec_is_taken_apart(spec: str, expected: tuple[str, str | None, str | None], name: str) -> None:
    address = Address.parse(spec)
    assert (address.repo, address.config, address.revision) == expected
    assert address.name == name


@pytest.mark.parametrize("spec", ["hf:", "hf:a", "hf:/b", "hf:a/b@", "hf:a b/c", "hf:a/../c@x y"])
def test_a_spec_of_another_form_is_refused(spec: str) -> None:
    assert "hf:OWNER/NAME[/CONFIG][@REVISION]" in refusal(lambda: open_source(spec))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("sample/10BT/*", ["sample/10BT/000_0.parquet"], ["sample/10BT/a/b", "sample/100BT/a", "xsample/10BT/a"]),
        ("data/*/*", ["data/a/b"], ["data/a", "data/a/b/c"]),
        ("**", ["a", "a/b"], []),
        ("a/**/t-*.txt", ["a/t-1.txt", "a/b/c/t-.txt"], ["a/t-1xtxt", "t-1.txt"]),
        ("train-?????-of-[0-9]*[!x]", ["train-00001-of-7z"], ["train-1-of-7z", "train-00001-of-7x"]),
        ("a+(b).txt", ["a+(b).txt"], ["aab.txt"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    regex = pattern_regex(pattern)
    assert [path for path in yes + no if regex.fullmatch(path)] == yes


@pytest.mark.parametrize(
    ("entry", "patterns"),
    [
        ({"data_files": "a.csv"}, ["a.csv"]),
        ({"data_files": ["a.csv", "./b/*"]}, ["a.csv", "b/*"]),
        ({"data_files": [{"split": "train", "path": "t-*"}, {"split": "test", "path": "e-*"}]}, ["t-*"]),
        ({"data_files": [{"split": "train", "path": ["x", "y"]}]}, ["x", "y"]),
        ({"data_files": {"train": "t", "test": "e"}}, ["t"]),
        ({"data_dir": "some/where/"}, "some/where"),
        ({}, ""),
        ({"data_dir": "d", "data_files": "*.parquet"}, ["d/*.parquet"]),
        ({"data_files": [{"split": "other", "path": "o"}]}, []),
        ({"data_files": [7, None, {"split": "train"}]}, []),
    ],
)
def test_a_card_gives_patterns_in_many_forms(entry: dict[str, Any], patterns: list[str] | str) -> None:
    assert configs_of([{"config_name": "c", **entry}])["c"] == patterns


def test_the_default_config() -> None:
    one, two = ({"config_name": name, "data_files": f"{name}/*"} for name in ("one", "two"))
    assert configs_of([one]) == {"default": ["one/*"], "one": ["one/*"]}
    assert configs_of([one, two]) == {"one": ["one/*"], "two": ["two/*"]}
    assert configs_of([one, two | {"default": True}])["default"] == ["two/*"]
    for nonsense in (None, 7, "x", [7], [{}], [{"config_name": 7}]):
        assert configs_of(nonsense) == {}


def test_kinds_and_splits_of_paths() -> None:
    paths = ["a.parquet", "a.PARQUET", "b.jsonl.gz", "b.jsonl.zst", "c.json", "d.txt", "d.txt.gz"]
    assert [kind(path) for path in paths] == [".parquet"] * 2 + [".jsonl"] * 2 + [".json"] + [".txt"] * 2
    assert {kind(path) for path in ("README.md", "a.csv", ".git/a.txt", "_b.json", "a.parquet.gz", "plain", "")} == {""}
    assert {kind(f"{folder}{name}.json") for folder in ("", "a/") for name in NO_ROWS} == {""}
    assert kind("my-config.json") == ".json"
    assert all(map(held_out, ("test.jsonl", "data/validation-00000.parquet", "x/dev/a.txt", "TinyStories-valid.txt")))
    assert all(map(held_out, ("testing.jsonl", "data/evaluation/a.txt")))
    assert not any(map(held_out, ("train.jsonl", "data/latest.txt", "devices/a.txt", "evaluations.json")))


NO_ROWS = ("config", "dataset_info", "dataset_infos", "dataset_dict")
CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
    ]
}


def test_a_config_of_the_card_as_fineweb_has_it(server: StandIn) -> None:
    files = {f"data/CC-{number}/0.parquet": parquet(TEXTS[number : number + 1]) for number in range(9)}
    files |= {"sample/10BT/001.parquet": parquet(TEXTS[20:30]), "sample/10BT/000.parquet": parquet(TEXTS[10:20])}
    files |= {"sample/100BT/000.parquet": parquet(["another"]), "README.md": b"# a card"}
    repository = server.add("someone/web", files, CARD)
    assert texts_of("hf:someone/web/sample-10BT") == TEXTS[10:30]
    assert [request.path for request in server.asked("tree")] == ["sample/10BT"], "other folders are not listed"
    assert texts_of("hf:someone/web") == TEXTS[:9], "three pages of the tree"
    assert texts_of(f"hf:someone/web/default@{repository.main}") == TEXTS[:9]
    wrong = refusal(lambda: texts_of("hf:someone/web/sample-10B"))
    assert "did you mean sample-10BT?; there are default, sample-10BT" in wrong


def test_without_a_card_a_config_is_a_folder(server: StandIn) -> None:
    files = {"en/train.jsonl": jsonl(TEXTS[:3]), "en/test.jsonl": jsonl(["held out"]), "fr/a/b.jsonl": jsonl(["deux"])}
    server.add("someone/plain", files)
    assert texts_of("hf:someone/plain/en") == TEXTS[:3]
    assert texts_of("hf:someone/plain/fr") == ["deux"]
    assert texts_of("hf:someone/plain") == [*TEXTS[:3], "deux"]
    assert "did you mean en?; there are en, fr/a" in refusal(lambda: texts_of("hf:someone/plain/enn"))


def test_a_config_that_lists_no_files_is_read_as_a_folder(server: StandIn) -> None:
    """Training text of one kind: neither what is held out, nor a second copy, nor what describes the data set."""
    files = {"d/train.jsonl": jsonl(TEXTS[:3]), "d/testing.jsonl": jsonl(["held out"]), "d/copy.txt": b"again"}
    files |= {"d/dataset_info.json": b'{"citation": "c"}', "d/evaluation/a.jsonl": jsonl(["held out"])}
    files |= {"more.jsonl": jsonl(TEXTS[3:5]), "test.jsonl": jsonl(["held out"]), "config.json": b"{}"}
    configs = [{"config_name": "d", "data_dir": "d"}, {"config_name": "all"}, {"config_name": "n", "data_dir": "no"}]
    server.add("someone/brief", files, {"configs": configs})
    assert texts_of("hf:someone/brief/d") == TEXTS[:3]
    assert texts_of("hf:someone/brief/all") == TEXTS[:5]
    assert "none of its files is training text in no and ends in" in refusal(lambda: texts_of("hf:someone/brief/n"))
    server.add("someone/held", {"test.jsonl": jsonl(["held out"])}, {"configs": [{"config_name": "all"}]})
    assert "none of its files is training text in it and ends in" in refusal(lambda: texts_of("hf:someone/held"))


def test_names_that_a_url_must_quote(server: StandIn) -> None:
    name = "my texts/50%/\u00e9t\u00e9 #1?.txt"
    card = {"configs": [{"config_name": "default", "data_files": "my texts/50%/*"}]}
    server.add("someone/odd", {name: b"odd", "my texts/50%25/x.txt": b"other"}, card)
    assert texts_of("hf:someone/odd") == ["odd"]
    server.add("someone/odd", {name: b"odd"})
    assert texts_of("hf:someone/odd/my texts") == ["odd"]


def test_of_several_kinds_the_first_is_taken(server: StandIn) -> None:
    files = {"all.txt": b"plain", "data/train-0.parquet": parquet(TEXTS[:5]), "data/validation-0.parquet": b"x"}
    server.add("roneneldan/TinyStories", files)
    assert texts_of("hf:roneneldan/TinyStories") == TEXTS[:5]


def test_every_kind_is_read_as_it_is_locally(server: StandIn, tmp_path: Path) -> None:
    files = {
        "a.parquet": parquet(TEXTS, 70),
        "b.jsonl": jsonl(TEXTS[:60]),
        "c.jsonl.gz": gzip.compress(jsonl(TEXTS[:50])),
        "d.jsonl.zst": pa.compress(jsonl(TEXTS[:40]), codec="zstd", asbytes=True),
        "e.json": jsonl(TEXTS[:30]),
        "f.json": json.dumps(TEXTS[:20]).encode(),
        "g.txt": b"one\n<|endoftext|>\ntwo",
        "h.txt.gz": gzip.compress(b"packed"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        card = {"configs": [{"config_name": "default", "data_files": name}]}
        server.add("someone/kinds", files, card)
        assert texts_of("hf:someone/kinds") == texts_of(f"files:{tmp_path}/{name}"), name


# --- what is read


def rows_of(group: Any) -> Any:
    """The column chunk of the text."""
    return next(chunk for chunk in map(group.column, range(group.num_columns)) if chunk.path_in_schema == "text")


def test_of_parquet_only_the_footer_and_the_texts_are_fetched(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group, larger than a block: the requests are bounded and their sum is that of the column."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 50_000)
    monkeypatch.setattr(hub_requests, "BLOCK_BYTES", 50_000)
    draw = random.Random(0)
    words, noise = ([draw.randbytes(size).hex() for _ in range(3000)] for size in (90, 60))
    data = parquet(words, 3000, noise=noise)
    server.add("someone/large", {"train.parquet": data})
    assert len(texts_of("hf:someone/large")) == 3000
    [group] = [pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)]
    assert server.sent["train.parquet"] == 65_536 + rows_of(group).total_compressed_size < len(data)
    sizes = [int(one.range.split("-")[1]) - int(one.range[6:].split("-")[0]) + 1 for one in server.asked("content")]
    assert len(sizes) > 4
    assert server.connections == 2, "one to the Hub, one to where it redirects"
    assert max(sizes[1:]) <= 50_000


def test_reading_begins_at_any_row_group(server: StandIn) -> None:
    first, second = parquet(TEXTS[:250], 100), parquet(TEXTS[250:], 100)
    server.add("someone/groups", {"0.parquet": first, "1.parquet": second, "2.jsonl": b""})
    source = open_source("hf:someone/groups")
    places = [document.place for document in source.documents()]
    assert places[0] == Place(0, 0, 0)
    assert places[249:251] == [Place(0, 2, 49), Place(1, 0, 0)]
    for number in (0, 99, 100, 250, 371, 499):
        assert [one.text for one in source.documents(places[number])] == TEXTS[number:], number
    server.forget()
    rest = list(source.documents(Place(1, 1, 100)))
    assert (rest[0].text, rest[0].name) == (TEXTS[450], "someone/groups/1.parquet row 200")
    meta = pq.ParquetFile(io.BytesIO(second)).metadata
    footer = min(65_536, len(second))
    assert server.sent == {"1.parquet": footer + rows_of(meta.row_group(2)).total_compressed_size}


def test_local_files_begin_at_a_place_too(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_bytes(jsonl(TEXTS[:10]))
    (tmp_path / "1.parquet").write_bytes(parquet(TEXTS[10:40], 7))
    for source in (open_source(f"files:{tmp_path}"), open_source("synthetic")):
        every = list(source.documents())
        assert len({document.place for document in every}) == len(every)
        for number in (0, 5, 10, 17, 39):
            assert list(source.documents(every[number].place)) == every[number:]


def test_no_text_column_names_those_there_are(server: StandIn) -> None:
    table = pa.table({"prompt": ["a"], "answer": ["b"], "score": [1]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    server.add("someone/else", {"train.parquet": sink.getvalue()})
    message = refusal(lambda: texts_of("hf:someone/else"))
    assert message.startswith("someone/else/train.parquet: which column is the text? there are prompt, answer, score")


def test_damage_is_refused_by_its_name(server: StandIn) -> None:
    server.add("someone/bad", {"a.parquet": b"PAR1 no parquet PAR1"})
    assert "cannot read someone/bad/a.parquet: " in refusal(lambda: texts_of("hf:someone/bad"))
    server.add("someone/worse", {"a.jsonl": b'{"text": "a"}\n{"text": \n'})
    assert "someone/worse/a.jsonl:2 is no JSON" in refusal(lambda: texts_of("hf:someone/worse"))


# --- who is asked, and with which token


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("someone/gated", {"large.jsonl": jsonl(TEXTS), "small.jsonl": jsonl(["s"])}).gated = True
    message = refusal(lambda: texts_of("hf:someone/gated"))
    assert "is gated; accept its terms at http://127.0.0.1" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.repositories["someone/gated"].gated = False
    server.forget()
    assert texts_of("hf:someone/gated") == [*TEXTS, "s"]
    tokens = {request.kind: request.token for request in server.requests}
    assert tokens == {
        "info": "Bearer hf_secret",
        "tree": "Bearer hf_secret",
        "resolve": "Bearer hf_secret",
        "content": "",
    }


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf:no/where", "/datasets/no/where is not there, or is private; correct the name, or give a token"),
        ("hf:someone/texts@v9", "someone/texts has no revision 'v9'"),
        ("hf:someone/texts/en", "has no configs; leave out /en"),
        ("hf:someone/tables", "has no file that ends in one of .parquet, .jsonl, .json, .txt"),
        ("hf:someone/cards", "none of its files is gone/*"),
        ("hf:someone/splits", "none of its files is in a train split"),
        ("hf:someone/two", "has several configs; there are a, b"),
        ("hf:some--one/two", "form is hf:OWNER/NAME"),
    ],
)
def test_what_is_not_there_is_one_line(server: StandIn, spec: str, words: str) -> None:
    server.add("someone/texts", {"a.txt": b"a"})
    server.add("someone/tables", {"a.csv": b"a"})
    server.add("someone/cards", {"a.txt": b"a"}, {"configs": [{"config_name": "default", "data_files": "gone/*"}]})
    tested = [{"split": "test", "path": "*"}]
    server.add("someone/splits", {"a.txt": b"a"}, {"configs": [{"config_name": "x", "data_files": tested}]})
    two = [{"config_name": name, "data_files": f"{name}/*"} for name in "ab"]
    server.add("someone/two", {"a/a.txt": b"a"}, {"configs": two})
    message = refusal(lambda: texts_of(spec))
    assert words in message
    assert spec in message


# --- preparing


def config(source: str, **changes: Any) -> DataConfig:
    return DataConfig(source=source, tokenizer="byte", val_fraction=0.1, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".tokens")}


def pinned(source: Source) -> str:
    assert source.remote
    return source.remote.pin["revision"]


@pytest.mark.parametrize("rows", [50, 77, 500])
def test_the_tokens_are_those_of_the_same_local_files(server: StandIn, tmp_path: Path, rows: int) -> None:
    local = tmp_path / "text"
    local.mkdir()
    files = {"0.parquet": parquet(TEXTS[:300], rows), "1.parquet": parquet(TEXTS[300:], rows)}
    for name, data in files.items():
        (local / name).write_bytes(data)
    repository = server.add("someone/texts", files)
    here = prepare(config(f"files:{local}", piece_documents=100, dir=str(tmp_path / "a")), progress=silent)
    there = prepare(config("hf:someone/texts", piece_documents=100, dir=str(tmp_path / "b")), progress=silent)
    assert len(shards(there)) == 10
    assert shards(here) == shards(there)
    source = open_dataset(there).info["source"]
    assert source["spec"] == "hf:someone/texts"
    assert source["revision"] == repository.main == pinned(open_source("hf:someone/texts", record=source))


def times_asked(server: StandIn) -> Counter[tuple[str, str]]:
    """How often each range of a file was asked for."""
    return Counter((request.path, request.range) for request in server.asked("resolve"))


def test_no_text_is_fetched_twice(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first documents choose the split, and are kept: the bytes are those that a survey of everything leads to."""
    monkeypatch.setattr("pocketlm.data.split.ENOUGH_BYTES", 500)
    files = {f"{number}.parquet": parquet(TEXTS[number * 100 :][:100]) for number in range(5)}
    server.add("someone/texts", files)
    whole = prepare(config("hf:someone/texts", piece_documents=100, dir=str(tmp_path / "a")), progress=silent)
    assert {*times_asked(server).values()} == {1}
    server.forget()
    monkeypatch.setattr("pocketlm.data.prepare.ENOUGH_DOCUMENTS", 100)
    said: list[str] = []
    once = prepare(config("hf:someone/texts", piece_documents=100, dir=str(tmp_path / "b")), progress=said.append)
    [footer] = [one for one, times in times_asked(server).items() if times > 1]
    assert footer == ("0.parquet", server.asked("resolve")[0].range)
    assert contents(whole) == contents(once)
    [line] = [line for line in said if line.startswith("the first 100 documents, ")]
    assert re.search(r" of about [1-9]\d\d \(an estimate\); validation is every document", line), line
    assert "500 documents read" in said[-2]
    assert "MB fetched; 5 files have" in said[-2]


@pytest.fixture
def few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A survey of 50 documents says enough, and a set has at most 10 pieces."""
    monkeypatch.setattr("pocketlm.data.split.ENOUGH_BYTES", 500)
    monkeypatch.setattr("pocketlm.data.prepare.ENOUGH_DOCUMENTS", 50)
    monkeypatch.setattr("pocketlm.data.prepare.MAX_PIECES", 10)
    monkeypatch.setattr("pocketlm.data.pieces.MAX_PIECES", 10)


@pytest.mark.usefixtures("few_pieces")
def test_far_too_many_pieces_are_refused_before_the_work(server: StandIn, tmp_path: Path) -> None:
    server.add("someone/texts", {f"{number}.jsonl": jsonl(TEXTS[:100]) for number in range(9)})
    data = config("hf:someone/texts", piece_documents=5)
    message = refusal(lambda: prepare(data, progress=silent, root=tmp_path))
    assert re.match(r"piece_documents 5 makes more than 10 pieces of about \d+ documents \(an estimate\); ", message)
    assert {request.path for request in server.asked("resolve")} == {"0.jsonl"}
    some = data.model_copy(update={"max_documents": 50})
    assert open_dataset(prepare(some, progress=silent, root=tmp_path)).info["max_documents"] == 50
    wrong = data.model_copy(update={"piece_documents": 60})
    message = refusal(lambda: prepare(wrong, progress=silent, root=tmp_path))
    assert "the source goes on after 600 documents, 10 pieces of 60; give a larger piece_documents" in message


@pytest.mark.usefixtures("few_pieces")
def test_an_estimate_from_one_column_refuses_nothing(server: StandIn, tmp_path: Path) -> None:
    """Of Parquet the other columns are not fetched, and nobody knows how large they are."""
    noise = [random.Random(number).randbytes(20_000) for number in range(99)]
    server.add("someone/wide", {"0.parquet": parquet(TEXTS[:99], 50, noise=noise)})
    said: list[str] = []
    folder = prepare(config("hf:someone/wide", piece_documents=10), progress=said.append, root=tmp_path)
    assert len([name for name in shards(folder) if name.startswith("train")]) == 10
    [line] = [line for line in said if line.startswith("piece_documents 10 makes more than 10 pieces of about ")]
    assert line.endswith("the files hold more than the text, so it may be far fewer")


def test_the_split_is_chosen_as_soon_as_the_documents_allow() -> None:
    """The hash rule is asked at 50 documents and at each doubling, until it holds."""
    asked: list[int] = []

    def texts() -> Iterator[str]:
        for number, text in enumerate(TEXTS, 1):
            asked.append(number)
            yield text

    held_out_bytes = [len(text.encode()) * is_validation(text, 0.1) for text in TEXTS]
    sums = [sum(held_out_bytes[:number]) for number in range(len(TEXTS) + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketlm.data.split.ENOUGH_BYTES", sums[150])
        patch.setattr("pocketlm.data.split.LARGEST_SHARE", 0.5)
        counted = survey(texts(), 0.1, 50)
    assert (counted.documents, counted.whole, counted.split.kind) == (200, False, "hash")
    assert asked[-1] == 200


def test_a_finished_set_is_found_without_the_hub(server: StandIn, tmp_path: Path) -> None:
    repository = server.add("someone/texts", {"a.jsonl": jsonl(TEXTS)})
    for named in ({}, {"dir": str(tmp_path / "named")}):
        data = config("hf:someone/texts", **named)
        assert find_prepared(data, tmp_path / "data") is None
        folder = prepare(data, progress=silent, root=tmp_path / "data")
        before = contents(folder)
        repository.commit({"a.jsonl": jsonl(["something else"])})
        server.forget()
        assert find_prepared(data, tmp_path / "data") == folder
        for exact in (False, True):
            assert prepare(data, progress=silent, root=tmp_path / "data", exact=exact) == folder
        assert contents(folder) == before
        assert server.requests == []
        repository.commit({"a.jsonl": jsonl(TEXTS)})


def test_what_is_planned_asks_for_nothing(server: StandIn, tmp_path: Path) -> None:
    data = config("hf:HuggingFaceFW/fineweb/sample-10BT").model_copy(update={"tokenizer": "someone/model"})
    assert find_prepared(data, tmp_path) is None
    assert server.requests == []


def test_a_revision_is_part_of_what_a_set_is(server: StandIn, tmp_path: Path) -> None:
    repository = server.add("someone/texts", {"a.jsonl": jsonl(TEXTS)})
    first = repository.main
    repository.commit({"a.jsonl": jsonl(TEXTS[::-1])})
    folders = [
        prepare(config(f"hf:someone/texts@{revision}"), progress=silent, root=tmp_path) for revision in (first, "main")
    ]
    assert folders[0] != folders[1]
    assert shards(folders[0]) != shards(folders[1])
    with pytest.raises(DataError, match="holds another data set"):
        prepare(config("hf:someone/texts", dir=str(folders[0])), progress=silent, exact=True)


# --- the first documents of a source


def test_max_documents_is_the_first_ones_in_the_same_pieces(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketlm.data.split.ENOUGH_BYTES", 500)
    server.add("someone/texts", {"a.parquet": parquet(TEXTS, 100), "b.parquet": parquet(TEXTS, 100)})
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS, 100))
    for source in ("hf:someone/texts", f"files:{tmp_path}/a.parquet"):
        whole = prepare(config(source, piece_documents=100), progress=silent, root=tmp_path)
        server.forget()
        some = prepare(config(source, piece_documents=100, max_documents=250), progress=silent, root=tmp_path)
        assert some != whole
        assert {one.path for one in server.asked("content")} <= {"a.parquet"}
        few, many = (open_dataset(folder) for folder in (some, whole))
        assert few.info["max_documents"] == 250
        assert "max_documents" not in many.info
        assert few.info["train"]["documents"] + few.info["val"]["documents"] == 250
        for name in ("train-00000.tokens", "train-00001.tokens"):
            assert (some / name).read_bytes() == (whole / name).read_bytes()
        again = config(source, piece_documents=100, max_documents=251, dir=str(some))
        assert "max_documents: 251, 250" in refusal(lambda again=again: prepare(again, progress=silent, exact=True))
        said: list[str] = []
        assert prepare(again, progress=said.append) == some
        assert "its max_documents is 250, not 251" in said[0]


def test_max_documents_beyond_the_end_is_all(tmp_path: Path) -> None:
    folders = [prepare(config("synthetic", max_documents=n), progress=silent, root=tmp_path) for n in (0, 400, 9999)]
    assert len({*folders}) == 3
    assert len({tuple(shards(folder).values()) for folder in folders}) == 1
