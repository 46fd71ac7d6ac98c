"""``python -m benchmarks.load [ROW ...]``: the service under load; each row of the table can run alone."""

import argparse
import sys
from collections.abc import Callable, Iterator

from benchmarks import scheduler
from benchmarks.load import (
    adoption,
    curve,
    ingest,
    log_tail,
    mix,
    outage,
    readers,
    requests,
    scale,
    submissions,
    training,
)
from benchmarks.load.tables import Figure, machine

ROWS: dict[str, Callable[[], Iterator[Figure]]] = {
    "training": training.measure,
    "requests": requests.measure,
    "mix": mix.measure,
    "submissions": submissions.measure,
    "ingest": ingest.measure,
    "outage": outage.measure,
    "curve": curve.measure,
    "readers": readers.measure,
    "tail": log_tail.measure,
    "adoption": adoption.measure,
    "scale": scale.measure,
}


def main() -> None:
    run(tuple(ROWS))
    scheduler.main()


def run(rows: tuple[str, ...]) -> bool:
    """Print the figures of ``rows``; return whether all met their goals."""
    print(machine(), flush=True)
    met = True
    for row in rows:
        for figure in ROWS[row]():
            print(figure.line(), flush=True)
            met = met and figure.met
    return met


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], metavar="ROW", help=", ".join(ROWS))
    sys.exit(0 if run(tuple(parser.parse_args().rows) or tuple(ROWS)) else 1)
