"""A large file is cut into pieces that several processes tokenize: the same bytes as in one process."""

import contextlib
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.texts import docstrings, write_jsonl
from trainyard.contract.corpus_files import expand
from trainyard.contract.file_identity import BOM
from trainyard.worker.data import fileset, jsonl, part
from trainyard.worker.data.corpus import Corpus, open_built
from trainyard.worker.data.fileset import FileSetOptions, open_files
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.part import PartFiles, tokenize_part
from trainyard.worker.data.readers import find_document_end
from trainyard.worker.data.tokenizers import ByteTokenizer

STORED = ("tokens.bin", "offsets.bin", "files.json", "meta.json", "report.json")


class Stopped(Exception):
    """Raised to stop the build."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileset, "MIN_PART_BYTES", 4000)
    monkeypatch.setattr(fileset, "PART_BYTES", 9000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three large files with bad and blank lines, one of them plain text, one that is packed, and small ones."""
    data, texts = tmp_path / "data", docstrings(12)
    data.mkdir()
    lines = [json.dumps({"text": text}).encode() for text in texts[:200]]
    for place in range(0, 200, 7):
        lines.insert(place, [b"", b"broken", b'{"text": 3}', b"\xff\xfe", b'{"text": ""}', b"PAR1"][place % 6])
    (data / "a.jsonl").write_bytes(BOM + b"\n".join(lines) + b"\nbroken at the end")
    (data / "b.jsonl").write_bytes(b"\n" * 30_000 + b"\n".join(lines[:9]))
    (data / "c.txt").write_text("\n\n".join(texts[:150]) + "\n\n\n\n" + "x" * 12_000 + "\n\nend")
    (data / "d.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines), mtime=0))
    for name in ("e.jsonl", "f.jsonl"):  # the same content twice, in parts of their own
        write_jsonl(data / name, texts[:60])
    write_jsonl(data / "g.jsonl", texts[:3])
    return data


def built(folder: Path, cache: Path, **options: object) -> Corpus:
    given = {"max_bad_lines": 1.0, **options}
    return open_files(expand(str(folder)), FileSetOptions(ByteTokenizer(), "byte", cache, **given))  # type: ignore[arg-type]


def stored(corpus: Corpus) -> dict[str, bytes]:
    assert {path.name for path in corpus.directory.iterdir()} == set(STORED)
    return {name: (corpus.directory / name).read_bytes() for name in STORED}


def in_this_process(monkeypatch: pytest.MonkeyPatch, order: Callable[[list[object]], None]) -> list[object]:
    """Tokenize the parts of several processes here, in the order that ``order`` makes; return them."""
    parts: list[object] = []

    def tokenized(self: object, listed: list[object], building: Path) -> object:
        parts.extend(listed)
        shuffled = list(listed)
        order(shuffled)
        done = {id(each): self.tokenize_here(each, building) for each in shuffled}  # type: ignore[attr-defined]
        for each in listed:
            yield each, done[id(each)]

    monkeypatch.setattr(fileset.FileSetBuild, "tokenized_parts", tokenized)
    return parts


def test_pieces_in_any_order_make_the_bytes_of_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored(built(folder, tmp_path / "one", processes=1))
    seed = random.randrange(10**6)
    print("seed", seed)
    parts = in_this_process(monkeypatch, random.Random(seed).shuffle)
    for processes in (2, 3):
        parts.clear()
        assert stored(built(folder, tmp_path / f"of-{processes}", processes=processes)) == expected
        cut = {each.files[0].name for each in parts if each.piece is not None}  # type: ignore[attr-defined]
        assert cut >= {"a.jsonl", "b.jsonl", "c.txt"}
        assert "d.jsonl.gz" not in cut, "what is packed cannot be cut"


def test_two_processes_make_the_bytes_of_one(folder: Path, tmp_path: Path) -> None:
    expected = stored(built(folder, tmp_path / "one", processes=1))
    assert stored(built(folder, tmp_path / "two", processes=2)) == expected


def test_a_line_that_is_too_long_is_in_one_piece(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2000)
    (folder / "long.jsonl").write_bytes(
        b"\n".join(json.dumps({"text": "w" * size}).encode() for size in range(0, 9000, 600))
    )
    expected = built(folder, tmp_path / "one", processes=1)
    in_this_process(monkeypatch, lambda parts: None)
    corpus = built(folder, tmp_path / "two", processes=2)
    assert stored(corpus) == stored(expected)
    assert corpus.stats.bad_lines > 10


@pytest.mark.parametrize("processes", [1, 3])
def test_stopped_within_a_file_it_ends_with_the_same_bytes(
    processes: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored(built(folder, tmp_path / "one", processes=1))
    in_this_process(monkeypatch, lambda parts: None)
    monkeypatch.setattr(fileset, "JOURNAL_SECONDS", 0.0)
    appended = 0
    original = fileset.FileSetBuild.append

    def stop_later(*arguments: object) -> None:
        nonlocal appended
        appended += 1
        original(*arguments)  # type: ignore[arg-type]
        if appended == 3:
            raise Stopped

    monkeypatch.setattr(fileset.FileSetBuild, "append", stop_later)
    with pytest.raises(Stopped):
        built(folder, tmp_path / "cache", processes=2)
    (building,) = (tmp_path / "cache").glob(".*.building")
    (begun,) = json.loads((building / "journal.json").read_bytes())["files"]
    assert 0 < begun["bytes"] < (folder / "a.jsonl").stat().st_size
    assert stored(built(folder, tmp_path / "cache", processes=processes)) == expected


def test_a_piece_that_changed_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written while its pieces are read, and written back before it is hashed again."""
    file = folder / "a.jsonl"
    before = file.read_bytes()

    def change(parts: list[object]) -> None:
        file.write_bytes(before.replace(b"the", b"THE"))

    original = fileset.hash_pieces

    def change_back(*arguments: object) -> object:
        file.write_bytes(before)
        return original(*arguments)  # type: ignore[arg-type]

    in_this_process(monkeypatch, change)
    monkeypatch.setattr(fileset, "hash_pieces", change_back)
    with pytest.raises(DataInvalid, match=r"a\.jsonl changed while it was read"):
        built(folder, tmp_path / "cache", processes=2)
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_a_file_that_changes_after_it_was_cut_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*arguments: object) -> object:
        file = folder / "a.jsonl"
        file.write_bytes(file.read_bytes().replace(b"the", b"THE"))
        return open_built(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fileset, "open_built", change)
    in_this_process(monkeypatch, lambda parts: None)
    with pytest.raises(DataInvalid, match=r"a\.jsonl changed while it was read"):
        built(folder, tmp_path / "cache", processes=2)


@pytest.mark.parametrize(
    ("text", "after", "plain", "end"),
    [
        (b"ab\ncd\nef", 0, False, 3),
        (b"ab\ncd\nef", 3, False, 6),
        (b"ab\ncd\nef", 6, False, None),
        (b"a\nb\n\nc\n\n\nd", 0, True, 5),
        (b"a\nb\n\nc\n\n\nd", 4, True, 8),
        (b"a\nb\n\nc\n\n\nd", 9, True, None),
        (b"x" * (1 << 16) + b"\n\n" + b"y", 1, True, (1 << 16) + 2),
        (b"x" * (1 << 16) + b"\n\n" + b"y", 2, True, (1 << 16) + 2),
    ],
)
def test_the_end_of_a_document(text: bytes, after: int, plain: bool, end: int | None, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(text)
    with (tmp_path / "f").open("rb") as file:
        assert find_document_end(file, after, plain) == end


def test_a_part_of_before_a_power_cut_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are not fsynced: after a power cut their files may be empty, and the list of their counts complete."""
    files = tuple(expand(str(folder / "g.jsonl")))
    keys = tuple(fileset.identify_files(files, FileSetOptions(ByteTokenizer(), "byte", tmp_path)))
    wanted, directory = PartFiles(files, keys, "text"), tmp_path / "part"
    counts = tokenize_part(directory, wanted, ByteTokenizer(), lambda done: None)
    tokens = np.fromfile(directory / "tokens.bin", np.uint16)
    assert len(tokens) == counts[0].tokens
    os.truncate(directory / "tokens.bin", 0)
    assert tokenize_part(directory, wanted, ByteTokenizer(), lambda done: None) == counts
    assert (directory / "tokens.bin").stat().st_size == 0, "in the same boot, a complete part is only read"
    monkeypatch.setattr(part, "boot_id", lambda: "the next boot")
    for left in (None, b"", b'{"files": ['):
        if left is not None:
            (directory / "part.json").write_bytes(left)
        assert tokenize_part(directory, wanted, ByteTokenizer(), lambda done: None) == counts
        assert np.array_equal(np.fromfile(directory / "tokens.bin", np.uint16), tokens)
        with contextlib.suppress(FileNotFoundError):
            os.truncate(directory / "tokens.bin", 0)
