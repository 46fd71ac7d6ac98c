"""Whether a run can go on from a checkpoint with what the host has now: the same corpus, vocabulary and shape.

The worker compares every byte before it goes on. What is looked at here costs the same for a corpus of any size, so a
run that cannot go on is refused when somebody asks for it, and names what to put back.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.allowed_paths import outside_reason
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.run_identity import CHANGEABLE_FIELDS, RunIdentity
from trainyard.contract.rundir import STATE_FILE, RunDir
from trainyard.contract.tokenizer_info import (
    BYTE,
    TokenizerInvalid,
    fingerprint_of,
    tokenizer_file,
)
from trainyard.service.db.models import CheckpointRow, JobRow
from trainyard.service.errors import CheckpointMismatch
from trainyard.service.jobs.submission import LARGEST_TOKENIZER_BYTES
from trainyard.service.settings import Settings
from trainyard.service.storage.checkpoint_files import checkpoint_directory, open_file

LARGEST_STATE = 16 << 20
NEWEST = 5
"""Checkpoints that are looked into until one can be read: all of a job are of the same run."""

RESTORE_HINT = "Put back what it was"
RESTART = f'{RESTORE_HINT}, or fork with data "restart" to go on with what is there now.'


@dataclass(frozen=True)
class ResumeCandidate:
    """Where a run would go on. ``anew``: with data that begin anew there, so that the weights alone must fit."""

    step: int
    place: Path
    restarts_data: bool = False


def resume_candidates(session: Session, settings: Settings, job: JobRow, step: int | None) -> list[ResumeCandidate]:
    """Where a resume of ``job`` would go on, the likeliest first; [] where it starts anew."""
    products = RunDir(settings.runs / job.id).artifacts(job.spec["checkpoint"]["save_dir"])
    full = select(CheckpointRow.step, CheckpointRow.path).where(
        CheckpointRow.job_id == job.id, CheckpointRow.kind == "full"
    )
    if step is not None:
        full = full.where(CheckpointRow.step == step)
    rows = session.execute(full.order_by(CheckpointRow.step.desc()).limit(NEWEST)).all()
    places = [(row.step, checkpoint_directory(products, row.step, row.path)) for row in rows]
    found = [ResumeCandidate(number, place) for number, place in places if place is not None]
    if job.parent_step is not None:
        found.append(ResumeCandidate(job.parent_step, products.origin, (job.lineage or {}).get("data") == "restart"))
    return found


def check_compatible(candidates: Iterable[ResumeCandidate], spec: Mapping[str, Any], settings: Settings) -> None:
    """Raise RunDiffers where ``spec`` and the files it names are not those of the first checkpoint that can be read.

    One that cannot be read is for the worker to judge. Reads files: never to be called in a transaction.
    """
    for begin in candidates:
        saved = identity_in(begin.place)
        if saved is None:
            continue
        differences = [*_of_tokenizer(begin, saved, spec, settings), *_of_shape(begin, saved, spec)]
        only_data = not differences
        if not begin.restarts_data:
            differences += [*_of_corpus(begin, saved, spec, settings), *_of_rows(saved, spec)]
        if differences:
            raise _refused(begin, differences, RESTART if only_data else f"{RESTORE_HINT}.")
        return


def identity_in(directory: Path) -> RunIdentity | None:
    """What a checkpoint says it is of; None where that cannot be read."""
    try:
        with open_file(directory, STATE_FILE) as file:
            said = json.loads(file.read(LARGEST_STATE))["identity"]
        plain = isinstance(said["model"], dict) and isinstance(said.get("corpus_file", {}), dict)
        return RunIdentity(**said) if plain else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _refused(begin: ResumeCandidate, differences: list[str], hint: str) -> CheckpointMismatch:
    detail = f"Nothing can go on from step {begin.step:,}: {'; '.join(differences)}. {hint}"
    return CheckpointMismatch(detail, differences=differences, hint=hint)


def _of_tokenizer(
    begin: ResumeCandidate, saved: RunIdentity, spec: Mapping[str, Any], settings: Settings
) -> Iterator[str]:
    path, when = str(spec["data"]["tokenizer_path"]), f"when step {begin.step:,} was saved"
    if path != BYTE and _outside(path, settings):
        return  # refused as any path is
    try:
        if path != BYTE and tokenizer_file(path).stat().st_size > LARGEST_TOKENIZER_BYTES:
            return
        size, fingerprint = fingerprint_of(path)
    except (TokenizerInvalid, OSError):
        yield "tokenizer_path: it could be read " + when + ", and cannot be now"
        return
    if saved.vocabulary is not None and size != saved.vocabulary:
        yield f"vocabulary: {saved.vocabulary:,} tokens {when}, {size:,} now"
    elif fingerprint != saved.tokenizer:
        yield f"tokenizer_path: not the tokenizer it was {when}, though of the same size"


def _of_corpus(
    begin: ResumeCandidate, saved: RunIdentity, spec: Mapping[str, Any], settings: Settings
) -> Iterator[str]:
    path, was = str(spec["data"]["data_path"]), saved.corpus_file
    if _outside(path, settings) or not isinstance(was.get("bytes"), int):
        return
    said = f"data_path: {was['bytes']:,} bytes when step {begin.step:,} was saved"
    try:
        now = FileFingerprint.of(Path(path))
    except OSError:
        yield f"{said}, and it cannot be read now"
        return
    if now.bytes != was["bytes"]:
        yield f"{said}, {now.bytes:,} now"
    elif asdict(now) != was:
        yield f"{said}, as many now, and not the same ones"


def _of_shape(begin: ResumeCandidate, saved: RunIdentity, spec: Mapping[str, Any]) -> list[str]:
    model = dict(spec["model"])
    if begin.restarts_data:
        model |= {name: saved.model[name] for name in CHANGEABLE_FIELDS if name in saved.model}
    return replace(saved, model=model).differences(saved)


def _of_rows(saved: RunIdentity, spec: Mapping[str, Any]) -> list[str]:
    """Seed and rows. They come with the spec, and differ where checkpoints of another run lie in this one's place."""
    data = spec["data"]
    mine = {"seed": spec["training"]["seed"], "max_seq_len": data["max_seq_len"], "packing": data["packing"]}
    return replace(saved, **mine).differences(saved)


def _outside(path: str, settings: Settings) -> bool:
    return outside_reason(path, (*settings.data_roots, settings.home)) is not None
