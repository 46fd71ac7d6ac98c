"""`make bench`: all benchmarks, one after the other, or one of them with `--only NAME`."""

import argparse
import sys
from collections.abc import Callable

from benchmarks import (
    command,
    corpus_files,
    corpus_speed,
    dashboard,
    launch,
    optimizers,
    padding,
    peak,
    reporting,
    saving,
    scheduler,
    trainer,
)
from benchmarks.load import __main__ as load
from benchmarks.slurm import main as slurm

BENCHMARKS: dict[str, Callable[[], None]] = {
    "command": command.main,
    "corpus_files": corpus_files.main,
    "corpus_speed": corpus_speed.main,
    "dashboard": dashboard.main,
    "launch": launch.main,
    "load": load.main,
    "optimizers": optimizers.main,
    "padding": padding.main,
    "peak": peak.main,
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
    options, rest = parser.parse_known_args()
    chosen = options.only
    if rest and chosen != "optimizers":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen == "optimizers":
        optimizers.main(rest)
        return 0
    for name, benchmark in BENCHMARKS.items():
        if chosen in (None, name):
            print(f"\n== {name}", flush=True)
            benchmark()
    return 0


if __name__ == "__main__":
    sys.exit(main())
