"""The commands `trainyard corpus show` and `trainyard corpus sample`: what a corpus holds, and some documents of it."""

import argparse
import heapq
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from trainyard.contract.cache import KEY, CorpusCache
from trainyard.contract.corpus_files import CorpusFilesInvalid, NamedFile, expand, shown
from trainyard.contract.corpus_page import report_lines
from trainyard.contract.corpus_report import CorpusReport, SourceReport
from trainyard.contract.stdio import run_command
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.contract.units import counted
from trainyard.worker.data.corpus import files_label
from trainyard.worker.data.fileset import FileSetOptions, TokenizerProcessEnded, describe, open_files
from trainyard.worker.data.jsonl import DataInvalid, ParseStats
from trainyard.worker.data.readers import open_reader
from trainyard.worker.data.tokenizers import load_tokenizer
from trainyard.worker.splitmix import GAMMA, splitmix64

PROGRESS_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m trainyard.worker.data.inspection show|sample``. Exit code 1: failure; 2: usage."""
    parser = argparse.ArgumentParser(prog="trainyard corpus", description="What is in a corpus.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    showing = verbs.add_parser("show", help="describe a corpus; tokenize it first if it is not in the cache")
    showing.add_argument(
        "paths", nargs="+", metavar="PATH", help="as in data_path, or a key of `trainyard corpus list`"
    )
    showing.add_argument("--tokenizer", "--tokenizer_path", default="byte", metavar="DIR", help='or "byte"')
    showing.add_argument("--special-tokens", "--special_tokens", choices=["text", "tokens"], default="text")
    showing.add_argument("--json", action="store_true", help="one JSON document")
    sampling = verbs.add_parser("sample", help="write a random sample of the documents")
    sampling.add_argument("out", type=Path, metavar="OUT.jsonl", help="must not exist yet")
    sampling.add_argument("paths", nargs="+", metavar="PATH", help="as in data_path")
    sampling.add_argument("--documents", type=_positive, default=1000, metavar="N")
    sampling.add_argument("--seed", type=int, default=42, metavar="N")
    for each in (showing, sampling):
        each.add_argument("--text-field", "--text_field", default="text", metavar="KEY", help="key of the text")
    options = parser.parse_args(arguments)
    try:
        return show(options) if options.verb == "show" else sample(options)
    except (DataInvalid, CorpusFilesInvalid, TokenizerInvalid, TokenizerProcessEnded, OSError) as error:
        print(f"trainyard corpus: {error}", file=sys.stderr)
        return 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number from 1")
    return int(text)


def show(options: argparse.Namespace) -> int:
    """Print the report of a corpus of the cache, or of files. Raises what `open_files` raises."""
    report = CorpusReport.of([_cached_report(options.paths) or _report_of_files(options)])
    if options.json:
        print(report.model_dump_json())
    else:
        print(*report_lines(report), sep="\n")
    return 0


def cache_directory() -> Path:
    """Return the corpus cache that the environment names, as the service does."""
    home = Path(os.environ.get("TRAINYARD_HOME") or "trainyard-home")
    return Path(os.environ.get("TRAINYARD_CORPUS_CACHE") or home / "cache" / "corpus")


def _cached_report(paths: Sequence[str]) -> SourceReport | None:
    """Return the report of the corpus whose key in the cache was given, or None if files were."""
    if len(paths) > 1 or KEY.fullmatch(paths[0]) is None or os.path.lexists(paths[0]):
        return None
    directory = CorpusCache(cache_directory()).directory(paths[0])
    report = SourceReport.read(directory)
    if report is None and directory.exists():
        raise DataInvalid(f"{paths[0]} was tokenized by an older release: give its files, and it is described")
    if report is None:
        raise DataInvalid(f"{paths[0]} is not in the cache {shown(cache_directory())}: see `trainyard corpus list`")
    return report


def _report_of_files(options: argparse.Namespace) -> SourceReport:
    files = expand(options.paths)
    tokenizer = load_tokenizer(options.tokenizer, options.special_tokens)
    cache = cache_directory()
    cache.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _progress_on_stderr() as progress:
        settings = FileSetOptions(
            tokenizer,
            options.tokenizer,
            cache,
            text_field=options.text_field,
            max_bad_lines=1.0,  # a report of a bad corpus says what is bad
            special_tokens=options.special_tokens,
            progress=progress,
        )
        return describe(open_files(files, settings), files, settings)


@contextmanager
def _progress_on_stderr() -> Iterator[Callable[[int, int], None]]:
    """Yield a progress callback that replaces one line of a terminal; elsewhere it prints nothing."""
    terminal, printed_at = sys.stderr.isatty(), time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal printed_at
        if terminal and total and time.monotonic() - printed_at >= PROGRESS_SECONDS:
            printed_at = time.monotonic()
            print(f"\rtokenized {100 * done / total:.0f} %\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def sample(options: argparse.Namespace) -> int:
    """Write a random sample of the documents, in their order. Raises DataInvalid, CorpusFilesInvalid and OSError."""
    if os.path.lexists(options.out):
        raise DataInvalid(f"{shown(options.out)} exists already: name a file that does not, or remove it")
    found = write_sample(expand(options.paths), options.out, options.documents, options.seed, options.text_field)
    print(f"{shown(options.out)}: {counted(found.written, 'document')} of {found.documents:,}")
    if found.bad:
        print(f"{counted(found.bad, 'bad document')} left out: see `trainyard corpus check`", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class SampleCounts:
    """Documents that were written, those that the files have, and the bad ones that were left out."""

    written: int
    documents: int
    bad: int


def write_sample(files: Sequence[NamedFile], out: Path, documents: int, seed: int, text_field: str) -> SampleCounts:
    """Write ``documents`` of the documents of ``files`` to ``out`` as JSONL, or all if there are fewer.

    Each document is as likely as any other. The sample is a function of the texts' order, ``documents`` and ``seed``; a
    larger one has the documents of a smaller one. Memory is constant: texts that may be in the sample are in a file.

    Raises DataInvalid if a file cannot be read or no document is found, FileExistsError and OSError.
    """
    chosen: list[tuple[int, int, int, int]] = []  # a heap of (-key, document, offset, length): the largest key is first
    total, stats = 0, ParseStats()
    with tempfile.TemporaryFile(dir=out.parent) as texts:
        for file in files:
            with open_reader(file.path) as reader:
                for document in reader.documents(text_field):
                    key = _key(total, seed)
                    if len(chosen) < documents or -key > chosen[0][0]:
                        entry = (-key, total, *_store(texts, document.text))
                        (heapq.heappush if len(chosen) < documents else heapq.heapreplace)(chosen, entry)
                    total += 1
            stats.add(reader.stats)
        if not total:
            raise DataInvalid(f"{files_label(files)} {stats.empty_reason(text_field)}")
        _write_chosen(texts, sorted(entry[1:] for entry in chosen), out)
    return SampleCounts(len(chosen), total, stats.bad_lines)


def _key(number: int, seed: int) -> int:
    """Return the random 64-bit number of a document. The documents with the smallest ones are the sample."""
    return int(splitmix64(np.array([number + 1], np.uint64) * GAMMA, seed)[0])


def _store(texts: IO[bytes], text: str) -> tuple[int, int]:
    line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
    offset = texts.seek(0, os.SEEK_END)
    texts.write(line)
    return offset, len(line)


def _write_chosen(texts: IO[bytes], chosen: Sequence[tuple[int, int, int]], out: Path) -> None:
    writing = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with writing.open("xb") as file:
            for _, offset, length in chosen:
                texts.seek(offset)
                file.write(texts.read(length))
            file.flush()
            os.fsync(file.fileno())
        writing.rename(out)
    finally:
        writing.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_command("trainyard corpus", main))
