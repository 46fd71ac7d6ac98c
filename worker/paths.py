"""Which paths a run may read and write. The service checks them at submit, but a link may have been changed since."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trainyard.contract.allowed_paths import outside_reason, parse_roots
from trainyard.contract.corpus_files import CorpusFilesInvalid, expand, glob_base, is_glob
from trainyard.contract.rundir import ArtifactDir, RunDir, find_named_weights, weights_name
from trainyard.contract.spec import DataSpec, EvalSourceSpec, JobSpec
from trainyard.contract.status import Reason
from trainyard.contract.tokenizer_info import BYTE
from trainyard.worker.errors import TrainingError

DATA_ROOTS, SAVE_ROOTS = "TRAINYARD_DATA_ROOTS", "TRAINYARD_SAVE_ROOTS"

FieldPath = tuple[str, str | Path]
"""The name of a spec field, and a path that it refers to."""


def data_roots(run: RunDir | None = None) -> tuple[Path, ...]:
    """Return the directories below which a run may read, or () if it may read everywhere."""
    roots = _roots(dict(os.environ), DATA_ROOTS)
    return (*roots, _home(run)) if roots and run is not None else tuple(roots)


def save_roots() -> tuple[Path, ...]:
    """Return the directories below which a run may write, or () if it may write everywhere. The home is among them."""
    return tuple(_roots(dict(os.environ), SAVE_ROOTS))


def weight_roots(run: RunDir) -> tuple[Path, ...]:
    """Return the directories below which ``from_weight`` may lie, or () if it may lie everywhere."""
    data, save = data_roots(run), save_roots()
    return (*data, *save) if data and save else ()


def outside_error(field: str, reason: str, setting: str) -> TrainingError:
    """Return the error for a path outside of its roots. ``reason``: see `contract.allowed_paths.OutsideRoots`."""
    message = f"{field} {reason} the directories this service may use"
    hint = f"Move it, or add its directory to {setting}. Nothing was read from it, and nothing written."
    return TrainingError(Reason.SPEC_INVALID, message, hint)


def _home(run: RunDir) -> Path:
    return run.path.resolve().parent.parent


def _roots(environment: dict[str, str], name: str) -> list[Path]:
    return [Path(root).resolve() for root in parse_roots(environment.get(name, ""))]


def check_allowed_paths(spec: JobSpec, run: RunDir, environment: dict[str, str] | None = None) -> None:
    """Raise TrainingError for a path outside the roots in the environment. Without roots, all paths are allowed.

    The home, two levels above a job's run directory, is always a root. This finds all mistakes early. The protection
    is that everything is opened by `contract.allowed_paths.open_inside`.
    """
    env = dict(os.environ) if environment is None else environment
    home = _home(run)
    data, save = (_roots(env, name) for name in (DATA_ROOTS, SAVE_ROOTS))
    if data:
        # A link in a directory to another directory is not followed, so it may lead out.
        _require_inside(_corpora(spec), [*data, home], DATA_ROOTS, content=False)
        _require_inside(_paths_read(spec), [*data, home], DATA_ROOTS)
    if data and save:
        _require_inside(_named_weights(spec, run), [*data, *save, home], DATA_ROOTS)
    if save:
        _require_inside(_paths_written(spec, run), [*save, home], SAVE_ROOTS)


def _require_inside(paths: Iterator[FieldPath], roots: list[Path], setting: str, content: bool = True) -> None:
    for field, path in paths:
        reason = outside_reason(path, roots, content)
        if reason is not None:
            raise outside_error(field, reason, setting)


def _corpora(spec: JobSpec) -> Iterator[FieldPath]:
    data = spec.data
    for source in data.training_sources:
        yield from _corpus_files("data.data_path" if data.sources is None else f"source {source.name}", source.path)
    for held_out in data.held_out_sources:
        yield from _corpus_files(held_out_field(data, held_out), held_out.path)


def held_out_field(data: DataSpec, source: EvalSourceSpec) -> str:
    """Return what messages call the files of a held-out set."""
    return "data.eval_data_path" if data.eval_sources is None else f"held-out set {source.name}"


def _paths_read(spec: JobSpec) -> Iterator[FieldPath]:
    data, from_weight = spec.data, spec.training.from_weight
    if data.tokenizer_path != BYTE:
        yield "data.tokenizer_path", data.tokenizer_path
    if from_weight is not None and "/" in from_weight:
        yield "training.from_weight", from_weight
    for index, task in enumerate(spec.evaluation.tasks):
        yield f"evaluation.tasks[{index}].path", task.path


def _corpus_files(field: str, path: str | list[str]) -> Iterator[FieldPath]:
    for entry in [path] if isinstance(path, str) else path:
        yield field, glob_base(entry) if is_glob(entry) else entry
        # If there are no files, the error says so when they are opened.
        with suppress(CorpusFilesInvalid):
            yield from ((field, file.path) for file in expand(entry))


def _named_weights(spec: JobSpec, run: RunDir) -> Iterator[FieldPath]:
    # Without a slash, from_weight is MiniMind's name of a weights file in a save directory. It may be a link.
    from_weight = spec.training.from_weight
    if from_weight is not None and "/" not in from_weight:
        candidates = weight_paths(spec, run.artifacts(spec.checkpoint.save_dir))
        yield from (("training.from_weight", path) for path in candidates if path.exists())


def _paths_written(spec: JobSpec, run: RunDir) -> Iterator[FieldPath]:
    if spec.checkpoint.save_dir is None:
        return
    artifacts = run.artifacts(spec.checkpoint.save_dir)
    for path in (artifacts.path, artifacts.checkpoints, artifacts.out):
        yield "checkpoint.save_dir", path


def weight_paths(spec: JobSpec, artifacts: ArtifactDir) -> list[Path]:
    """Return the paths that ``from_weight`` may refer to. The first that exists is loaded.

    A name refers to the newest file in ``save_dir`` (in the folder of all runs, if it is null) or below its jobs.
    """
    from_weight = str(spec.training.from_weight)
    if "/" in from_weight:
        return [Path(from_weight)]
    name = weights_name(from_weight, spec.model.hidden_size, spec.model.use_moe)
    folder = Path(spec.checkpoint.save_dir) if spec.checkpoint.save_dir is not None else artifacts.path.parent
    found = find_named_weights(folder, name, artifacts.path.name)
    return [Path(from_weight), *found, folder / name, artifacts.out / name, artifacts.path / name]
