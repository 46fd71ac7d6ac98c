"""10,000 small files: a plan by sampling, a preparation in flat memory, and a resume after a kill."""

import json
import signal
import subprocess
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainyard.client.demo.corpus import docstrings, standard_library
from trainyard.contract.corpus_files import expand
from trainyard.contract.parsing import parse_spec
from trainyard.service.planning.corpus_sample import MAX_SAMPLED_FILES
from trainyard.service.planning.preview import sample_corpus
from trainyard.worker.data.fileset import FileSetOptions, file_counts, open_files
from trainyard.worker.data.tokenizers import ByteTokenizer

pytestmark = pytest.mark.long

FILES, FEW = 10_000, 1000

BUILD = """
import json, resource, sys
from pathlib import Path
from trainyard.contract.corpus_files import expand
from trainyard.worker.data import fileset
from trainyard.worker.data.tokenizers import ByteTokenizer
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))  # no file stays open
fileset.JOURNAL_SECONDS, fileset.MIN_PART_BYTES = 0.0, 200_000
options = fileset.FileSetOptions(ByteTokenizer(), "byte", Path(sys.argv[2]), processes=1,
    progress=lambda done, total: print(done, total, flush=True))
fileset.open_files(expand(sys.argv[1]), options)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    found = list(islice(docstrings(standard_library()), FILES))
    return [*found, *(f"{text} again" for text in found[: FILES - len(found)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    made = tmp_path_factory.mktemp("many")
    for number, text in enumerate(texts):
        place = made / f"{number // 1000}"
        place.mkdir(exist_ok=True)
        (place / f"{number:05}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return made


def build(folder: Path, cache: Path, kill_at: float | None = None) -> list[str]:
    """Build in a process, and SIGKILL it after a share of the bytes, if one is given. Return what it printed."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder), str(cache)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if kill_at is not None and not line.startswith("peak"):
                done, total = map(int, line.split())
                if total and done >= kill_at * total:
                    process.send_signal(signal.SIGKILL)
                    break
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL)
    return lines


def peak_mebibytes(lines: list[str]) -> int:
    return int(lines[-1].removeprefix("peak "))


def test_a_plan_reads_a_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus_sample: Any = import_module("trainyard.service.planning.corpus_sample")
    opened: list[Path] = []
    original = corpus_sample.open_regular_inside

    def count(path: Path, *arguments: Any) -> Any:
        opened.append(path)
        return original(path, *arguments)

    monkeypatch.setattr(corpus_sample, "open_regular_inside", count)
    spec = parse_spec({"data": {"data_path": str(folder)}}).spec
    sample = sample_corpus(spec)
    assert len(opened) <= MAX_SAMPLED_FILES
    assert sample.size is not None
    assert [source.files for source in sample.sources] == [FILES]


def test_prepared_in_flat_memory_and_resumed_after_a_kill(folder: Path, texts: list[str], tmp_path: Path) -> None:
    few = build(folder / "0", tmp_path / "few")
    killed = build(folder, tmp_path / "cache", kill_at=0.5)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
    after = build(folder, tmp_path / "cache")
    first = next(int(line.split()[0]) for line in after if int(line.split()[0]))
    assert first >= 0.4 * int(killed[-1].split()[1]), "what was appended is not tokenized again"
    assert peak_mebibytes(after) - peak_mebibytes(few) < 64, "ten times as many files"
    corpus = open_files(expand(str(folder)), FileSetOptions(ByteTokenizer(), "byte", tmp_path / "cache"))
    counts = file_counts(corpus) or []
    assert [entry.tokens for entry in counts] == [len(text.encode()) + 2 for text in texts]
    for number in (0, 1, FILES // 2, FILES - 1):
        start, end = corpus.offsets[number], corpus.offsets[number + 1]
        assert bytes((np.asarray(corpus.tokens[start + 1 : end - 1]) - 3).astype(np.uint8)).decode() == texts[number]
