"""`make bench`: all benchmarks, one after the other, or one of them with `--only NAME`.

It ends with an error if a ratio is more than 5 % worse than the baseline of this kind of processor. `--keep` stores the
ratios as its new baseline.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    baselines,
    command,
    corpus_files,
    corpus_speed,
    dashboard,
    launch,
    optimizers,
    padding,
    peak,
    profile,
    reporting,
    saving,
    scheduler,
    trainer,
)
from benchmarks.baselines import Ratio
from benchmarks.load import __main__ as load
from benchmarks.slurm import main as slurm

BENCHMARKS: dict[str, Callable[[], Sequence[Ratio] | None]] = {
    "command": command.main,
    "corpus_files": corpus_files.main,
    "corpus_speed": corpus_speed.main,
    "dashboard": dashboard.main,
    "launch": launch.main,
    "load": load.main,
    "optimizers": optimizers.main,
    "padding": padding.main,
    "peak": peak.main,
    "profile": profile.main,
    "reporting": reporting.main,
    "saving": saving.main,
    "scheduler": scheduler.main,
    "slurm": slurm,
    "trainer": trainer.main,
}


def main() -> int:
    """Run the benchmarks one after the other: in parallel they would disturb each other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=sorted(BENCHMARKS))
    parser.add_argument("--keep", action="store_true", help="store the ratios as the baseline of this processor")
    arguments, rest = parser.parse_known_args()
    if arguments.only == "optimizers":
        optimizers.main(rest)
        return 0
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    ratios: list[Ratio] = []
    for name, benchmark in BENCHMARKS.items():
        if arguments.only in (None, name):
            print(f"\n== {name}", flush=True)
            ratios += benchmark() or ()
    return compare(ratios, keep=arguments.keep)


def compare(ratios: Sequence[Ratio], *, keep: bool) -> int:
    """Print which ratios are worse than the baseline of this processor, and return the exit code."""
    file = baselines.FOLDER / f"{baselines.processor(Path('/proc/cpuinfo').read_text())}.json"
    known = baselines.read(file)
    worse = baselines.verdicts(known, ratios)
    print("\n".join(["", *worse] if worse else [f"\nno ratio of {len(ratios)} is worse than in {file.name}"]))
    if keep:
        baselines.write(file, known, ratios)
    return 1 if worse and not keep else 0


if __name__ == "__main__":
    sys.exit(main())
