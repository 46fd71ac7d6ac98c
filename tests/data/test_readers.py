"""Readers of every format: compressed, plain text, parquet; and the errors of damaged files."""

import gzip
import hashlib
import importlib.util
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.texts import docstrings
from trainyard.contract.file_identity import Compression, compression_of
from trainyard.worker.data import file as file_module
from trainyard.worker.data import jsonl
from trainyard.worker.data.corpus import main, open_corpus
from trainyard.worker.data.file import import_optional
from trainyard.worker.data.jsonl import DataInvalid, ParseStats
from trainyard.worker.data.readers import detect_plain_text, open_reader
from trainyard.worker.data.tokenizers import ByteTokenizer

RAW = b'{"text": "one"}\noops\n\n{"text": "two \xe2\x80\xa8 still two"}\r\n{"text": "three"}'
FOUND = [(1, "one"), (4, "two \u2028 still two"), (5, "three")]


def zstd(data: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd}
packed = pytest.mark.parametrize("kind", sorted(PACK))


def read(path: Path, field: str = "text") -> tuple[list[tuple[int, str]], ParseStats]:
    with open_reader(path) as reader:
        found = [(document.line, document.text) for document in reader.documents(field)]
        assert reader.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert reader.bytes_read == reader.size == path.stat().st_size
        return found, reader.stats


def refused(path: Path, field: str = "text") -> str:
    with pytest.raises(DataInvalid) as found:
        read(path, field)
    assert str(path) in str(found.value)
    return str(found.value)


@packed
def test_packed_lines_are_the_lines(kind: str, tmp_path: Path) -> None:
    for name in (f"c.jsonl.{kind}", "named_wrongly.jsonl"):
        file = tmp_path / name
        file.write_bytes(PACK[kind](RAW))
        documents, stats = read(file)
        assert documents == FOUND
        assert (stats.lines, stats.blank_lines, stats.examples) == (5, 1, [(2, "not JSON at character 1")])


