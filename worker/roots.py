"""Where a run may read and write. The service checks the same at submit; a link may have been changed since."""

import os
from collections.abc import Iterator
from pathlib import Path

from contract.rundir import RunDir
from contract.spec import JobSpec
from contract.status import Reason
from contract.vocabulary import BYTE
from worker.failure import Failure

DATA_ROOTS, SAVE_ROOTS = "TRAINYARD_DATA_ROOTS", "TRAINYARD_SAVE_ROOTS"


def check_roots(spec: JobSpec, run: RunDir, environment: dict[str, str] | None = None) -> None:
    """Raise Failure for a path outside the roots in the environment. By hand there are none, and all is allowed.

    The home, two levels above a job's run directory, is always a root.
    """
    given = dict(os.environ) if environment is None else environment
    home = run.path.resolve().parent.parent
    for names, paths in ((DATA_ROOTS, _read(spec)), (SAVE_ROOTS, _written(spec))):
        roots = [Path(root).resolve() for root in given.get(names, "").split(":") if root]
        for field, path in paths if roots else ():
            if not any(Path(path).resolve().is_relative_to(root) for root in [*roots, home]):
                message = f"{field} lies outside the directories this service may use"
                raise Failure(Reason.SPEC_INVALID, message, f"Move it, or add its directory to {names}.")


def _read(spec: JobSpec) -> Iterator[tuple[str, str]]:
    data, start = spec.data, spec.training.from_weight
    yield "data.data_path", data.data_path
    if data.eval_data_path is not None:
        yield "data.eval_data_path", data.eval_data_path
    if data.tokenizer_path != BYTE:
        yield "data.tokenizer_path", data.tokenizer_path
    # Without a separator it may be MiniMind's name of a file in save_dir, which is checked as such.
    if start is not None and ("/" in start or Path(start).exists()):
        yield "training.from_weight", start


def _written(spec: JobSpec) -> Iterator[tuple[str, str]]:
    if spec.checkpoint.save_dir is not None:
        yield "checkpoint.save_dir", spec.checkpoint.save_dir
