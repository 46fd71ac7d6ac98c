"""A tokenization that is killed or stopped is resumed, and ends with the same bytes."""

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.data.texts import docstrings
from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.worker.data import corpus as corpus_module
from trainyard.worker.data import file as file_module
from trainyard.worker.data import parquet, readers, shards, tokenization
from trainyard.worker.data.corpus import CorpusMeta, open_corpus
from trainyard.worker.data.jsonl import DataInvalid, text_of
from trainyard.worker.data.tokenizers import ByteTokenizer

BUILD = """
import sys
from pathlib import Path
from trainyard.worker.data import corpus, shards, tokenization
from trainyard.worker.data.tokenizers import ByteTokenizer
tokenization.BATCH_CHARACTERS, shards.JOURNAL_SECONDS = 3000, 0.0
corpus.open_corpus(Path(sys.argv[1]), ByteTokenizer(), cache=Path(sys.argv[2]), max_bad_lines=1.0,
                   progress=lambda done, total: done and print(f"{done:<4000}", flush=True))
"""


class Stopped(Exception):
    """Raised to stop the build."""


def messy() -> bytes:
    """Good lines with bad and blank ones between them, and some at the very end."""
    lines = [json.dumps({"text": text}).encode() for text in docstrings()[:300]]
    for place in range(0, 300, 7):
        lines.insert(place, [b"", b"broken", b'{"text": 3}', b"\xff\xfe", b'{"text": ""}'][place % 5])
    return b"\n".join([*lines, b"", b"broken at the end", b""])


def write_form(form: str, path: Path) -> Path:
    file = path / f"corpus.{form}"
    if form == "parquet":
        arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        texts = [None if number % 7 == 3 else text for number, text in enumerate(docstrings()[:300])]
        writer.write_table(arrow.table({"text": texts}), file, row_group_size=64)
    elif form == "txt":
        file.write_text("\n\n".join(docstrings()[:300]) + "\n\n\n")
    else:
        file.write_bytes(gzip.compress(messy(), mtime=0) if form == "gz" else messy())
    return file


def contents(cache: Path) -> dict[str, bytes]:
    """Every published file by its name; nothing is left of the build."""
    assert not list(cache.glob(".*"))
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.glob("*/*")}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(shards, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 8)


def build(file: Path, cache: Path, *, stop_after: int | None = None) -> list[int]:
    """Build; return the bytes done of each progress call. ``stop_after``: raise in that call."""
    progressed: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == file.stat().st_size
        if done:
            progressed.append(done)
        if stop_after is not None and len(progressed) >= stop_after:
            raise Stopped

    try:
        open_corpus(file, ByteTokenizer(), cache=cache, max_bad_lines=1.0, progress=progress)
    except Stopped:
        assert not list(cache.glob("[!.]*/meta.json"))
    return progressed