@packed
def test_several_members_are_one_stream(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "c"
    file.write_bytes(b"".join(PACK[kind](RAW[at : at + 9]) for at in range(0, len(RAW), 9)))
    assert read(file)[0] == FOUND


@packed
@pytest.mark.parametrize("damage", ["cut off", "a byte too few", "flipped", "followed by rubbish", "only a beginning"])
def test_damage_is_named(kind: str, damage: str, tmp_path: Path) -> None:
    good = PACK[kind](
        b"".join(b'{"text": "%s"}\n' % hashlib.sha256(b"%d" % n).hexdigest().encode() for n in range(999))
    )
    at = 5 if kind == "zst" else len(good) // 2
    bad = {
        "cut off": good[: len(good) // 2],
        "a byte too few": good[:-1],
        "flipped": good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :],
        "followed by rubbish": good + b"rubbish",
        "only a beginning": good[:4],
    }
    file = tmp_path / "c.jsonl"
    file.write_bytes(bad[damage])
    assert "is damaged" in refused(file)


@packed
def test_a_bomb_is_one_long_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the limit of `worker.data.file` on unpacked bytes, memory stays constant."""
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 20)
    bomb = PACK[kind](b'{"text": "before"}\n' + b"a" * (60 << 20) + b'\n{"text": "after"}\n')
    assert len(bomb) < 1 << 20
    file = tmp_path / "bomb.jsonl"
    file.write_bytes(bomb)
    tracemalloc.start()
    try:
        documents, stats = read(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert documents == [(1, "before"), (3, "after")]
    assert stats.examples == [(2, "longer than 1 MiB")]
    assert peak < 80 << 20


@packed
def test_a_packed_file_that_grows_is_refused_as_such(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "c"
    raw = b"".join(b'{"text": "%s"}\n' % os.urandom(300).hex().encode() for _ in range(9000))
    whole = PACK[kind](raw)
    file.write_bytes(whole[: len(whole) // 2])
    with open_reader(file) as reader:
        documents = reader.documents("text")
        next(documents)
        with file.open("ab") as more:
            more.write(whole[len(whole) // 2 :])
        with pytest.raises(DataInvalid, match="changed while it was read"):
            list(documents)


@packed
def test_packed_utf16_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "c"
    file.write_bytes(PACK[kind]('{"text": "wide"}\n'.encode("utf-16")))
    assert "save it as UTF-8" in refused(file)


@pytest.mark.parametrize(("package", "head"), [("zstandard", b"\x28\xb5\x2f\xfd"), ("pyarrow", b"PAR1")])
def test_a_missing_package_is_named(package: str, head: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="pip install nonesuch"):
        import_optional("nonesuch", tmp_path)
    if importlib.util.find_spec(package) is None:
        (tmp_path / "c").write_bytes(head + bytes(100))
        assert f"pip install {package}" in refused(tmp_path / "c")


def test_first_bytes_say_what_a_file_is() -> None:
    assert compression_of(gzip.compress(b"")) is Compression.GZIP
    assert compression_of(b'{"text": 1}') is compression_of(b"") is compression_of(b"PAR") is Compression.NONE


PROSE = b"\xef\xbb\xbf\n\nFirst line.\nSecond line.\r\n \t\r\n\n  Indented, without an end\n\n\xff broken\n\nlast"


def test_documents_of_plain_text_are_separated_by_blank_lines(tmp_path: Path) -> None:
    for name, content in (("c.txt", PROSE), ("c.TXT.gz", gzip.compress(PROSE))):
        (tmp_path / name).write_bytes(content)
        documents, stats = read(tmp_path / name)
        assert documents == [(3, "First line.\nSecond line."), (7, "  Indented, without an end"), (11, "last")]
        assert (stats.lines, stats.blank_lines, stats.documents) == (11, 6, 3)
        assert stats.examples == [(9, "not UTF-8 at byte 1")]


def test_plain_text_is_known_by_name_and_first_character(tmp_path: Path) -> None:
    cases = [
        ("a.txt", b"text", True),
        ("a.txt.gz", gzip.compress(b"text"), True),
        ("a.txt", b'\xef\xbb\xbf\n {"text": "JSON by another name"}', False),
        ("a.txt", b"{ a brace", True),
        ("a.jsonl", b"text", False),
        ("a", b"text", False),
    ]
    for name, content, expected in cases:
        (tmp_path / name).write_bytes(content)
        assert detect_plain_text(tmp_path / name) is expected
    assert read(tmp_path / "a.txt")[0] == [(1, "{ a brace")]
    (tmp_path / "a.txt").write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n')
    assert read(tmp_path / "a.txt")[0] == [(1, "one"), (3, "two")]


@pytest.mark.parametrize("length", [60, 98, 99, 100, 101, 250])
def test_a_long_document_of_plain_text_is_bad(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    for line in (50, 1000):  # of several lines, of one
        document = "".join("\n" if n % line == line - 1 else "x" for n in range(length - 1)) + "\n"
        (tmp_path / "c.txt").write_text(f"before\n\n{document}\nafter")
        documents, stats = read(tmp_path / "c.txt")
        fits = length < 100
        assert [text for _, text in documents] == ["before", *([document[:-1]] if fits else []), "after"]
        named = [(3, "longer than 0 MiB: separate documents by blank lines")]
        assert stats.examples == ([] if fits else named)


def test_shards_of_every_form_hold_the_same(tmp_path: Path) -> None:
    texts = [text for text in docstrings() if "\n\n" not in text and text.strip() == text][:200]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "c.jsonl").write_bytes(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt").write_text("\n\n".join(texts))
    corpora = [open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache") for file in sorted(tmp_path.glob("c.*"))]
    assert len({corpus.directory for corpus in corpora}) == 3
    for corpus in corpora:
        assert corpus.meta.documents == len(texts)
        assert corpus.tokens.tolist() == corpora[0].tokens.tolist()


def test_the_same_bytes_under_another_name_are_another_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b'["text"]\n\n["more"]\n')
    corpus = open_corpus(tmp_path / "a.txt", ByteTokenizer(), cache=tmp_path / "cache")
    assert corpus.meta.documents == 2
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    with pytest.raises(DataInvalid, match="holds no text under 'text'"):
        open_corpus(tmp_path / "a.jsonl", ByteTokenizer(), cache=tmp_path / "cache")


def test_check_reads_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    assert main(["check", str(tmp_path / "c.txt.gz")]) == 0
    assert "2 documents, 10 tokens, 3 lines" in capsys.readouterr().out
    (tmp_path / "c.txt.gz").write_bytes(zlib.compress(b"x"))
    assert main(["check", str(tmp_path / "c.txt.gz")]) == 1


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path, **options)
    return path


def test_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    texts = ["one", "", None, "two \u2028 \U0001f600", "one"]
    file = write_parquet(tmp_path / "c", {"id": [1, 2, 3, 4, 5], "text": texts}, row_group_size=2)
    documents, stats = read(file)
    assert documents == [(1, "one"), (4, "two \u2028 \U0001f600"), (5, "one")]
    assert stats.examples == [(2, "'text' is empty"), (3, "'text' is not a string but null")]
    assert stats.lines == 5
    assert "column 'id' holds int64 and must hold strings" in refused(file, "id")
    assert "no single column 'content' but id, text" in refused(file, "content")


def test_parquet_of_other_types(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    large = arrow.array(["a", "b", None], arrow.large_string())
    coded = arrow.array(["a", "b", "a"]).dictionary_encode()
    broken = arrow.array([b"good", b"\xff"], arrow.binary()).view(arrow.string())
    nested = arrow.array([{"text": "not this"}] * 3)
    write_parquet(tmp_path / "large", {"before": nested, "text": large})
    assert read(tmp_path / "large")[0] == [(1, "a"), (2, "b")]
    write_parquet(tmp_path / "coded", {"text": coded})
    assert read(tmp_path / "coded")[0] == [(1, "a"), (2, "b"), (3, "a")]
    write_parquet(tmp_path / "broken", {"text": broken})
    documents, stats = read(tmp_path / "broken")
    assert (documents, stats.examples) == ([(1, "good")], [(2, "not UTF-8 at byte 1")])


def test_parquet_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gibibyte of text in a few hundred bytes of dictionary."""
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(file_module, "UNPACKED_FLOOR", 1 << 30)
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 18)
    texts = ["a" * ((1 << 18) - 1), "b" * (1 << 18)]
    coded = arrow.DictionaryArray.from_arrays(arrow.array([0, 1] * 2000, arrow.int32()), texts)
    file = write_parquet(tmp_path / "c", {"text": coded})
    assert file.stat().st_size < 1 << 18
    before = arrow.total_allocated_bytes()
    with open_reader(file) as reader:
        count = sum(len(document.text) == (1 << 18) - 1 for document in reader.documents("text"))
        assert arrow.total_allocated_bytes() - before < 64 << 20
    assert (count, reader.stats.bad_lines) == (2000, 2000)
    monkeypatch.setattr("trainyard.worker.data.parquet.MAX_GROUP_BYTES", 1 << 10)
    assert "write it with smaller row groups" in refused(file)


