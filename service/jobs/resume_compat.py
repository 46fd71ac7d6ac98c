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

from trainyard.contract.allowed_paths import why_outside
from trainyard.contract.file_identity import Sketch
from trainyard.contract.run_identity import FREE_SHAPE, Identity
from trainyard.contract.rundir import STATE_FILE, RunDir
from trainyard.contract.tokenizer_info import (
    BYTE,
    TokenizerInvalid,
    identified,
    tokenizer_file,
)
from trainyard.service.db.models import CheckpointRow, JobRow
from trainyard.service.errors import RunDiffers
from trainyard.service.jobs.submission import LARGEST_TOKENIZER_BYTES
from trainyard.service.settings import Settings
from trainyard.service.storage.checkpoint_files import opened, place_of

LARGEST_STATE = 16 << 20
NEWEST = 5
"""Checkpoints that are looked into until one can be read: all of a job are of the same run."""

PUT_BACK = "Put back what it was"
RESTART = f'{PUT_BACK}, or fork with data "restart" to go on with what is there now.'


@dataclass(frozen=True)
class Begin:
    """Where a run would go on. ``anew``: with data that begin anew there, so that the weights alone must fit."""

    step: int
    place: Path
    anew: bool = False


def begins(session: Session, settings: Settings, job: JobRow, step: int | None) -> list[Begin]:
    """Where a resume of ``job`` would go on, the likeliest first; [] where it starts anew."""
    products = RunDir(settings.runs / job.id).products(job.spec["checkpoint"]["save_dir"])
    full = select(CheckpointRow.step, CheckpointRow.path).where(
        CheckpointRow.job_id == job.id, CheckpointRow.kind == "full"
    )
    if step is not None:
        full = full.where(CheckpointRow.step == step)
    rows = session.execute(full.order_by(CheckpointRow.step.desc()).limit(NEWEST)).all()
    places = [(row.step, place_of(products, row.step, row.path)) for row in rows]
    found = [Begin(number, place) for number, place in places if place is not None]
    if job.parent_step is not None:
        found.append(Begin(job.parent_step, products.origin, (job.lineage or {}).get("data") == "restart"))
    return found


def require_same(candidates: Iterable[Begin], spec: Mapping[str, Any], settings: Settings) -> None:
    """Raise RunDiffers where ``spec`` and the files it names are not those of the first checkpoint that can be read.

    One that cannot be read is for the worker to judge. Reads files: never to be called in a transaction.
    """
    for begin in candidates:
        saved = identity_in(begin.place)
        if saved is None:
            continue
        differences = [*_of_tokenizer(begin, saved, spec, settings), *_of_shape(begin, saved, spec)]
        only_data = not differences
        if not begin.anew:
            differences += [*_of_corpus(begin, saved, spec, settings), *_of_rows(saved, spec)]
        if differences:
            raise _refused(begin, differences, RESTART if only_data else f"{PUT_BACK}.")
        return


def identity_in(directory: Path) -> Identity | None:
    """What a checkpoint says it is of; None where that cannot be read."""
    try:
        with opened(directory, STATE_FILE) as file:
            said = json.loads(file.read(LARGEST_STATE))["identity"]
        plain = isinstance(said["model"], dict) and isinstance(said.get("corpus_file", {}), dict)
        return Identity(**said) if plain else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _refused(begin: Begin, differences: list[str], hint: str) -> RunDiffers:
    detail = f"Nothing can go on from step {begin.step:,}: {'; '.join(differences)}. {hint}"
    return RunDiffers(detail, differences=differences, hint=hint)


def _of_tokenizer(begin: Begin, saved: Identity, spec: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    path, when = str(spec["data"]["tokenizer_path"]), f"when step {begin.step:,} was saved"
    if path != BYTE and _outside(path, settings):
        return  # refused as any path is
    try:
        if path != BYTE and tokenizer_file(path).stat().st_size > LARGEST_TOKENIZER_BYTES:
            return
        size, fingerprint = identified(path)
    except (TokenizerInvalid, OSError):
        yield "tokenizer_path: it could be read " + when + ", and cannot be now"
        return
    if saved.vocabulary is not None and size != saved.vocabulary:
        yield f"vocabulary: {saved.vocabulary:,} tokens {when}, {size:,} now"
    elif fingerprint != saved.tokenizer:
        yield f"tokenizer_path: not the tokenizer it was {when}, though of the same size"


def _of_corpus(begin: Begin, saved: Identity, spec: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    path, was = str(spec["data"]["data_path"]), saved.corpus_file
    if _outside(path, settings) or not isinstance(was.get("bytes"), int):
        return
    said = f"data_path: {was['bytes']:,} bytes when step {begin.step:,} was saved"
    try:
        now = Sketch.of(Path(path))
    except OSError:
        yield f"{said}, and it cannot be read now"
        return
    if now.bytes != was["bytes"]:
        yield f"{said}, {now.bytes:,} now"
    elif asdict(now) != was:
        yield f"{said}, as many now, and not the same ones"


def _of_shape(begin: Begin, saved: Identity, spec: Mapping[str, Any]) -> list[str]:
    model = dict(spec["model"])
    if begin.anew:
        model |= {name: saved.model[name] for name in FREE_SHAPE if name in saved.model}
    return replace(saved, model=model).differences(saved)


def _of_rows(saved: Identity, spec: Mapping[str, Any]) -> list[str]:
    """Seed and rows. They come with the spec, and differ where checkpoints of another run lie in this one's place."""
    data = spec["data"]
    mine = {"seed": spec["training"]["seed"], "max_seq_len": data["max_seq_len"], "packing": data["packing"]}
    return replace(saved, **mine).differences(saved)


def _outside(path: str, settings: Settings) -> bool:
    return why_outside(path, (*settings.data_roots, settings.home)) is not None
