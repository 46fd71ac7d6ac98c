"""Unused corpora are removed from the cache, once an hour or by the command."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_cache import KEYS, LONG_AGO, filled, nothing
from trainyard.contract.cache import CacheEntry, CorpusCache
from trainyard.contract.corpus_report import FileReport, SourceReport
from trainyard.service.maintenance.corpus_cache import (
    DAY,
    CacheLimits,
    CorpusCachePruner,
    corpora_to_delete,
    main,
)

NOW = LONG_AGO + 100 * DAY


def kept(*entries: tuple[float, int, bool]) -> list[CacheEntry]:
    """(days since its last use, bytes, in use) of each."""
    return [
        CacheEntry(str(n), Path(str(n)), size, NOW - days * DAY, used) for n, (days, size, used) in enumerate(entries)
    ]


@pytest.mark.parametrize(
    ("entries", "limits", "gone"),
    [
        ([], CacheLimits(1, 1), ""),
        ([(31, 5, False), (29, 5, False)], CacheLimits(30, 0), "0"),
        ([(31, 5, True), (40, 5, False)], CacheLimits(30, 0), "1"),
        ([(31, 5, False)], CacheLimits(0, 0), ""),
        ([(3, 5, False), (9, 5, False), (1, 5, False)], CacheLimits(30, 10), "1"),
        ([(3, 5, False), (9, 5, False), (1, 5, False)], CacheLimits(30, 9), "10"),
        ([(3, 5, False), (9, 5, True), (1, 5, False)], CacheLimits(30, 9), "02"),
        ([(3, 5, False), (40, 5, False), (1, 5, False)], CacheLimits(30, 10), "1"),
        ([(3, 50, True), (2, 5, False)], CacheLimits(0, 10), "1"),
        ([(3, 5, False)], CacheLimits(0, 5), ""),
    ],
)
def test_corpora_to_delete(entries: list[tuple[float, int, bool]], limits: CacheLimits, gone: str) -> None:
    assert "".join(each.key for each in corpora_to_delete(kept(*entries), limits, NOW)) == gone


def test_the_cache_is_pruned_once_an_hour(tmp_path: Path) -> None:
    cache, ticks = filled(tmp_path, *KEYS), [0.0]
    shelf = CorpusCachePruner(cache, CacheLimits(30, 0), clock=lambda: NOW, monotonic=lambda: ticks[0])
    with cache.use(KEYS[1], nothing):
        os.utime(cache.used(KEYS[1]), (LONG_AGO, LONG_AGO))
        shelf.prune_when_due()
        assert [each.key for each in cache.entries()] == [KEYS[1]]
        (cache.directory(KEYS[0])).mkdir()
        os.utime(cache.used(KEYS[0]), (LONG_AGO, LONG_AGO))
        ticks[0] = 3599.0
        shelf.prune_when_due()
        assert len(cache.entries()) == 2
        ticks[0] = 3600.0
        shelf.prune_when_due()
        assert [each.key for each in cache.entries()] == [KEYS[1]], "a run has it open, however old it is"


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def report_of(listed: list[FileReport]) -> SourceReport:
    counts = dict.fromkeys(
        ("bytes", "documents", "tokens", "text_bytes", "vocab_size", "vocab_used", "bad_documents"), 1
    )
    empty = {"name": "data", "lengths": (), "bad": (), "samples": (), "duplicates": 0, "text_field": "text"}
    unknown = {"bytes_per_token": None, "single_byte_share": None, "tokenizer": ""}
    return SourceReport.model_validate({**counts, **empty, **unknown, "files": len(listed), "listed": listed})


def test_the_command_lists_and_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = filled(tmp_path, *KEYS, size=3_000_000)
    (cache.directory(KEYS[0]) / "meta.json").write_text('{"content": "abc"}')
    (tmp_path / "content-00.json").write_text('{"sha256": "abc", "path": "/data/c.jsonl"}')
    monkeypatch.setenv("TRAINYARD_CORPUS_CACHE", str(tmp_path))
    cache.use(KEYS[2], nothing).release()
    # The clock of files ticks every few milliseconds: without this, two uses may have the same time.
    os.utime(cache.used(KEYS[2]), (time.time() - 60,) * 2)
    with cache.use(KEYS[1], nothing):
        first, second, third, last = command("list", capsys=capsys)
        assert first.startswith(f"{KEYS[0]}     3.0 MB  ")
        assert first.split()[-3:] == ["days", "ago", "/data/c.jsonl"]
        assert (second.split()[3:], third.split()[3:]) == (["today"], ["today", "in", "use"])
        assert last == "3 kept, 9.0 MB"
        (told,) = map(json.loads, command("list", "--json", capsys=capsys))
        shown = [(row["path"], row["in_use"]) for row in told["data"]]
        assert shown == [("/data/c.jsonl", False), (None, False), (None, True)]
        listed = [FileReport(file=name, bytes=1, documents=1, tokens=1, bad_documents=0) for name in ("a\nb", "c", "d")]
        (cache.directory(KEYS[1]) / "report.json").write_text(report_of(listed).model_dump_json())
        assert "today         in use      'a\\nb', and 2 more files" in command("list", capsys=capsys)[2]
        assert all(row["used_at"].endswith("Z") and row["bytes"] >= 3_000_000 for row in told["data"])
        assert command("prune", "--days", "0", capsys=capsys) == ["0 removed, 0 B"]
        gone = command("prune", capsys=capsys)
        assert gone[0].endswith("/data/c.jsonl")
        assert gone[1:] == ["1 removed, 3.0 MB"]
        assert command("prune", "--bytes", "1", capsys=capsys)[-1] == "1 removed, 3.0 MB"
        assert [each.key for each in cache.entries()] == [KEYS[1]]
    with pytest.raises(SystemExit):
        main(["prune", "--days", "-1"])


def test_the_settings_are_the_limits(tmp_path: Path) -> None:
    from trainyard.service.settings import Settings

    environment: dict[str, Any] = {"TRAINYARD_HOME": str(tmp_path), "TRAINYARD_CORPUS_BYTES": "7"}
    shelf = CorpusCachePruner.of(Settings.read(environment))
    assert (shelf.limits, shelf.cache) == (CacheLimits(30, 7), CorpusCache(tmp_path / "cache" / "corpus"))
