"""Tokenize a part of a corpus into token shards of its own: some files, or a piece of one large file.

`python -m trainyard.worker.data.part` does so for each line of its stdin. It imports no more than it needs, because
each process pays for the imports before its first part.
"""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.corpus_files import NamedFile
from trainyard.contract.processes import boot_id
from trainyard.contract.rundir import read_json, write_json
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.file import Piece, PrefixDiffers, ReadPosition, open_regular
from trainyard.worker.data.file_counts import FileCounts, FileKey
from trainyard.worker.data.jsonl import DataInvalid, require_unchanged
from trainyard.worker.data.readers import open_piece, open_reader
from trainyard.worker.data.shards import ShardWriter
from trainyard.worker.data.tokenization import token_bytes, tokenize_file
from trainyard.worker.data.tokenizers import Tokenizer, load_tokenizer

PROGRESS_SECONDS = 0.25
NOTHING_READ = ReadPosition.start()
PART = "part.json"


@dataclass(frozen=True)
class PartFiles:
    """The files of a part, with their keys, or a ``piece`` of its only file, and how they are read."""

    files: tuple[NamedFile, ...]
    keys: tuple[FileKey, ...]
    text_field: str
    piece: Piece | None = None
    roots: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [[file.name, str(file.path)] for file in self.files],
            "keys": [vars(key) for key in self.keys],
            "text_field": self.text_field,
            "piece": None if self.piece is None else [self.piece.start, self.piece.end],
            "roots": [str(root) for root in self.roots],
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "PartFiles":
        return cls(
            tuple(NamedFile(name, Path(path)) for name, path in raw["files"]),
            tuple(FileKey(**key) for key in raw["keys"]),
            raw["text_field"],
            None if raw["piece"] is None else Piece(*raw["piece"]),
            tuple(Path(root) for root in raw["roots"]),
        )


def tokenize_part(
    directory: Path, part: PartFiles, tokenizer: Tokenizer, progress: Callable[[int], None]
) -> list[FileCounts]:
    """Tokenize ``part`` into token shards in ``directory``, and return its counts. A complete part is only read.

    The ``content`` of the counts of a piece is the sha256 of its bytes. The caller must compare it with the file's.
    """
    if (stored := _read_complete(directory)) is not None:
        return stored
    write = partial(_write_part, directory, part, tokenizer, progress)
    if len(part.files) > 1:
        shutil.rmtree(directory, ignore_errors=True)  # only a part of one file has a journal
    try:
        return write()
    except PrefixDiffers:
        # The stored part belongs to a file with other bytes.
        shutil.rmtree(directory)
        return write()


def _read_complete(directory: Path) -> list[FileCounts] | None:
    """Return the counts of a part that is complete, or None.

    Parts are not fsynced, since they are copied soon. So a power cut may leave one without its data.
    """
    try:
        stored = read_json(directory / PART)
    except ValueError:
        return None
    if stored is None or stored.get("boot") != boot_id():
        return None
    return [FileCounts.from_json(entry) for entry in stored["files"]]


def _write_part(
    directory: Path, part: PartFiles, tokenizer: Tokenizer, progress: Callable[[int], None]
) -> list[FileCounts]:
    directory.mkdir(parents=True, exist_ok=True)
    counts: list[FileCounts] = []
    with ShardWriter(directory, tokenizer, token_bytes(tokenizer), lambda: NOTHING_READ, durable=False) as shards:
        done = 0
        for file, key in zip(part.files, part.keys, strict=True):
            report = partial(_report_after, progress, done)
            counts.append(_tokenize(file, key, part, shards, tokenizer, report))
            done += counts[-1].bytes
    stored = {"files": [entry.to_json() for entry in counts], "boot": boot_id()}
    write_json(directory / PART, stored, indent=None, durable=False)
    return counts


def _report_after(progress: Callable[[int], None], before: int, size: int) -> None:
    progress(before + size)


def _tokenize(
    file: NamedFile,
    key: FileKey,
    part: PartFiles,
    shards: ShardWriter,
    tokenizer: Tokenizer,
    progress: Callable[[int], None],
) -> FileCounts:
    before, piece = shards.tokens, part.piece
    with (
        open_regular(file.path, part.roots) as opened,
        open_reader(file.path, opened) if piece is None else open_piece(file.path, opened, piece, key.plain) as reader,
    ):
        shards.position = lambda: reader.position
        if (entry := shards.resumed_from) is not None:
            before = 0
            reader.skip(entry.stats, entry.position, lambda: progress(reader.bytes_read))
        stats = tokenize_file(reader, tokenizer, part.text_field, shards, lambda done, _: progress(done))
        if piece is None and reader.digest != key.content:
            require_unchanged(file.path)
        return FileCounts(reader.digest, key.plain, reader.size, shards.tokens - before, stats)


def main() -> int:
    """Tokenize the part that each line of stdin names; write progress and results to stdout, one JSON object a line."""
    # A stop of the whole process tree must not end a part before the process that waits for it has stored its journal.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tokenizer: Tokenizer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        part = PartFiles.from_json(request["part"])
        reported_at = 0.0

        def report(done: int) -> None:
            nonlocal reported_at
            if time.monotonic() - reported_at >= PROGRESS_SECONDS:
                reported_at = time.monotonic()
                print(json.dumps({"done": done}), flush=True)

        try:
            if tokenizer is None:
                tokenizer = load_tokenizer(request["tokenizer_path"], request["special_tokens"], part.roots)
                if tokenizer.fingerprint != request["fingerprint"]:
                    raise DataInvalid("the tokenizer was changed while the corpus was tokenized: start again")
            counts = tokenize_part(Path(request["directory"]), part, tokenizer, report)
            answer: dict[str, Any] = {"files": [entry.to_json() for entry in counts]}
        except (DataInvalid, TokenizerInvalid) as error:
            answer = {"invalid": str(error)}
        except OutsideRoots as error:
            answer = {"outside": error.reason, "path": str(error.filename)}
        except OSError as error:
            answer = {"failed": str(error), "errno": error.errno}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
