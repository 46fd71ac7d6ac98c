"""`make bench`: figures measured side by side in one run, printed as ratios or differences. `--only NAME` runs one."""

import argparse
import sys
from collections.abc import Callable

from benchmarks import (
    command,
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
    """Run what was asked for, one after the other: two at once would measure each other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=sorted(BENCHMARKS))
    chosen = parser.parse_args().only
    for name, benchmark in BENCHMARKS.items():
        if chosen in (None, name):
            print(f"\n== {name}", flush=True)
            benchmark()
    return 0


if __name__ == "__main__":
    sys.exit(main())
