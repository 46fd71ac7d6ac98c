"""Speed of tokenizing many files, against the tokenizers library on the same texts, on one core and on two.

Also the times of a corpus of 10,000 files: its plan, and its start at step 1,000,000 from the cache.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from trainyard.client.demo.corpus import docstrings, standard_library
from trainyard.contract.parsing import parse_spec
from trainyard.contract.rundir import RunDir
from trainyard.service.planning.preview import sample_corpus
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.data.tokenizers import train_tokenizer
from trainyard.worker.distributed import DistributedContext

DOCSTRINGS = 7000
FILES, COPIES = 100, 6
SHARDS = 10_000
ROUNDS = 5
CORE_GOAL, SCALING_GOAL = 0.9, 1.8
STEP = 1_000_000
START_GOAL, PLAN_GOAL = 2.0, 1.0

PROGRAM = """
import json, os, resource, sys, time
from pathlib import Path
kind, cores, root, cache = sys.argv[1:]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = cores, "true"
from tokenizers import Tokenizer
from trainyard.contract.corpus_files import expand
from trainyard.worker.data.fileset import FileSetOptions, open_files
from trainyard.worker.data.tokenizers import FileTokenizer
files = expand(f"{root}/data")
texts = [json.loads(line)["text"] for file in files for line in file.path.open()] if kind == "library" else []
library, tokenizer = Tokenizer.from_file(f"{root}/tokenizer.json"), FileTokenizer(Path(root, "tokenizer.json"))
def used():
    found = [resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)
wall, cpu = time.perf_counter(), used()
if kind == "library":
    library.encode_batch(texts, add_special_tokens=False)
else:
    open_files(files, FileSetOptions(tokenizer, root, Path(cache), processes=int(cores)))
print(json.dumps([time.perf_counter() - wall, used() - cpu]))
"""


class Seconds(NamedTuple):
    """Elapsed seconds, and those of all cores together."""

    wall: float
    cpu: float


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _compare_with_library(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        _start_from_many_shards(Path(folder))


def _compare_with_library(root: Path) -> None:
    """Let the programs take turns, so that a slow minute of the machine affects all of them."""
    texts = list(islice(docstrings(standard_library()), DOCSTRINGS))
    train_tokenizer(texts, 6400, root)
    _write_files(root / "data", [f"{text} {copy}" for copy in range(COPIES) for text in texts], FILES)
    wanted = [("library", 1), ("files", 1), ("library", 2), ("files", 2)]
    rounds = [[_run(kind, cores, root) for kind, cores in wanted] for _ in range(ROUNDS)]
    megabytes = sum(file.stat().st_size for file in (root / "data").iterdir()) / 1e6
    for number, (kind, cores) in enumerate(wanted):
        wall = statistics.median(each[number].wall for each in rounds)
        print(f"{kind:<8} on {cores} core(s)   {megabytes / wall:6.2f} MB/s of {megabytes:.0f} MB in {FILES} files")
    per_core = statistics.median(each[0].cpu / each[1].cpu for each in rounds)
    print(f"files to library, one core, by seconds of the core  {per_core:.2f} (goal: at least {CORE_GOAL})")
    for number, kind in ((0, "library"), (1, "files")):
        scaling = statistics.median(each[number].wall / each[number + 2].wall for each in rounds)
        print(f"{kind}: two cores to one  {scaling:.2f} x (goal for files: at least {SCALING_GOAL} x)")


def _write_files(folder: Path, texts: Sequence[str], files: int) -> None:
    folder.mkdir(parents=True)
    for number in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::files])
        (folder / f"{number:05}.jsonl").write_text("".join(lines))


def _run(kind: str, cores: int, root: Path) -> Seconds:
    cache = root / "cache"
    command = [sys.executable, "-c", PROGRAM, kind, str(cores), str(root), str(cache)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(cache, ignore_errors=True)
    return Seconds(*json.loads(result.stdout))


def _start_from_many_shards(root: Path) -> None:
    texts = list(islice(docstrings(standard_library()), SHARDS))
    texts += [f"{text} again" for text in texts[: SHARDS - len(texts)]]
    _write_files(root / "data", texts, SHARDS)
    spec = parse_spec(
        {"data": {"data_path": f"{root}/data", "max_seq_len": 128}, "training": {"max_steps": 2 * STEP}}
    ).spec
    run, ranks = RunDir(root / "runs" / "job_bench"), DistributedContext(0, 1, 0, 1, torch.device("cpu"))

    def start() -> None:
        data = prepare_data(spec, run, ranks, lambda _: None, lambda: False)
        assert data.identity.corpus
        data.train_set.batch(data.sampler(spec.rows_per_step, spec.training.seed).rows_of(STEP))

    print(f"{SHARDS:,} files: tokenized in {_seconds(start):.1f} s")
    _print_goal(f"start at step {STEP:,} from the cache", start, START_GOAL)
    _print_goal("sample for the plan", partial(sample_corpus, spec), PLAN_GOAL)


def _print_goal(name: str, work: Callable[[], object], goal: float) -> None:
    times = [_seconds(work) for _ in range(ROUNDS)]
    print(f"{name}  {statistics.median(times):.2f} s (median of {ROUNDS}; goal: under {goal:g} s)")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