@pytest.mark.parametrize("form", ["jsonl", "gz", "txt", "parquet"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(form: str, tmp_path: Path, small_batches: None) -> None:
    file = write_form(form, tmp_path)
    batches = len(build(file, tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    assert batches >= 12
    for number, stop_after in enumerate(random.Random(7).sample(range(1, batches), 4)):
        cache = tmp_path / f"stopped-{number}"
        build(file, cache, stop_after=stop_after)
        left = build(file, cache)
        assert contents(cache) == expected
        # What was reported is not done again: the batch whose call raised was stored.
        assert len(left) == batches - stop_after


def test_progress_continues_after_a_stop(tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module, "BUFFER_BYTES", 512)
    file = write_form("jsonl", tmp_path)
    before = build(file, tmp_path / "cache", stop_after=9)
    after = build(file, tmp_path / "cache")
    assert all(a <= b for a, b in pairwise([*before, *after]))
    assert 0 < before[-1] < after[0] < after[-1] == file.stat().st_size


def test_only_what_is_left_is_encoded(tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_form("jsonl", tmp_path)
    build(file, tmp_path / "cache", stop_after=9)
    parsed: list[bytes | None] = []

    def counted(raw: bytes | None, text_field: str) -> str:
        parsed.append(raw)
        return text_of(raw, text_field)

    monkeypatch.setattr(readers, "text_of", counted)
    build(file, tmp_path / "cache")
    (meta,) = (CorpusMeta.read(path) for path in (tmp_path / "cache").glob("[!.]*/meta.json"))
    assert 0 < len(parsed) < 0.8 * (meta.documents + meta.bad_lines)


def kill_somewhere(file: Path, cache: Path, after_lines: int) -> bool:
    """Run a build and SIGKILL it after so many signs of progress; whether it was killed before its end."""
    command = [sys.executable, "-c", BUILD, str(file), str(cache)]
    # The pipe holds one sign of progress: on a busy host the build cannot end before it is killed.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pipesize=4096) as process:
        assert process.stdout is not None
        for _ in range(after_lines):
            if not process.stdout.readline():
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode in (0, -signal.SIGKILL)
    return not list(cache.glob("[!.]*/meta.json"))


def kill_until_done(file: Path, tmp_path: Path, seed: int, most: int) -> int:
    """Kill builds of ``file`` again and again until one is faster; how many were killed."""
    chooser, cache, killed = random.Random(seed), tmp_path / f"killed-{seed}", 0
    while kill_somewhere(file, cache, chooser.randint(1, most)):
        killed += 1
        assert killed < 200, f"seed {seed} never ends"
    assert contents(cache) == contents(tmp_path / "whole"), f"seed {seed}"
    return killed


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, small_batches: None) -> None:
    file = write_form("jsonl", tmp_path)
    batches = len(build(file, tmp_path / "whole"))
    assert kill_until_done(file, tmp_path, seed=11, most=batches // 2) >= 2


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_killed_at_a_hundred_random_moments(tmp_path: Path, small_batches: None) -> None:
    killed, seed = 0, 0
    for form in ("jsonl", "gz", "txt", "parquet"):
        place = tmp_path / form
        place.mkdir()
        file = write_form(form, place)
        batches = len(build(file, place / "whole"))
        for _ in range(5):
            seed += 1
            killed += kill_until_done(file, place, seed, batches // 4)
    print(f"{killed} builds killed")
    assert killed >= 50


def test_a_corpus_that_changed_in_between_is_built_from_its_beginning(tmp_path: Path, small_batches: None) -> None:
    file = write_form("jsonl", tmp_path)
    build(file, tmp_path / "cache", stop_after=9)
    times = file.stat()
    # Same size, same modification time, one letter: only the content tells.
    file.write_bytes(file.read_bytes().replace(b"the", b"THE", 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(build(file, tmp_path / "cache")) == len(build(file, tmp_path / "whole"))
    (whole,) = (tmp_path / "whole").glob("[!.]*/tokens.bin")
    (built,) = (tmp_path / "cache").glob("[!.]*/tokens.bin")
    assert built.read_bytes() == whole.read_bytes()


def test_a_corpus_that_changes_while_it_is_taken_up_is_refused(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_form("jsonl", tmp_path)
    digest = corpus_module.content_digest(file, tmp_path, lambda done, total: None)
    build(file, tmp_path / "cache", stop_after=9)
    monkeypatch.setattr(corpus_module, "content_digest", lambda *_: digest)
    file.write_bytes(file.read_bytes().replace(b"the", b"THE", 1))
    with pytest.raises(DataInvalid, match="changed while it was read"):
        open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache", max_bad_lines=1.0)
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("damage", ["no journal", "torn journal", "other journal", "short tokens", "no offsets"])
def test_what_was_left_is_not_trusted_where_it_does_not_fit(damage: str, tmp_path: Path, small_batches: None) -> None:
    file = write_form("jsonl", tmp_path)
    batches = len(build(file, tmp_path / "whole"))
    build(file, tmp_path / "cache", stop_after=9)
    (left,) = (tmp_path / "cache").glob(".*.building")
    journal = left / shards.JOURNAL
    match damage:
        case "no journal":
            journal.unlink()
        case "torn journal":
            journal.write_bytes(journal.read_bytes()[:40])
        case "other journal":
            journal.write_text('{"tally": [1]}')
        case "short tokens":
            os.truncate(left / shards.TOKENS, 100)
        case _:
            (left / shards.OFFSETS).unlink()
    (left / f".{shards.JOURNAL}.abc123").write_text("of a kill while the journal was written")
    (left / ".meta.json.abc123").write_text("of a kill just before the end")
    assert len(build(file, tmp_path / "cache")) == batches
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_the_journal_has_the_keys_of_earlier_releases(tmp_path: Path, small_batches: None) -> None:
    build(write_form("jsonl", tmp_path), tmp_path / "cache", stop_after=9)
    (left,) = (tmp_path / "cache").glob(".*.building")
    journal = json.loads((left / shards.JOURNAL).read_bytes())
    assert set(journal) == {"tokens", "tally", "read"}  # the last one since release 0.2
    counts = {"special_tokens", "special_texts", "added_tokens"}  # since release 0.2
    assert set(journal["tally"]) - counts == {"lines", "blank_lines", "bad_lines", "documents", "named"}


def test_more_than_the_journal_says_is_cut_off(tmp_path: Path, small_batches: None) -> None:
    """As after a kill between an append and its entry."""
    file = write_form("jsonl", tmp_path)
    build(file, tmp_path / "whole")
    build(file, tmp_path / "cache", stop_after=9)
    (left,) = (tmp_path / "cache").glob(".*.building")
    for name in (shards.TOKENS, shards.OFFSETS):
        with (left / name).open("ab") as stream:
            stream.write(b"\x07" * 999)
    build(file, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_nothing(tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.ArrayFiles, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        build(write_form("jsonl", tmp_path), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("form", ["jsonl", "gz", "txt", "parquet"])
@pytest.mark.parametrize("moment", ["before it is read", "while it is read"])
def test_an_interrupted_build_of_another_corpus_is_not_continued(
    form: str, moment: str, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody submits A, writes B into the file while it is built, cancels, writes A back and submits it again."""
    monkeypatch.setattr(file_module, "BUFFER_BYTES", 4096)
    file = write_form(form, tmp_path)
    build(file, tmp_path / "whole")
    first = file.read_bytes()
    others = [text.swapcase() for text in docstrings()]
    monkeypatch.setattr("tests.data.test_corpus_resume.docstrings", lambda: others)
    second = write_form(form, tmp_path).read_bytes()
    cache, stops = tmp_path / "cache", 0

    def after_the_hash(*arguments: Any) -> bool:
        if moment == "before it is read" and stops == 0:
            file.write_bytes(second)
        return readers.detect_plain_text(*arguments)

    monkeypatch.setattr(corpus_module, "detect_plain_text", after_the_hash)

    def progress(done: int, total: int) -> None:
        nonlocal stops
        stops += done > 0
        if stops == 2 and moment == "while it is read":
            file.write_bytes(second)
        if stops == 6:
            raise Stopped

    file.write_bytes(first)
    with contextlib.suppress(Stopped, DataInvalid):
        open_corpus(file, ByteTokenizer(), cache=cache, max_bad_lines=1.0, progress=progress)
    file.write_bytes(first)
    build(file, cache)
    assert contents(cache) == contents(tmp_path / "whole")


def test_a_build_that_0_1_left_is_begun_again(tmp_path: Path, small_batches: None) -> None:
    file = write_form("jsonl", tmp_path)
    batches = len(build(file, tmp_path / "whole"))
    build(file, tmp_path / "cache", stop_after=9)
    (left,) = (tmp_path / "cache").glob(".*.building")
    journal = json.loads((left / shards.JOURNAL).read_bytes())
    del journal["read"]
    (left / shards.JOURNAL).write_text(json.dumps(journal))
    assert len(build(file, tmp_path / "cache")) == batches
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_file_exchanged_while_it_is_read_changes_nothing(tmp_path: Path, small_batches: None) -> None:
    """The first thing that is called after the file was opened exchanges it for a link to a secret."""
    root, secret = tmp_path / "root", tmp_path / "secret.jsonl"
    root.mkdir()
    file = write_form("jsonl", root)
    build(file, tmp_path / "whole")
    secret.write_bytes(file.read_bytes().swapcase())

    def exchange(done: int, total: int) -> None:
        if not file.is_symlink():
            file.unlink()
            file.symlink_to(secret)

    open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache", max_bad_lines=1.0, progress=exchange, roots=[root])
    assert file.is_symlink()
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    with pytest.raises(OutsideRoots):
        open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache", max_bad_lines=1.0, roots=[root])


def test_a_compressed_file_resumes_after_its_first_block(tmp_path: Path, small_batches: None) -> None:
    """The interrupted build has read only the block from which the format is detected."""
    zstandard = pytest.importorskip("zstandard")
    texts = ["".join(map(chr, random.Random(number).choices(range(97, 123), k=200))) for number in range(2000)]
    file = tmp_path / "corpus.jsonl.zst"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    compressed = zstandard.ZstdCompressor().compress(lines.encode())
    file.write_bytes(compressed)
    block = len(compressed) // 1024 // 2 * 1024
    with mock.patch.object(file_module, "BUFFER_BYTES", block):
        build(file, tmp_path / "whole")
        build(file, tmp_path / "cache", stop_after=1)
        (journal,) = (tmp_path / "cache").glob(".*.building/journal.json")
        assert json.loads(journal.read_bytes())["read"]["bytes"] == block
        build(file, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
