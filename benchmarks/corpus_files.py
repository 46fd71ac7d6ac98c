"""Speed of tokenizing many files, against the tokenizers library on the same texts, on one core and on two.

The machine's own limit is measured in the same minutes: two programs with a core each, of which each tokenizes half of
the files. Also the times of a corpus of 10,000 files: its plan, and its start at step 1,000,000 from the cache.
"""

import json
import os
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

from benchmarks.baselines import Ratio
from trainyard.client.demo.corpus import docstrings, standard_library
from trainyard.contract.parsing import parse_spec
from trainyard.contract.rundir import RunDir
from trainyard.service.planning.preview import sample_corpus
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.data.tokenizers import train_tokenizer
from trainyard.worker.distributed import DistributedContext

DOCSTRINGS = 7000
FILES, COPIES = 100, 36
SHARDS = 10_000
ROUNDS = 5
CORE_GOAL, SCALING_GOAL = 0.9, 1.8
STEP = 1_000_000
START_GOAL, PLAN_GOAL = 2.0, 1.0

PROGRAM = """
import json, os, resource, sys, time
from pathlib import Path
kind, core_names, share, data, tokenizer_path, cache = sys.argv[1:]
cores, (first, of) = [int(name) for name in core_names.split(",")], map(int, share.split("/"))
os.sched_setaffinity(0, cores)
os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = str(len(cores)), "true"
from tokenizers import Tokenizer
from trainyard.contract.corpus_files import expand
from trainyard.worker.data.fileset import FileSetOptions, open_files
from trainyard.worker.data.tokenizers import FileTokenizer
files, file = expand(data)[first::of], Path(tokenizer_path, "tokenizer.json")
texts = [json.loads(line)["text"] for file in files for line in file.path.open()] if kind == "library" else []
library, tokenizer = Tokenizer.from_file(str(file)), FileTokenizer(file)
def used():
    found = [resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)
print("ready", flush=True)
input()
began, cpu = time.monotonic(), used()
if kind == "library":
    library.encode_batch(texts, add_special_tokens=False)
else:
    open_files(files, FileSetOptions(tokenizer, tokenizer_path, Path(cache), processes=len(cores)))
print(json.dumps([began, time.monotonic(), used() - cpu]))
"""


class Seconds(NamedTuple):
    """Elapsed seconds, and those of all cores together."""

    wall: float
    cpu: float


class Work(NamedTuple):
    """What is measured: programs that run at the same time, each on its cores, with an equal share of the files.

    ``large``: half of the texts are in one file.
    """

    kind: str
    cores: list[list[int]]
    large: bool = False


def main() -> list[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        ratios = _compare_with_library(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        _start_from_many_shards(Path(folder))
    return ratios


def _compare_with_library(root: Path) -> list[Ratio]:
    """Let the programs take turns, so that a slow minute of the machine affects all of them."""
    texts = list(islice(docstrings(standard_library()), DOCSTRINGS))
    train_tokenizer(texts, 6400, root)
    texts = [f"{text} {copy}" for copy in range(COPIES) for text in texts]
    _write_files(root / "data", texts, FILES)
    _write_files(root / "large", texts[::2], FILES)
    _write_files(root / "large" / "half", texts[1::2], 1)
    one, two = sorted(os.sched_getaffinity(0))[:2]
    wanted = {
        "library, one core": Work("library", [[one]]),
        "files, one core": Work("files", [[one]]),
        "library, two cores": Work("library", [[one, two]]),
        "files, two cores": Work("files", [[one, two]]),
        "files, two cores, half of the text in one file": Work("files", [[one, two]], large=True),
        "two programs of one core each": Work("files", [[one], [two]]),
    }
    rounds = [{name: _run(work, root) for name, work in wanted.items()} for _ in range(ROUNDS)]
    megabytes = sum(file.stat().st_size for file in (root / "data").iterdir()) / 1e6
    print(f"{megabytes:.0f} MB in {FILES} files; medians of {ROUNDS} rounds")
    for name in wanted:
        wall, cpu = (statistics.median(each[name][number] for each in rounds) for number in (0, 1))
        print(f"{name:<46}  {megabytes / wall:6.2f} MB/s, {cpu:6.2f} s of the cores")

    def ratio(before: str, after: str, number: int = 0) -> float:
        return statistics.median(each[before][number] / each[after][number] for each in rounds)

    per_core = ratio("library, one core", "files, one core", 1)
    print(f"files to library, one core, by seconds of the core  {per_core:.2f} (goal: at least {CORE_GOAL})")
    print(f"library: two cores to one  {ratio('library, one core', 'library, two cores'):.2f} x")
    for name in list(wanted)[3:]:
        goal = "the limit of this machine" if name.startswith("two") else f"goal: at least {SCALING_GOAL} x"
        print(f"{name}: {ratio('files, one core', name):.2f} x one core ({goal})")
    limit = ratio("two programs of one core each", "files, two cores")
    print(f"files, two cores, to two programs of one core each  {limit:.2f}")
    return [
        Ratio("corpus_files: files to library, one core", per_core),
        Ratio("corpus_files: two cores to one", ratio("files, one core", "files, two cores")),
    ]


def _write_files(folder: Path, texts: Sequence[str], files: int) -> None:
    folder.mkdir(parents=True)
    for number in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::files])
        (folder / f"{number:05}.jsonl").write_text("".join(lines))


def _run(work: Work, root: Path) -> Seconds:
    data = root / ("large" if work.large else "data")
    programs = []
    for number, cores in enumerate(work.cores):
        share, cache = f"{number}/{len(work.cores)}", root / f"cache-{number}"
        names = ",".join(map(str, cores))
        command = [sys.executable, "-c", PROGRAM, work.kind, names, share, str(data), str(root), str(cache)]
        programs.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for program in programs:
        assert program.stdout is not None
        program.stdout.readline()
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("go\n")
        program.stdin.flush()
    results = []
    for number, program in enumerate(programs):
        output, _ = program.communicate()
        if program.returncode:
            raise RuntimeError(f"a program ended with exit code {program.returncode}")
        results.append(json.loads(output))
        shutil.rmtree(root / f"cache-{number}", ignore_errors=True)
    began, ended, cpu = zip(*results, strict=True)
    return Seconds(max(ended) - min(began), sum(cpu))


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
