"""The corpora that are prepared: the key of a corpus before anything of it is read, and its marker in the cache.

``prepared-KEY.json`` in the cache says which token shards the corpus KEY has. It is only a hint: a run that starts
compares the content of its files, and tokenizes what is missing.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainyard.contract.cache import CorpusCache
from trainyard.contract.corpus_files import corpus_paths, expand
from trainyard.contract.messages import Message, read_message
from trainyard.contract.rundir import write_json
from trainyard.contract.spec import DataSpec
from trainyard.contract.tokenizer_info import BYTE, tokenizer_file

NOT_IN_TOKENS = {"max_seq_len", "packing", "eval_fraction", "num_workers"}
"""Fields of `DataSpec` that do not change the token shards."""


class PreparedSource(Message):
    """A part of a corpus, such as a source, and the key of its token shards in the cache."""

    name: str
    key: str


class PreparedCorpus(Message):
    """prepared-KEY.json. ``held_out``: those of the held-out data."""

    sources: tuple[PreparedSource, ...]
    held_out: tuple[PreparedSource, ...] = ()

    @property
    def keys(self) -> set[str]:
        """The keys of all token shards."""
        return {source.key for source in (*self.sources, *self.held_out)}


class PrepareTask(Message):
    """prepare.json in the directory of an attempt: its process prepares the corpus ``key`` and trains nothing.

    ``processes``: how many tokenize; null: one per core. `data.num_workers` wins over it.
    """

    key: str
    processes: int | None = None


def corpus_key(data: DataSpec) -> str:
    """Return the key of the corpus and its tokenizer: paths, sizes and times of the files, and how they are read.

    Raises OSError, CorpusFilesInvalid and TokenizerInvalid if something is not there.
    """
    settings = data.model_dump(mode="json", exclude=NOT_IN_TOKENS)
    for source in settings.get("sources") or ():
        source.pop("weight", None)
    for source in settings.get("eval_sources") or ():
        source.pop("max_tokens", None)
    files = [
        [name, str(file.path), *_identity(file.path)] for name, path in corpus_paths(data) for file in expand(path)
    ]
    parts = [settings, files, _tokenizer_identity(data.tokenizer_path)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _identity(path: Path) -> list[int]:
    # Without the device: its number differs between the hosts that share a directory.
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _tokenizer_identity(tokenizer_path: str) -> list[Any]:
    if tokenizer_path == BYTE:
        return []
    file = tokenizer_file(tokenizer_path)
    config = file.with_name("tokenizer_config.json")
    return [_identity(file), _identity(config) if config.exists() else None]


def marker(cache: Path, key: str) -> Path:
    return cache / f"prepared-{key}.json"


def find_prepared(cache: Path, key: str) -> PreparedCorpus | None:
    """Return the corpus ``key`` if all of its token shards are in the cache."""
    prepared = read_message(PreparedCorpus, marker(cache, key))
    return prepared if prepared is not None and is_cached(cache, prepared) else None


def is_cached(cache: Path, prepared: PreparedCorpus) -> bool:
    return all((CorpusCache(cache).directory(key) / "meta.json").exists() for key in prepared.keys)


def mark_prepared(cache: Path, key: str, prepared: PreparedCorpus) -> None:
    """Write the marker. Raises OSError."""
    write_json(marker(cache, key), prepared.model_dump(mode="json"))


def delete_stale_markers(cache: Path) -> None:
    """Delete the markers of corpora that are not complete any more."""
    for path in cache.glob("prepared-*.json"):
        if find_prepared(cache, path.stem.removeprefix("prepared-")) is None:
            with contextlib.suppress(OSError):
                os.unlink(path)


def delete_markers(cache: Path, keys: Sequence[str]) -> None:
    for key in keys:
        marker(cache, key).unlink(missing_ok=True)
