"""Speed of building token shards from a file, against the tokenizers library encoding the same texts."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer as Library

from benchmarks.baselines import Ratio
from benchmarks.corpus import write_docstrings
from trainyard.worker.data.corpus import open_corpus
from trainyard.worker.data.readers import open_reader
from trainyard.worker.data.tokenizers import FileTokenizer, train_tokenizer

DOCSTRINGS = 7000
COPIES = 3
ROUNDS = 5
GOAL = 0.8


def main() -> list[Ratio]:
    """Alternate the two, so that a slow minute of the machine affects both."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        file = root / "corpus.jsonl"
        write_docstrings(file, DOCSTRINGS)
        file.write_bytes(file.read_bytes() * COPIES)
        with open_reader(file) as reader:
            texts = [document.text for document in reader.documents("text")]
        train_tokenizer(texts[:DOCSTRINGS], 6400, root)
        tokenizer, library = FileTokenizer(root / "tokenizer.json"), Library.from_file(str(root / "tokenizer.json"))
        library.encode_batch(texts[:1000])
        tokenizer.encode_batch(texts[:1000])
        alone, whole = [], []
        for number in range(ROUNDS):
            alone.append(_seconds(partial(library.encode_batch, texts, add_special_tokens=False)))
            whole.append(_seconds(partial(open_corpus, file, tokenizer, cache=root / f"cache-{number}")))
    return _report(alone, whole, sum(len(text.encode()) for text in texts) / 1e6)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _report(alone: list[float], whole: list[float], megabytes: float) -> list[Ratio]:
    ratio = statistics.median(a / w for a, w in zip(alone, whole, strict=True))
    print(f"the library's encode_batch   {megabytes / statistics.median(alone):6.2f} MB/s ({os.cpu_count()} cores)")
    print(f"file to shards               {megabytes / statistics.median(whole):6.2f} MB/s")
    print(f"ratio                        {ratio:6.1%} (median of {ROUNDS} pairs; goal: at least {GOAL:.0%})")
    return [Ratio("corpus_speed: file to shards, to the library", ratio)]
