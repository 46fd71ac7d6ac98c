"""Retention while a checkpoint is read: the reader gets a complete checkpoint of one moment, or a clear error.

At each line of the reading code the checkpoint is removed, or removed and another one saved in its place, as after a
rewind. The reader is another job (`from_resume`), a fork or an export, or a download.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.tracing import at_line
from trainyard.contract.failpoints import marked_code
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.service.errors import FileNotInCheckpoint, StepUnavailable
from trainyard.service.storage import checkpoint_files, share
from trainyard.worker.checkpoint import files as checkpoint
from trainyard.worker.checkpoint import resume, retention
from trainyard.worker.checkpoint.files import RunState

IDENTITY = RunIdentity(model={}, tokenizer="t", corpus="c", seed=1, max_seq_len=8, packing="none")
MAX_LINES = 800
SHORT = 25
"""Of so many lines one, where not all are tried."""

Fate = Callable[[ArtifactDir], None]


def save(products: ArtifactDir, step: int, mark: float) -> None:
    """A checkpoint in which everything says ``mark``."""
    state = RunState(step=step, tokens=0, rows_per_step=4, world_size=1, identity=IDENTITY, loss=mark)
    weights = {"weight": torch.full((2, 2), mark), "bias": torch.full((2,), mark)}
    moments = {f"{kind}.{name}": tensor for kind in ("exp_avg", "exp_avg_sq") for name, tensor in weights.items()}
    steps = {f"step.{name}": torch.tensor(mark) for name in weights}
    checkpoint.write_checkpoint(products, state, weights, {**moments, **steps})


def newest_goes(products: ArtifactDir) -> None:
    retention.remove(products.checkpoint(20))


def all_go(products: ArtifactDir) -> None:
    for _, path in products.published():
        retention.remove(path)


def another_in_its_place(products: ArtifactDir) -> None:
    newest_goes(products)
    save(products, 20, 3.0)


FATES = {"the newest goes": newest_goes, "all go": all_go, "another in its place": another_in_its_place}


def job(path: Path) -> ArtifactDir:
    """A job with two checkpoints."""
    products = ArtifactDir(path)
    save(products, 10, 1.0)
    save(products, 20, 2.0)
    return products


def at_each_line(area: str, every: int, path: Path, fate: Fate, load: Callable[[ArtifactDir, Path], None]) -> int:
    """``load(job, place of its own)`` again and again, ``fate`` at one line after the other; how many there are."""
    for line in range(1, MAX_LINES, every):
        products, reached = job(path / f"job-{line}" / "theirs"), list[str]()

        def strike(where: str, products: ArtifactDir = products, reached: list[str] = reached) -> None:
            sys.settrace(None)
            reached.append(where)
            fate(products)

        sys.settrace(at_line(marked_code(area), line, strike))
        try:
            load(products, products.path.with_name("mine"))
        except Exception as error:
            raise AssertionError(f"struck at line {line}, {reached}") from error
        finally:
            sys.settrace(None)
        if not reached:
            return line
    raise AssertionError("more lines than expected")


def loaded(place: Path) -> float:
    """What all of a checkpoint says."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = checkpoint.load_checkpoint(place, model, optimizer)
    tensors = [*model.parameters(), *(tensor for moments in optimizer.state.values() for tensor in moments.values())]
    assert len(tensors) == 2 + 2 * 3
    said = {state.loss, *(float(x) for tensor in tensors for x in tensor.detach().flatten())}
    assert len(said) == 1, f"torn: {said}"
    return float(said.pop() or 0.0)


def start(mine: Path) -> resume.ResumePoint | None:
    run = RunDir(mine)
    run.path.mkdir(exist_ok=True)
    described = {"data": {"data_path": "/x"}, "checkpoint": {"from_resume": True}}
    spec = JobSpec.model_validate_json(json.dumps(described))
    return resume.find_resume_point(spec, run, run.artifacts(None), IDENTITY, lambda _: False, lambda _: None)


def goes_on_from(products: ArtifactDir, mine: Path) -> None:
    """Two ranks, one after the other, load the same thing, whatever became of the checkpoint meanwhile."""
    begin = start(mine)
    if begin is None:
        assert {step: loaded(path) for step, path in products.published()} in ({}, {10: 1.0, 20: 3.0})
        return
    first, second = loaded(begin.checkpoint), loaded(begin.checkpoint)
    assert first == second
    assert first in (1.0, 2.0, 3.0)


def shares(products: ArtifactDir, mine: Path) -> None:
    """A fork's or an export's share: whole, or refused."""
    target = mine / "origin"
    try:
        share.link_checkpoint(products.checkpoint(20), target)
    except StepUnavailable:
        return
    assert checkpoint.verify(target) is None
    assert loaded(target) in (2.0, 3.0)


def downloads(products: ArtifactDir, _: Path) -> None:
    """All of one file, under its own digest; or it is not there."""
    try:
        file, sha256 = checkpoint_files.open_listed(products.checkpoint(20), "model.safetensors")
    except FileNotInCheckpoint:
        return
    with file:
        assert hashlib.sha256(file.read()).hexdigest() == sha256


LOADS = {
    "another job": ("resume", goes_on_from, 60),
    "a fork or an export": ("share", shares, 40),
    "a download": ("download", downloads, 15),
}


@pytest.mark.parametrize("who", LOADS)
def test_what_is_taken_up_is_whole_whenever_retention_strikes(who: str, tmp_path: Path) -> None:
    area, load, least = LOADS[who]
    assert at_each_line(area, SHORT, tmp_path, another_in_its_place, load) > least


@pytest.mark.soak
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("who", LOADS)
def test_at_each_line(who: str, fate: str, tmp_path: Path) -> None:
    area, load, least = LOADS[who]
    lines = at_each_line(area, 1, tmp_path, FATES[fate], load)
    print(f"{who}, {fate}: {lines} lines")
    assert lines > least
