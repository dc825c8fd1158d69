"""Text sources: what they yield, in which order, and what they refuse."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocketlm.errors import DataError
from pocketlm.text.sources import is_library_source, open_source, stdlib_source


def texts(spec: str) -> list[str]:
    return [document.text for document in open_source(spec).documents()]


def refusal(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        texts(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- stdlib


def test_stdlib_is_this_pythons_own_library() -> None:
    source = open_source("stdlib")
    names = [document.name for document in source.documents()]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test" in name or name.startswith("encodings/")]
    assert sum(len(document.text.encode()) for document in source.documents()) > 5_000_000
    assert source.fingerprint() == open_source("stdlib").fingerprint()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("abc.py", True),
        ("html/parser.py", True),
        ("html/entities.py", False),
        ("stringprep.py", False),
        ("unittest/test/test_case.py", False),
        ("lib2to3/tests/data/py3_test_grammar.py", False),
        ("unittest/mock.py", True),
        ("encodings/cp1252.py", False),
        ("pydoc_data/topics.py", False),
        ("idlelib/editor.py", False),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", False),
        ("config-3.11-x86_64-linux-gnu/python-config.py", False),
        ("dist-packages/numpy/core.py", False),
        ("site-packages/numpy/core.py", False),
    ],
)
def test_stdlib_takes_hand_written_library_code(name: str, kept: bool) -> None:
    assert is_library_source(name) == kept


def test_stdlib_leaves_out_copies_and_other_encodings_and_counts_them(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_bytes(b"x = 1\n")
    (tmp_path / "a.py").write_bytes(b"x  =\t1")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    source = stdlib_source(tmp_path)
    assert [document.name for document in source.documents()] == ["a.py"]
    assert source.dropped == {"not_utf8": 1, "duplicates": 1}


def test_stdlib_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="files:GLOB"):
        stdlib_source(tmp_path)


# --- files: which ones, and in which order


def test_patterns_are_sorted_inside_and_kept_in_their_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/.hidden/d.txt", "image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"files:{tmp_path}") == ["a.txt", "b.txt", "sub/c.md"]
    assert texts(f"files:{tmp_path}/**/*.md,{tmp_path}/*.txt") == ["sub/c.md", "a.txt", "b.txt"]
    assert texts(f"files:{tmp_path}/b.txt,{tmp_path}") == ["b.txt", "a.txt", "sub/c.md"]


def test_a_name_with_a_comma_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "one, two.txt").write_text("both")
    assert texts(f"files:{tmp_path}/one, two.txt") == ["both"]


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = open_source(f"files:{tmp_path}").fingerprint()
    assert open_source(f"files:{tmp_path}").fingerprint() == before
    (tmp_path / "a.txt").write_text("three")
    assert open_source(f"files:{tmp_path}").fingerprint() != before


def test_folder_names_are_plain(tmp_path: Path) -> None:
    (tmp_path / "My Texts (new)").mkdir()
    (tmp_path / "My Texts (new)" / "a.jsonl.gz").write_bytes(gzip.compress(b'"x"\n'))
    assert open_source(f"files:{tmp_path}/My Texts (new)/*.gz").name == "my-texts-new"
    assert open_source(f"files:{tmp_path}/My Texts (new)/a.jsonl.gz").name == "a"


# --- files: what is in them


def test_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    text = "\u2028 line\x85 ends\r\n that split\x0b\x0c nothing \U0001f999\u0301\r\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert texts(f"files:{tmp_path}") == [text, text]


def test_a_line_that_is_endoftext_separates_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n<|endoftext|>\nthree\r\n<|endoftext|>\r\n not <|endoftext|>\nhere")
    assert texts(f"files:{tmp_path}/a.txt") == ["one\ntwo", "three", " not <|endoftext|>\nhere"]


def test_a_separator_at_the_end_begins_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n<|endoftext|>\n")
    assert texts(f"files:{tmp_path}/a.txt") == ["one"]


def test_lines_may_be_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.text.documents.CHUNK_BYTES", 3)
    rows = ["\u00e9" * 10, "", "b\nc", "d"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert texts(f"files:{tmp_path}/a.jsonl") == rows


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_rows_end_at_newlines_only(tmp_path: Path, suffix: str) -> None:
    rows = ["a\u2028b\x85c", "second\n", ""]
    data = "".join(json.dumps({"text": row, "id": 1}, ensure_ascii=False) + "\r\n\n" for row in rows).encode()
    with pa.output_stream(str(tmp_path / f"a.jsonl{suffix}"), compression="detect") as stream:
        stream.write(data)
    assert texts(f"files:{tmp_path}/a.jsonl{suffix}") == rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a", "content": "b"}, {"text": "c"}], ["a", "c"]),
        ([{"content": "a", "title": "b"}], ["a"]),
        ([{"story": "a", "id": 7}, {"story": None, "id": 8}], ["a", ""]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_the_text_column_is_found(tmp_path: Path, rows: list[object], expected: list[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(f"files:{tmp_path}") == expected * 2


def test_one_json_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "alone"}')
    assert texts(f"files:{tmp_path}") == ["alone"]


def test_parquet_rows_in_order_over_batches(tmp_path: Path) -> None:
    rows = [f"text {number} \U0001f999" for number in range(1000)]
    plain = pa.table({"id": list(range(1000)), "story": rows})
    pq.write_table(plain, tmp_path / "a.parquet", row_group_size=300)
    large = pa.table({"text": pa.array(rows, pa.large_string()), "title": rows})
    pq.write_table(large, tmp_path / "b.parquet")
    dictionary = pa.table({"text": pa.array(rows).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "c.parquet")
    assert texts(f"files:{tmp_path}") == rows * 3


def test_real_files_give_their_known_number_of_documents(shared: Path) -> None:
    assert len(texts(f"files:{shared}/text/tinystories-train.txt.gz")) == 11_929
    frozen = texts(f"files:{shared}/text/fineweb-sample-first100.parquet")
    assert len(frozen) == 100
    assert frozen == texts(f"files:{shared}/text/fineweb-sample.jsonl.gz")[:100]


# --- what is refused


def test_sources_that_are_not_there() -> None:
    assert "is not of the form hf:OWNER/NAME[/CONFIG][@REVISION]" in refusal("hf:fineweb")
    assert "allowed is stdlib" in refusal("wikipedia")
    assert "nothing matches 'no/such/*.txt'" in refusal("files:no/such/*.txt")
    assert "did you mean files:" in refusal(str(Path(__file__)))
    assert "nothing matches" in refusal("files:" + "long" * 1000)
    assert "allowed is" in refusal("files:")
    assert "allowed is" in refusal("synthetic:x")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"text\0text", "NUL byte at byte offset 4"),
        ("a.txt", b"\xef\xbb\xbfgood\n\xff\xfe", "not UTF-8 at byte offset 8"),
        ("a.txt", b"one\n<|endoftext|>\ntwo \xc3", "not UTF-8 at byte offset 22"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "not UTF-8 at byte offset 24"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "a.jsonl:3 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"other": "b"}', "a.jsonl:2 has no text in 'text'"),
        ("a.jsonl", b'{"title": "a", "body": "b"}', "which column is the text? there are title, body"),
        ("a.jsonl", b'{"text": 7}', "a.jsonl:1 has no text in 'text'"),
        ("a.jsonl", b"7", "a.jsonl:1 holds int"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1 holds half of a surrogate pair"),
        ("a.json", b'[{"text": "a"}, {}]', "a.json[1] has no text"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(b"some text " * 1000)[:-20], "Truncated"),
        ("a.txt.zst", b"not zstandard", "cannot read"),
        ("a.parquet", b"not parquet", "cannot read"),
        ("a.parquet.gz", b"", "Parquet compresses itself"),
        ("a.pdf", b"", "names end in one of .txt"),
        ("README", b"", "names end in one of .txt"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    message = refusal(f"files:{tmp_path}/{name}")
    assert reason in message
    assert name in message


def test_parquet_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "score": [2.0]}), tmp_path / "a.parquet")
    assert "there are id, score" in refusal(f"files:{tmp_path}/a.parquet")


# --- synthetic


def test_synthetic_is_a_pure_function_of_its_seed() -> None:
    source = open_source("synthetic")
    assert texts("synthetic") == texts("synthetic:0") != texts("synthetic:1")
    assert len(texts("synthetic")) == 400
    assert sum(map(len, texts("synthetic"))) == 64_034
    assert next(iter(source.documents())).text.startswith("the old bee hears the fox in the wood. the small fox ")
    assert source.fingerprint() != open_source("synthetic:1").fingerprint()
