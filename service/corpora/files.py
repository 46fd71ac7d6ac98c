"""The files of a corpus: its token shards in the cache, and the directory of its preparations."""

import shutil
from pathlib import Path

from trainyard.contract.cache import CorpusCache
from trainyard.contract.locks import is_held
from trainyard.contract.prepared import PreparedCorpus, delete_stale_markers


def is_open(cache: Path, prepared: PreparedCorpus) -> bool:
    """Return whether a process has one of the token shards open."""
    store = CorpusCache(cache)
    return any(is_held(store.used(key)) for key in prepared.keys)


def delete_corpus_files(cache: Path, prepared: PreparedCorpus | None) -> None:
    """Delete these token shards and their markers, but none that a process has open."""
    if prepared is None:
        return
    store = CorpusCache(cache)
    for entry in store.entries():
        if entry.key in prepared.keys:
            store.remove(entry)
    delete_stale_markers(cache)


def delete_run_directory(home: Path, corpus_id: str) -> None:
    """Delete the logs of the preparations."""
    shutil.rmtree(home / "corpora" / corpus_id, ignore_errors=True)
