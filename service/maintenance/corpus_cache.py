"""Removal of unused corpora from the cache; also the command ``python -m trainyard.service.maintenance.corpus_cache``.

A run that resumes tokenizes a removed corpus again, to the same bytes. A corpus that a live run has open is never
removed.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from trainyard.contract.cache import CacheEntry, CorpusCache
from trainyard.contract.corpus_files import shown
from trainyard.contract.corpus_report import SourceReport
from trainyard.contract.prepared import delete_stale_markers
from trainyard.contract.rundir import read_json
from trainyard.contract.stdio import run_command
from trainyard.contract.units import counted, human_bytes
from trainyard.service.settings import InvalidSettings, Settings

DAY = 86400.0
INTERVAL_SECONDS = 3600.0

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class CacheLimits:
    """Corpora unused for ``days`` are removed, then the least recently used, down to ``size`` bytes. 0: no limit."""

    days: int
    size: int


def corpora_to_delete(kept: Sequence[CacheEntry], limits: CacheLimits, now: float) -> list[CacheEntry]:
    """Return the entries to remove, the least recently used first. ``now`` is in seconds since 1970."""
    free = sorted((entry for entry in kept if not entry.in_use), key=lambda entry: entry.used_at)
    old = [entry for entry in free if limits.days and now - entry.used_at > limits.days * DAY]
    to_delete, left = old, sum(entry.bytes for entry in kept) - sum(entry.bytes for entry in old)
    for entry in free[len(old) :]:
        if not limits.size or left <= limits.size:
            break
        to_delete, left = [*to_delete, entry], left - entry.bytes
    return to_delete


@dataclass
class CorpusCachePruner:
    """Keeps the cache of this host within ``limits``."""

    cache: CorpusCache
    limits: CacheLimits
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    _due_at: float = field(default=0.0)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(CorpusCache(settings.corpus_cache), CacheLimits(settings.corpus_days, settings.corpus_bytes))

    def prune_when_due(self) -> None:
        """Prune, at most once an hour."""
        if self.monotonic() >= self._due_at:
            self._due_at = self.monotonic() + INTERVAL_SECONDS
            self.prune()

    def prune(self) -> list[CacheEntry]:
        """Remove what exceeds the limits, and return it."""
        self.cache.delete_leftovers()
        to_delete = corpora_to_delete(self.cache.entries(), self.limits, self.clock())
        deleted = [entry for entry in to_delete if self.cache.remove(entry)]
        for entry in deleted:
            what = "corpus" if entry.is_complete else "unfinished corpus"
            log.info("%s %s of %d bytes was removed from the cache: unused", what, entry.key, entry.bytes)
        delete_stale_markers(self.cache.path)
        if self.limits.days:
            self.cache.forget_digests(self.clock() - self.limits.days * DAY)
        return deleted


def main(arguments: Sequence[str] | None = None) -> int:
    """List or prune the cache. Return the exit code."""
    parser = argparse.ArgumentParser(prog="trainyard corpus", description="The tokenized corpora of this host")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="list the cache, the least recently used first")
    listing.add_argument("--json", action="store_true", help="one JSON document")
    pruning = verbs.add_parser("prune", help="remove unused corpora now")
    pruning.add_argument("--days", type=_whole_number, help="unused for longer; 0: none by age (TRAINYARD_CORPUS_DAYS)")
    pruning.add_argument("--bytes", type=_whole_number, help="until the cache is no larger; 0: any size")
    options = parser.parse_args(arguments)
    try:
        pruner = CorpusCachePruner.of(Settings.read(os.environ, host="127.0.0.1"))
        kept = pruner.cache.entries()
        paths = _paths(pruner.cache, kept)
        names = {entry.key: _names(pruner.cache, entry.key) for entry in kept if entry.is_complete}
        listed = kept if options.verb == "list" else _prune(pruner, options)
    except (InvalidSettings, OSError) as error:
        print(f"trainyard corpus: {error}", file=sys.stderr)
        return 1
    if options.verb == "list" and options.json:
        rows = [_to_json(entry, paths.get(entry.path.name, "")) for entry in kept]
        print(json.dumps({"object": "list", "data": rows, "has_more": False}))
        return 0
    for entry in listed:
        print(format_entry(entry, paths.get(entry.path.name) or names.get(entry.key, ""), pruner.clock()))
    total = human_bytes(sum(entry.bytes for entry in listed))
    print(f"{len(listed):,} {'kept' if options.verb == 'list' else 'removed'}, {total}")
    return 0


def _to_json(entry: CacheEntry, path: str) -> dict[str, Any]:
    used_at = datetime.fromtimestamp(entry.used_at, UTC).isoformat().replace("+00:00", "Z")
    state = {"in_use": entry.in_use, "whole": entry.is_complete, "used_at": used_at}
    return {"object": "corpus", "key": entry.key, "bytes": entry.bytes, "path": path or None, **state}


def _whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a whole number")
    return int(text)


def _prune(pruner: CorpusCachePruner, options: argparse.Namespace) -> list[CacheEntry]:
    days = options.days if options.days is not None else pruner.limits.days
    size = options.bytes if options.bytes is not None else pruner.limits.size
    pruner.limits = CacheLimits(days, size)
    return pruner.prune()


def format_entry(entry: CacheEntry, path: str, now: float) -> str:
    """``0123abcd  1.2 GB  3 days ago  in use  /data/corpus.jsonl``."""
    days = int((now - entry.used_at) / DAY)
    when = "today" if days < 1 else f"{days} days ago" if days > 1 else "yesterday"
    state = "in use" if entry.in_use else "" if entry.is_complete else "unfinished"
    return f"{entry.key}  {human_bytes(entry.bytes):>9}  {when:<13} {state:<10}  {path}".rstrip()


def _paths(cache: CorpusCache, kept: Sequence[CacheEntry]) -> dict[str, str]:
    # The source file of each corpus. A digest is remembered only while its file is unchanged, so some are unknown.
    digests = [read_json(path) or {} for path in cache.digests()]
    files = {str(entry.get("sha256")): str(entry.get("path", "")) for entry in digests}
    metas = {entry.path.name: read_json(entry.path / "meta.json") or {} for entry in kept if entry.is_complete}
    return {name: files.get(str(meta.get("content")), "") for name, meta in metas.items()}


def _names(cache: CorpusCache, key: str) -> str:
    """Return the first file of a corpus of several files and how many more there are, or "" if it has no report."""
    report = SourceReport.read(cache.directory(key))
    if report is None or not report.listed:
        return ""
    more = f", and {counted(report.files - 1, 'more file')}" if report.files > 1 else ""
    return f"{shown(report.listed[0].file)}{more}"


if __name__ == "__main__":
    sys.exit(run_command("trainyard corpus", main))
