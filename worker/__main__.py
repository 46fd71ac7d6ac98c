"""The training process: `torchrun --nproc_per_node N -m trainyard.worker RUN_DIR [--attempt N | --from-step N]`.

Also `python -m trainyard.worker RUN_DIR` for one rank. Without --attempt it is started by hand: it runs
RUN_DIR/spec.json, and resumes from a checkpoint in RUN_DIR. Exit code 0: done, or stopped on request; 1: failed;
2: wrong usage. `python -m trainyard.worker prepare RUN_DIR --attempt N` prepares a corpus, see `worker.prepare`.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from trainyard.contract.rundir import RANK_FILE, RunDir
from trainyard.contract.stdio import ignore_output_errors
from trainyard.worker.agent.torchrun import RANK_LOGS
from trainyard.worker.openmp import limit_spinning
from trainyard.worker.output import redirect_output


def main() -> None:
    """Run one rank of one attempt, or prepare a corpus."""
    if sys.argv[1:2] == ["prepare"]:
        from trainyard.worker.prepare import main as prepare

        sys.exit(prepare(sys.argv[2:]))
    run, number, from_step = _parse()
    if number is not None and os.environ.get(RANK_LOGS):
        attempt = run.attempt(number)
        attempt.logs.mkdir(parents=True, exist_ok=True)
        redirect_output(attempt.rank_log(int(os.environ.get("RANK", "0"))))
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if error_file:
            # torchrun's folder for this rank's exception has its number on the node: store the global one beside it.
            with contextlib.suppress(OSError):
                Path(error_file).with_name(RANK_FILE).write_text(os.environ.get("RANK", "0"))
    ignore_output_errors()
    limit_spinning(os.environ)  # so torch must not be imported above
    from torch.distributed.elastic.multiprocessing.errors import record

    from trainyard.worker.main import run_rank

    record(run_rank)(run, number, from_step)


def _parse() -> tuple[RunDir, int | None, int | None]:
    parser = argparse.ArgumentParser(prog="python -m trainyard.worker", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="holds spec.json; gets checkpoints and weights")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--attempt", type=int, metavar="N", help="run RUN_DIR/attempt-000N/spec.json, as an agent does")
    group.add_argument("--from-step", type=int, metavar="N", help="go back to this checkpoint; set newer ones aside")
    parsed = parser.parse_args()
    run = RunDir(parsed.run_dir.resolve())
    if not run.path.is_dir():
        parser.error(f"{run.path} is not a directory")
    return run, parsed.attempt, parsed.from_step


if __name__ == "__main__":
    main()
