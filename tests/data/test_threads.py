"""Tokenization on several threads, with reading and storing beside it: the same shards, in order, and ends at once."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import corpus_speed
from tests.data.texts import docstrings, write_jsonl
from trainyard.worker.data import tokenization
from trainyard.worker.data.corpus import open_corpus
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.tokenizers import ByteTokenizer, Ids, limit_threads

COUNTING = """
import os, sys
from trainyard.worker.data.tokenizers import limit_threads, load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
before = len(os.listdir("/proc/self/task"))
{limit}
tokenizer.encode_batch(["some text"] * 50)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize(("count", "expected"), [(0, 1), (1, 1), (3, 3)])
def test_as_many_threads_as_asked_for(count: int, expected: int, trained: Path) -> None:
    assert threads_of(f"limit_threads({count})", trained) == expected


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_without_a_limit_as_many_threads_as_the_library_takes(trained: Path) -> None:
    """One for each core, or for each that a container may use."""
    assert 1 <= threads_of("limit_threads(None)", trained) == threads_of("pass", trained) <= (os.cpu_count() or 1)


def threads_of(limit: str, trained: Path) -> int:
    """Return how many threads a process starts to tokenize."""
    environment = {key: value for key, value in os.environ.items() if key != "RAYON_NUM_THREADS"}
    command = [sys.executable, "-c", COUNTING.format(limit=limit), str(trained)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=200)
    return int(done.stdout)


def test_the_environment_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")
    limit_threads(2)
    assert os.environ["RAYON_NUM_THREADS"] == "5"
    monkeypatch.delenv("RAYON_NUM_THREADS")
    limit_threads(None)
    assert "RAYON_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("characters", [1, 1000, 1 << 20])
def test_batches_change_nothing(
    characters: int, docstring_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", characters)
    progress: list[tuple[int, int]] = []
    corpus = open_corpus(docstring_file, ByteTokenizer(), cache=tmp_path, progress=lambda *at: progress.append(at))
    ids = [np.concatenate(([1], own, [2])) for own in ByteTokenizer().encode_batch(docstrings())]
    assert corpus.tokens.tolist() == np.concatenate(ids).tolist()
    assert progress[-1] == (docstring_file.stat().st_size,) * 2
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


class Broken(ByteTokenizer):
    """Fails at a text, on whatever thread it is encoded."""

    fingerprint = "broken"

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        if "bad" in texts:
            raise MemoryError("no room")
        return super().encode_batch(texts)


def pool_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name}


def test_an_error_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 1)
    file = write_jsonl(tmp_path / "c.jsonl", ["a", "b", "bad", "c", "d"])
    before = pool_threads()
    with pytest.raises(MemoryError, match="no room"):
        open_corpus(file, Broken(), cache=tmp_path / "cache")
    assert pool_threads() <= before
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_progress_that_raises_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 1)
    file = write_jsonl(tmp_path / "c.jsonl", map(str, range(100)))
    before, calls = pool_threads(), 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += done > 0
        if calls == 3:
            raise DataInvalid("stop")

    with pytest.raises(DataInvalid, match="stop"):
        open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache", progress=progress)
    assert calls == 3
    assert pool_threads() <= before


def test_the_benchmark_measures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("DOCSTRINGS", 200), ("COPIES", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(corpus_speed, name, value)
    corpus_speed.main()
    assert "ratio" in capsys.readouterr().out
