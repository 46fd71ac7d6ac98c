"""Where a run may read and write. The service checks the same at submit; a link may have been changed since."""

import os
from collections.abc import Iterator
from pathlib import Path

from trainyard.contract.allowed_paths import outside_reason
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.contract.tokenizer_info import BYTE
from trainyard.worker.errors import TrainingError

DATA_ROOTS, SAVE_ROOTS = "TRAINYARD_DATA_ROOTS", "TRAINYARD_SAVE_ROOTS"

Named = tuple[str, str | Path]
"""A field of the spec, and a path that it means."""


def check_allowed_paths(spec: JobSpec, run: RunDir, environment: dict[str, str] | None = None) -> None:
    """Raise Failure for a path outside the roots in the environment. By hand there are none, and all is allowed.

    The home, two levels above a job's run directory, is always a root. To be asked again before anything is opened
    for which a run has waited: links can be changed at any time.
    """
    given = dict(os.environ) if environment is None else environment
    home = run.path.resolve().parent.parent
    data, save = (_roots(given.get(names, "")) for names in (DATA_ROOTS, SAVE_ROOTS))
    if data:
        _require(_read(spec), [*data, home], DATA_ROOTS)
    if data and save:
        _require(_weights(spec, run), [*data, *save, home], DATA_ROOTS)
    if save:
        _require(_written(spec, run), [*save, home], SAVE_ROOTS)


def _require(named: Iterator[Named], roots: list[Path], setting: str) -> None:
    for field, path in named:
        trouble = outside_reason(path, roots)
        if trouble is not None:
            message = f"{field} {trouble} the directories this service may use"
            hint = f"Move it, or add its directory to {setting}. Nothing was read of it, and nothing written."
            raise TrainingError(Reason.SPEC_INVALID, message, hint)


def _roots(text: str) -> list[Path]:
    return [Path(root).resolve() for root in text.split(":") if root]


def _read(spec: JobSpec) -> Iterator[Named]:
    data, start = spec.data, spec.training.from_weight
    yield "data.data_path", data.data_path
    if data.eval_data_path is not None:
        yield "data.eval_data_path", data.eval_data_path
    if data.tokenizer_path != BYTE:
        yield "data.tokenizer_path", data.tokenizer_path
    if start is not None and "/" in start:
        yield "training.from_weight", start


def _weights(spec: JobSpec, run: RunDir) -> Iterator[Named]:
    """Without a separator it is MiniMind's name of a file where weights are saved, which may be a link by itself."""
    start = spec.training.from_weight
    if start is not None and "/" not in start:
        places = weight_paths(spec, run.artifacts(spec.checkpoint.save_dir))
        yield from (("training.from_weight", place) for place in places if place.exists())


def _written(spec: JobSpec, run: RunDir) -> Iterator[Named]:
    if spec.checkpoint.save_dir is None:
        return
    products = run.artifacts(spec.checkpoint.save_dir)
    for place in (products.path, products.checkpoints, products.out):
        yield "checkpoint.save_dir", place


def weight_paths(spec: JobSpec, products: ArtifactDir) -> list[Path]:
    """Where ``from_weight`` is looked for, in this order."""
    wanted = str(spec.training.from_weight)
    name = f"{wanted}_{spec.model.hidden_size}{'_moe' if spec.model.use_moe else ''}.pth"
    folders = [products.out, products.path]
    if spec.checkpoint.save_dir is not None:
        folders.insert(0, Path(spec.checkpoint.save_dir))
    return [Path(wanted), *(folder / name for folder in folders)]
