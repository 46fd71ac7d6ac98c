"""Check whether a run can resume from a checkpoint: the host must have the same corpus, vocabulary and model shape.

The worker compares every byte before it resumes. The check here costs the same for a corpus of any size, so that a
resume that cannot work is rejected at the request, with the names of what to restore.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.allowed_paths import outside_files, outside_reason
from trainyard.contract.corpus_files import CorpusFilesInvalid, describe_changes, expand, file_sketch, shown
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.run_identity import CHANGEABLE_FIELDS, RunIdentity
from trainyard.contract.rundir import STATE_FILE, RunDir
from trainyard.contract.spec import DataSpec
from trainyard.contract.tokenizer_info import BYTE, TokenizerInvalid, fingerprint_of
from trainyard.service.db.models import CheckpointRow, JobRow
from trainyard.service.errors import CheckpointMismatch
from trainyard.service.settings import Settings
from trainyard.service.storage.checkpoint_files import checkpoint_directory, open_file

MAX_STATE_BYTES = 16 << 20
MAX_CANDIDATES = 5
"""Checkpoints to try until one can be read: all checkpoints of a job are of the same run."""

RESTORE_HINT = "Put back what it was"
RESTART = f'{RESTORE_HINT}, or fork with data "restart" to continue with the current data.'


@dataclass(frozen=True)
class ResumeCandidate:
    """A checkpoint to resume from. ``restarts_data``: the data starts again there; only the weights must match."""

    step: int
    path: Path
    restarts_data: bool = False


def resume_candidates(session: Session, settings: Settings, job: JobRow, step: int | None) -> list[ResumeCandidate]:
    """Return the checkpoints that a resume of ``job`` would try, in order; [] if it starts from scratch."""
    run, save_dir = RunDir(settings.runs / job.id), job.spec["checkpoint"]["save_dir"]
    full = select(CheckpointRow.step, CheckpointRow.path).where(
        CheckpointRow.job_id == job.id, CheckpointRow.kind == "full"
    )
    if step is not None:
        full = full.where(CheckpointRow.step == step)
    rows = session.execute(full.order_by(CheckpointRow.step.desc()).limit(MAX_CANDIDATES)).all()
    paths = [(row.step, checkpoint_directory(run, save_dir, row.step, row.path)) for row in rows]
    candidates = [ResumeCandidate(number, path) for number, path in paths if path is not None]
    if job.parent_step is not None:
        restarts_data = (job.lineage or {}).get("data") == "restart"
        origin = run.find_directory(save_dir, lambda artifacts: artifacts.origin)
        candidates.append(ResumeCandidate(job.parent_step, origin, restarts_data))
    return candidates


def check_compatible(candidates: Iterable[ResumeCandidate], spec: Mapping[str, Any], settings: Settings) -> None:
    """Raise CheckpointMismatch if ``spec`` or the files it names differ from the first readable checkpoint's.

    Checkpoints that cannot be read are left to the worker. Reads files: do not call it in a transaction.
    """
    for candidate in candidates:
        saved = read_identity(candidate.path, settings.writable_roots)
        if saved is None:
            continue
        differences = [
            *_tokenizer_differences(candidate, saved, spec, settings),
            *_shape_differences(candidate, saved, spec),
        ]
        only_data = not differences
        if not candidate.restarts_data:
            differences += [*_corpus_differences(candidate, saved, spec, settings), *_row_differences(saved, spec)]
        if differences:
            hint = RESTART if only_data else f"{RESTORE_HINT}."
            detail = f"The run cannot resume from step {candidate.step:,}: {'; '.join(differences)}. {hint}"
            raise CheckpointMismatch(detail, differences=differences, hint=hint)
        return


def read_identity(directory: Path, roots: Sequence[Path] = ()) -> RunIdentity | None:
    """Return the run identity stored in a checkpoint, or None if it cannot be read."""
    try:
        with open_file(directory, STATE_FILE, roots) as file:
            identity = json.loads(file.read(MAX_STATE_BYTES))["identity"]
        valid = isinstance(identity["model"], dict) and isinstance(identity.get("corpus_file", {}), dict)
        return RunIdentity(**identity) if valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _tokenizer_differences(
    candidate: ResumeCandidate, saved: RunIdentity, spec: Mapping[str, Any], settings: Settings
) -> Iterator[str]:
    path, when = str(spec["data"]["tokenizer_path"]), f"when step {candidate.step:,} was saved"
    if path != BYTE and _is_outside(path, settings):
        return  # `validate_spec` rejects it
    try:
        size, fingerprint = fingerprint_of(path, settings.readable_roots)
    except (TokenizerInvalid, OSError):
        yield f"tokenizer_path: it could be read {when}, and cannot be now"
        return
    if saved.vocabulary is not None and size != saved.vocabulary:
        yield f"vocabulary: {saved.vocabulary:,} tokens {when}, {size:,} now"
    elif fingerprint != saved.tokenizer:
        yield f"tokenizer_path: not the tokenizer it was {when}, though of the same size"


def _corpus_differences(
    candidate: ResumeCandidate, saved: RunIdentity, spec: Mapping[str, Any], settings: Settings
) -> Iterator[str]:
    was = saved.corpus_file
    if isinstance(was.get("files"), list):
        yield from _file_differences(candidate, was["files"], spec, settings)
        return
    path = spec["data"]["data_path"]
    if not isinstance(path, str) or _is_outside(path, settings) or not isinstance(was.get("bytes"), int):
        return
    before = f"data_path: {was['bytes']:,} bytes when step {candidate.step:,} was saved"
    try:
        now = FileFingerprint.of(Path(path), settings.readable_roots)
    except OSError:
        yield f"{before}, and it cannot be read now"
        return
    if now.bytes != was["bytes"]:
        yield f"{before}, {now.bytes:,} now"
    elif asdict(now) != was:
        yield f"{before}, the same number now, but not the same bytes"


def _file_differences(
    candidate: ResumeCandidate, files: list[Any], spec: Mapping[str, Any], settings: Settings
) -> Iterator[str]:
    when = f"since step {candidate.step:,} was saved"
    entries = []
    try:
        for source in DataSpec.model_validate_json(json.dumps(spec["data"])).training_sources:
            named = expand(source.path)
            if outside_files([file.path for file in named], (*settings.data_roots, settings.home)) is not None:
                return  # `validate_spec` rejects it
            entries += [
                [f"{source.name}/{file.name}", file.path.stat().st_size, file_sketch(file.path)] for file in named
            ]
    except CorpusFilesInvalid as error:
        yield f"{error}, {when}"
        return
    except OSError as error:
        yield f"{shown(Path(error.filename or '?'))} cannot be read now"
        return
    for change in describe_changes(files, entries):
        yield f"{change} {when}"


def _shape_differences(candidate: ResumeCandidate, saved: RunIdentity, spec: Mapping[str, Any]) -> list[str]:
    model = dict(spec["model"])
    if candidate.restarts_data:
        model |= {name: saved.model[name] for name in CHANGEABLE_FIELDS if name in saved.model}
    return replace(saved, model=model).differences(saved)


def _row_differences(saved: RunIdentity, spec: Mapping[str, Any]) -> list[str]:
    # They come with the spec, so they differ only if another run's checkpoints were put in this one's place.
    data = spec["data"]
    mine = {"seed": spec["training"]["seed"], "max_seq_len": data["max_seq_len"], "packing": data["packing"]}
    return replace(saved, **mine).differences(saved)


def _is_outside(path: str, settings: Settings) -> bool:
    return outside_reason(path, settings.readable_roots) is not None
