"""The parts of a corpus that are prepared: their keys before anything is read, and their markers in the cache.

A part is a source or a held-out set. ``prepared-KEY.json`` in the cache names the token shards of the part KEY. It is
only a hint: a run that starts compares the content of its files, and tokenizes what is missing.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.contract.cache import CorpusCache
from trainyard.contract.corpus_files import expand
from trainyard.contract.messages import Message
from trainyard.contract.rundir import read_json, write_json
from trainyard.contract.spec import DataSpec, EvalSourceSpec, SourceSpec
from trainyard.contract.tokenizer_info import BYTE, tokenizer_file


class CorpusPart(Message):
    """A source, or a held-out set, of a corpus. ``key``: see `corpus_parts`."""

    name: str
    held_out: bool = False
    key: str


class PreparedSource(Message):
    """A part of a corpus, and the key of its token shards in the cache."""

    name: str
    key: str


class PreparedCorpus(Message):
    """The token shards of a corpus. ``held_out``: those of the held-out sets with files of their own."""

    sources: tuple[PreparedSource, ...]
    held_out: tuple[PreparedSource, ...] = ()

    @property
    def keys(self) -> set[str]:
        """The keys of all token shards."""
        return {source.key for source in (*self.sources, *self.held_out)}


class PrepareTask(Message):
    """prepare.json in the directory of an attempt: its process prepares these parts of a corpus, and trains nothing.

    ``processes``: how many tokenize; null: one per core. `data.num_workers` wins over it.
    """

    parts: tuple[CorpusPart, ...]
    processes: int | None = None


def corpus_parts(data: DataSpec) -> tuple[CorpusPart, ...]:
    """Return the parts of a corpus. Their keys have the files with sizes and times, and how they are read.

    Raises OSError, CorpusFilesInvalid and TokenizerInvalid if something is not there.
    """
    common = [data.special_tokens, data.max_bad_lines, _tokenizer_identity(data.tokenizer_path)]

    def key(source: SourceSpec | EvalSourceSpec) -> str:
        return _digest([*common, source.text_field or data.text_field, _files(source.path)])

    return (
        *(CorpusPart(name=source.name, key=key(source)) for source in data.training_sources),
        *(CorpusPart(name=source.name, held_out=True, key=key(source)) for source in data.held_out_sources),
    )


def corpus_key(parts: Sequence[CorpusPart]) -> str:
    """Return the key of a corpus of these parts."""
    return _digest([[part.name, part.held_out, part.key] for part in parts])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _files(path: str | list[str]) -> list[list[Any]]:
    return [[str(file.path), *_identity(file.path)] for file in expand(path)]


def _identity(path: Path) -> list[int]:
    # Without the device: its number differs between the hosts that share a directory.
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _tokenizer_identity(tokenizer_path: str) -> list[Any]:
    if tokenizer_path == BYTE:
        return []
    file = tokenizer_file(tokenizer_path)
    config = file.with_name("tokenizer_config.json")
    return [str(file), _identity(file), _identity(config) if config.exists() else None]


def marker(cache: Path, part_key: str) -> Path:
    return cache / f"prepared-{part_key}.json"


def find_prepared(cache: Path, parts: Sequence[CorpusPart]) -> PreparedCorpus | None:
    """Return the token shards of a corpus of these parts, if all of them are in the cache."""
    shards = {part: shards_key(cache, part.key) for part in parts}
    if None in shards.values():
        return None
    named = [(part, PreparedSource(name=part.name, key=str(key))) for part, key in shards.items()]
    return PreparedCorpus(
        sources=tuple(source for part, source in named if not part.held_out),
        held_out=tuple(source for part, source in named if part.held_out),
    )


def shards_key(cache: Path, part_key: str) -> str | None:
    """Return the key of the token shards of a part, or None if the cache does not have them."""
    try:
        key = str((read_json(marker(cache, part_key)) or {})["shards"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return key if _is_complete(cache, key) else None


def _is_complete(cache: Path, key: str) -> bool:
    return (CorpusCache(cache).directory(key) / "meta.json").exists()


def is_cached(cache: Path, prepared: PreparedCorpus) -> bool:
    return all(_is_complete(cache, key) for key in prepared.keys)


def mark_prepared(cache: Path, parts: Iterable[CorpusPart], shards: Mapping[tuple[str, bool], str]) -> None:
    """Write the markers of the parts. ``shards``: (name, held_out) -> the key of the token shards. Raises OSError."""
    for part in parts:
        if (key := shards.get((part.name, part.held_out))) is not None and shards_key(cache, part.key) != key:
            write_json(marker(cache, part.key), {"shards": key})


def delete_stale_markers(cache: Path) -> None:
    """Delete the markers of parts whose token shards are not in the cache any more."""
    for path in cache.glob("prepared-*.json"):
        if shards_key(cache, path.stem.removeprefix("prepared-")) is None:
            with contextlib.suppress(OSError):
                path.unlink()