@pytest.mark.parametrize("damage", ["cut off", "flipped"])
def test_damaged_parquet_is_named(damage: str, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "c", {"text": docstrings()})
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    file.write_bytes(data[:middle] if damage == "cut off" else data[:middle] + bytes(64) + data[middle + 64 :])
    assert "cannot be read as parquet" in refused(file)


def test_shards_of_parquet(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "c.parquet", {"text": docstrings()}, row_group_size=100)
    corpus = open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache")
    assert corpus.meta.documents == len(docstrings())
    assert corpus.meta.content == hashlib.sha256(file.read_bytes()).hexdigest()
    assert detect_plain_text(file) is False


def _packed_bomb(form: str, file: Path) -> None:
    """A file of a few hundred bytes or kilobytes that unpacks to far more."""
    line = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    if form == "gzip":
        file.write_bytes(gzip.compress(line * 20_000))
    elif form == "zstd":
        library = pytest.importorskip("zstandard")
        file.write_bytes(library.ZstdCompressor(level=3).compress(line * 20_000))
    elif form == "gzip of blank lines":
        file.write_bytes(gzip.compress(b"\n" * 20_000_000))
    else:
        arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        values = [None] * 200_000 if form == "parquet of nulls" else ["a" * 1000] * 20_000
        writer.write_table(arrow.table({"text": arrow.array(values, arrow.string())}), file)


@pytest.mark.parametrize("form", ["gzip", "gzip of blank lines", "zstd", "parquet", "parquet of nulls"])
def test_what_grows_without_bounds_is_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb"
    _packed_bomb(form, file)
    monkeypatch.setattr(file_module, "UNPACKED_FLOOR", 1 << 20)
    monkeypatch.setattr(file_module, "UNPACKED_PER_BYTE", 16)
    stored: list[int] = []
    with (
        pytest.raises(DataInvalid, match=r"unpacks to more than 16 times its size: .* unpack it first"),
        open_reader(file) as reader,
    ):
        stored.extend(len(document.text) for document in reader.documents("text"))
    assert sum(stored) <= (1 << 20) + 16 * file.stat().st_size
    monkeypatch.undo()
    with open_reader(file) as reader:
        assert sum(1 for _ in reader.documents("text")) in (0, 20_000), "within the real bounds it is read"


def test_text_that_shrinks_well_is_within_the_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor of nothing: real text shrinks to a tenth at most."""
    monkeypatch.setattr(file_module, "UNPACKED_FLOOR", 0)
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in docstrings()).encode(), 9))
    with open_reader(file) as reader:
        assert [document.text for document in reader.documents("text")] == list(docstrings())
