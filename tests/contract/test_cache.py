"""Which entries of the corpus cache can be removed: tested with names and locks only."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trainyard.contract.cache import CorpusCache, building_of
from trainyard.contract.locks import FileLock

KEYS = ["a" * 32, "b" * 32, "c" * 32]
LONG_AGO = 1_000_000.0


def nothing() -> None:
    """Do nothing while waiting."""


def filled(path: Path, *keys: str, size: int = 10) -> CorpusCache:
    """Corpora of so many bytes that were last used long ago, the first longest ago."""
    cache = CorpusCache(path)
    for number, key in enumerate(keys):
        cache.directory(key).mkdir(parents=True)
        (cache.directory(key) / "tokens.bin").write_bytes(b"x" * size)
        cache.use(key, nothing).release()
        os.utime(cache.used(key), (LONG_AGO + number,) * 2)
    return cache


def test_entries_have_the_time_of_their_last_use(tmp_path: Path) -> None:
    cache = filled(tmp_path, *KEYS[:2])
    building_of(cache.directory(KEYS[2])).mkdir()
    (building_of(cache.directory(KEYS[2])) / "tokens.bin").write_bytes(b"yyy")
    for stranger in ("content-0.json", ".hidden", "notes"):
        (tmp_path / stranger).mkdir()
    found = cache.entries()
    assert [(each.key, each.bytes, each.is_complete) for each in found] == [
        (KEYS[0], 10, True),
        (KEYS[1], 10, True),
        (KEYS[2], 3, False),
    ]
    assert [each.used_at for each in found[:2]] == [LONG_AGO, LONG_AGO + 1]
    assert CorpusCache(tmp_path / "none").entries() == []


def test_unused_entries_can_be_removed(tmp_path: Path) -> None:
    cache = filled(tmp_path, *KEYS)
    building_of(cache.directory(KEYS[1])).mkdir()
    assert [cache.remove(each) for each in cache.entries()] == [True] * 4
    assert cache.entries() == []
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".used"}


def hold_used(cache: CorpusCache) -> FileLock:
    return cache.use(KEYS[0], nothing)


def hold_lock(cache: CorpusCache) -> FileLock:
    return FileLock(cache.lock(KEYS[0])).take()


@pytest.mark.parametrize("hold", [hold_used, hold_lock])
def test_entries_in_use_stay(hold: Callable[[CorpusCache], FileLock], tmp_path: Path) -> None:
    cache = filled(tmp_path, *KEYS[:1])
    before = cache.entries()[0]
    building_of(before.path).mkdir()
    with hold(cache):
        assert [each.in_use for each in cache.entries()] == [True, True]
        # As it was read before the lock was taken.
        assert not cache.remove(before)
        assert not cache.remove(cache.entries()[1])
    assert before.path.is_dir()


def test_an_entry_that_was_used_since_it_was_read_stays(tmp_path: Path) -> None:
    cache = filled(tmp_path, *KEYS[:1])
    (seen,) = cache.entries()
    cache.use(KEYS[0], nothing).release()
    assert not cache.remove(seen)
    assert cache.remove(cache.entries()[0])
    assert not cache.remove(seen), "it has gone"


def test_a_corpus_without_a_use_file_is_as_old_as_its_files(tmp_path: Path) -> None:
    cache = filled(tmp_path, *KEYS[:1])
    cache.used(KEYS[0]).unlink()
    for path in (cache.directory(KEYS[0]) / "tokens.bin", cache.directory(KEYS[0])):
        os.utime(path, (LONG_AGO + 7,) * 2)
    (seen,) = cache.entries()
    assert seen.used_at == LONG_AGO + 7
    assert cache.remove(seen)


def test_what_a_killed_remover_left_is_deleted(tmp_path: Path) -> None:
    cache = filled(tmp_path, *KEYS[:1])
    (tmp_path / f".{KEYS[1]}.removing-12-34").mkdir()
    cache.delete_leftovers()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [KEYS[0]]


def test_old_digests_are_deleted_unless_they_are_locked(tmp_path: Path) -> None:
    cache = CorpusCache(tmp_path)
    for name, age in (("content-00aa", 0), ("content-01bb", 0), ("content-02cc", 100)):
        (tmp_path / f"{name}.json").write_text("{}")
        os.utime(tmp_path / f"{name}.json", (LONG_AGO + age,) * 2)
    with FileLock(tmp_path / "content-01.lock") as lock:
        lock.take()
        assert cache.forget_digests(LONG_AGO + 50) == 1
    assert sorted(path.name for path in cache.digests()) == ["content-01bb.json", "content-02cc.json"]
    assert cache.forget_digests(LONG_AGO + 50) == 1


def test_waiting_for_a_use_can_be_broken_off(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    cache = filled(tmp_path, *KEYS[:1])
    with FileLock(cache.used(KEYS[0])) as lock:
        lock.take()
        with pytest.raises(Enough):
            cache.use(KEYS[0], enough)
