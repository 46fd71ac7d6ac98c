"""The counts of each file of a corpus that was made of several: ``files.json`` in its directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from trainyard.contract.rundir import read_json, write_json
from trainyard.worker.data.jsonl import ParseStats

FILES = "files.json"


@dataclass(frozen=True)
class FileKey:
    """What decides the tokens of a file: the sha256 of its bytes, and whether blank lines separate its documents.

    ``sketch``: see `contract.corpus_files.file_sketch`.
    """

    content: str
    plain: bool
    sketch: str = field(default="", compare=False)


@dataclass(frozen=True)
class FileCounts:
    """An entry of files.json. ``tokens`` includes BOS and EOS."""

    content: str
    plain: bool
    bytes: int
    tokens: int
    stats: ParseStats

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        stats = dict(raw["stats"])
        examples = [(int(line), str(reason)) for line, reason in stats.pop("examples")]
        return cls(**{**raw, "stats": ParseStats(**stats, examples=examples)})

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "stats": vars(self.stats)}  # dataclasses.asdict copies everything, which is slow

    def followed_by(self, more: Self) -> Self:
        """Return the counts of the first pieces of a file together with those of the next one."""
        stats = self.stats.followed_by(more.stats)
        return replace(self, bytes=self.bytes + more.bytes, tokens=self.tokens + more.tokens, stats=stats)

    @property
    def key(self) -> FileKey:
        return FileKey(self.content, self.plain)


def read_counts(path: Path) -> list[FileCounts] | None:
    """Return the counts in ``path``, or None if there is no such file."""
    raw = read_json(path)
    return None if raw is None else [FileCounts.from_json(entry) for entry in raw["files"]]


def write_counts(path: Path, counts: Sequence[FileCounts]) -> None:
    """Write what `read_counts` reads. Raises OSError."""
    write_json(path, {"files": [entry.to_json() for entry in counts]}, indent=None)
