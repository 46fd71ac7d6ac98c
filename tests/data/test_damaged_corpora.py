"""Corpora that were damaged at random, against a slow reader that shares no code with ours: the same texts, or none."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data import reference_reader
from tests.data.texts import docstrings
from tests.soak_report import SoakReport, chosen, seed
from trainyard.worker.data import jsonl
from trainyard.worker.data.jsonl import DataInvalid, ParseStats
from trainyard.worker.data.readers import open_reader

SEED = 20261125
LIMIT = 2048
"""Of a line. In a run it is 8 MiB; here mutations are to reach it."""

PIECES = [
    *(b"\n", b"\r\n", b"\r", b"\0", b" \t \n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PAR1"),
    *(b"\xc3", b"\xed\xa0\x80", "\u2028\x85\u2029".encode(), b"\\ud800", b"\\udc00", b"\\ud83d\\ude00", b"\\u00"),
    *(b"\\", b'"', b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"Infinity", b"-", b"1e999", b"01", b"null", b"true"),
    *(b'{"text": "x"}', b'"text"', b'{"text": null}', b'{"text": 5}', b'{"text": ["a"]}', b'{"text": ""}'),
    *(b'"text here"', b"[" * 1500, b'{"a":' * 300, b"7" * LIMIT, b"a" * LIMIT),
]  # fmt: skip


def corpus(chooser: random.Random) -> bytes:
    """A few valid documents, some of them with other fields, escaped or not, with either end of lines."""
    texts = chooser.sample(docstrings(), chooser.randint(1, 12))
    out = []
    for text in texts:
        fields = {"id": chooser.randint(-5, 10**9), "text": text[:600], "more": {"x": [1.5, None, True, text[:9]]}}
        names = [*chooser.sample(["id", "more"], chooser.randint(0, 2)), "text"]
        chooser.shuffle(names)
        line = json.dumps({name: fields[name] for name in names}, ensure_ascii=chooser.random() < 0.5)
        out.append(line.encode() + chooser.choice([b"\n", b"\n", b"\r\n", b"\n\n"]))
    return b"".join(out)


def inserted(data: bytes, chooser: random.Random) -> bytes:
    at = chooser.choice([0, len(data), chooser.randint(0, len(data))])
    return data[:at] + chooser.choice(PIECES) + data[at:]


def flipped(data: bytes, chooser: random.Random) -> bytes:
    changed = bytearray(data or b" ")
    for _ in range(chooser.randint(1, 4)):
        changed[chooser.randrange(len(changed))] ^= 1 << chooser.randrange(8)
    return bytes(changed)


def cut(data: bytes, chooser: random.Random) -> bytes:
    first, last = sorted(chooser.randint(0, len(data)) for _ in range(2))
    return chooser.choice([data[:first], data[last:], data[:first] + data[last:]])


def moved(data: bytes, chooser: random.Random) -> bytes:
    first, last = sorted(chooser.randint(0, len(data)) for _ in range(2))
    at = chooser.randint(0, len(data))
    return data[:at] + data[first : min(last, first + 400)] * chooser.randint(1, 3) + data[at:]


def wide(data: bytes, chooser: random.Random) -> bytes:
    return data.decode("utf-8", "replace").encode(
        chooser.choice(["utf-16", "utf-16-le", "utf-8-sig", "latin-1"]), "replace"
    )


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [inserted, inserted, flipped, flipped, cut, moved, wide]


def mutated(chooser: random.Random) -> bytes:
    data = corpus(chooser)
    for mutate in chooser.choices(MUTATIONS, weights=[6, 6, 6, 6, 3, 3, 1], k=chooser.randint(1, 3)):
        data = mutate(data, chooser)
    return data


def ours(file: Path) -> tuple[list[tuple[int, str]], ParseStats] | None:
    """None where the file is refused."""
    try:
        with open_reader(file) as reader:
            return [(document.line, document.text) for document in reader.documents("text")], reader.stats
    except DataInvalid:
        return None


def theirs(data: bytes, form: str) -> reference_reader.Read | None:
    """None where the file is refused: as no text, or as a packed form that it only begins like."""
    if not form.endswith(".gz") and data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")):
        return None
    try:
        return reference_reader.read(data, plain=form == ".txt", limit=LIMIT)
    except reference_reader.Refused:
        return None


def compare(count: int, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """So many mutated files by both readers; how many were refused, and what the others held."""
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", LIMIT)
    counts = dict.fromkeys(("files refused", "documents", "bad lines", "blank lines"), 0)
    for index in range(count):
        chooser = random.Random(f"{number} {index}")
        data, form = mutated(chooser), chooser.choice([".jsonl"] * 4 + [".txt", ".jsonl.gz"])
        file = folder / f"c{form}"
        file.write_bytes(gzip.compress(data, 1) if form.endswith(".gz") else data)
        expected, found = theirs(data, form), ours(file)
        where = f"seed {number}, file {index}{form}: {data[:300]!r}"
        assert (found is None) == (expected is None), where
        if found is None or expected is None:
            counts["files refused"] += 1
            continue
        documents, tally = found
        assert documents == expected.documents, where
        assert (tally.lines, tally.blank_lines, tally.bad_lines) == (
            expected.lines,
            expected.blank,
            len(expected.bad),
        ), where
        assert [line for line, _ in tally.examples] == expected.bad[:20], where
        for name, more in zip(list(counts)[1:], (len(documents), tally.bad_lines, tally.blank_lines), strict=True):
            counts[name] += more
    return counts


def test_mutated_files_hold_the_same_for_a_second_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = compare(300, SEED, tmp_path, monkeypatch)
    assert all(counts.values()), counts


@pytest.mark.soak
def test_ten_thousand_mutated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: SoakReport) -> None:
    count = int(chosen("MUTATIONS", 10_000))
    counts = compare(count, seed(), tmp_path, monkeypatch)
    account.faults["mutated corpus"] += count
    account.invariants.append(
        "same texts as a second reader: " + ", ".join(f"{n:,} {what}" for what, n in counts.items())
    )
