"""Corpora that nobody uses leave the cache; also a command: ``python -m trainyard.service.maintenance.corpus_cache``.

A run that goes on tokenizes anew what has left, to the same bytes. What a live run has open never leaves.
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
from trainyard.contract.rundir import read_json
from trainyard.contract.units import human_bytes
from trainyard.service.settings import InvalidSettings, Settings

DAY = 86400.0
EVERY_SECONDS = 3600.0

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class Limits:
    """What has not been used for so many ``days`` goes, and what is used least until the rest has ``size`` bytes.

    0: this limit does not count.
    """

    days: int
    size: int


def corpora_to_delete(kept: Sequence[CacheEntry], limits: Limits, now: float) -> list[CacheEntry]:
    """What is to go, of everything in the cache, the least lately used first. ``now``: seconds since 1970."""
    free = sorted((each for each in kept if not each.in_use), key=lambda each: each.used_at)
    old = [each for each in free if limits.days and now - each.used_at > limits.days * DAY]
    going, left = old, sum(each.bytes for each in kept) - sum(each.bytes for each in old)
    for each in free[len(old) :]:
        if not limits.size or left <= limits.size:
            break
        going, left = [*going, each], left - each.bytes
    return going


@dataclass
class CorpusCachePruner:
    """The cache of this host and what may stay in it."""

    cache: CorpusCache
    limits: Limits
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    _due_at: float = field(default=0.0)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings say."""
        return cls(CorpusCache(settings.corpus_cache), Limits(settings.corpus_days, settings.corpus_bytes))

    def prune_when_due(self) -> None:
        """`tidy`, once an hour."""
        if self.monotonic() >= self._due_at:
            self._due_at = self.monotonic() + EVERY_SECONDS
            self.prune()

    def prune(self) -> list[CacheEntry]:
        """Remove what is surplus; what was removed."""
        self.cache.delete_leftovers()
        going = corpora_to_delete(self.cache.entries(), self.limits, self.clock())
        gone = [each for each in going if self.cache.remove(each)]
        for each in gone:
            what = "corpus" if each.is_complete else "unfinished corpus"
            log.info("%s %s of %d bytes has left the cache: nobody uses it", what, each.key, each.bytes)
        if self.limits.days:
            self.cache.forget_digests(self.clock() - self.limits.days * DAY)
        return gone


def main(arguments: Sequence[str] | None = None) -> int:
    """List the cache, or remove what is surplus; the answer is an exit code."""
    parser = argparse.ArgumentParser(prog="trainyard corpus", description="The corpora that are tokenized on this host")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="what is in the cache, the least lately used first")
    listing.add_argument("--json", action="store_true", help="one JSON document")
    pruning = verbs.add_parser("prune", help="remove what nobody uses, now")
    pruning.add_argument("--days", type=_whole, help="unused for longer; 0: any age (TRAINYARD_CORPUS_DAYS)")
    pruning.add_argument("--bytes", type=_whole, help="until the cache is no larger; 0: any size")
    given = parser.parse_args(arguments)
    try:
        shelf = CorpusCachePruner.of(Settings.read(os.environ, host="127.0.0.1"))
        kept = shelf.cache.entries()
        paths = _paths(shelf.cache, kept)
        shown = kept if given.verb == "list" else _pruned(shelf, given)
    except (InvalidSettings, OSError) as error:
        print(f"trainyard corpus: {error}", file=sys.stderr)
        return 1
    if given.verb == "list" and given.json:
        rows = [_row(each, paths.get(each.path.name, "")) for each in kept]
        print(json.dumps({"object": "list", "data": rows, "has_more": False}))
        return 0
    for each in shown:
        print(line(each, paths.get(each.path.name, ""), shelf.clock()))
    print(f"{len(shown):,} {'kept' if given.verb == 'list' else 'removed'}, {human_bytes(sum(k.bytes for k in shown))}")
    return 0


def _row(kept: CacheEntry, path: str) -> dict[str, Any]:
    used_at = datetime.fromtimestamp(kept.used_at, UTC).isoformat().replace("+00:00", "Z")
    state = {"in_use": kept.in_use, "whole": kept.is_complete, "used_at": used_at}
    return {"object": "corpus", "key": kept.key, "bytes": kept.bytes, "path": path or None, **state}


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a whole number")
    return int(text)


def _pruned(shelf: CorpusCachePruner, given: argparse.Namespace) -> list[CacheEntry]:
    days = given.days if given.days is not None else shelf.limits.days
    size = given.bytes if given.bytes is not None else shelf.limits.size
    shelf.limits = Limits(days, size)
    return shelf.prune()


def line(kept: CacheEntry, path: str, now: float) -> str:
    """``0123abcd  1.2 GB  3 days ago  in use  /data/corpus.jsonl``."""
    days = int((now - kept.used_at) / DAY)
    when = "today" if days < 1 else f"{days} days ago" if days > 1 else "yesterday"
    state = "in use" if kept.in_use else "" if kept.is_complete else "unfinished"
    return f"{kept.key}  {human_bytes(kept.bytes):>9}  {when:<13} {state:<10}  {path}".rstrip()


def _paths(cache: CorpusCache, kept: Sequence[CacheEntry]) -> dict[str, str]:
    """Which file each corpus is of, as far as that is remembered: a digest is, for as long as its file is the same."""
    noted = [read_json(path) or {} for path in cache.digests()]
    files = {str(each.get("sha256")): str(each.get("path", "")) for each in noted}
    metas = {each.path.name: read_json(each.path / "meta.json") or {} for each in kept if each.is_complete}
    return {name: files.get(str(meta.get("content")), "") for name, meta in metas.items()}


if __name__ == "__main__":
    sys.exit(main())
