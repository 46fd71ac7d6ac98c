"""Malicious checkpoints are skipped with their fault named, and never loaded.

Their manifests have the right sha256, because an attacker would compute it too.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.soak_report import seed
from trainyard.contract.events import Event, WarningEvent
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import (
    CHECKPOINT_FILES,
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    ArtifactDir,
    FileDigest,
    RunDir,
    manifest_json,
)
from trainyard.contract.spec import JobSpec
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import RunState, TensorShapes
from trainyard.worker.checkpoint.resume import find_resume_point
from trainyard.worker.errors import TrainingError
from trainyard.worker.training.nonfinite import NonFiniteCounters
from trainyard.worker.training.state import TrainProgress

IDENTITY = RunIdentity(model={}, tokenizer="t", corpus="c", seed=1, max_seq_len=8, packing="none")
OLDER, NEWER = 3, 4
STRANGE: tuple[Any, ...] = (
    *(-3, 0, 1, 2**31, 2**63, 10**400, 1.5, 1e308, float("nan"), float("inf"), True, None, "", "7", "x" * 999),
    *([], [0], {}, {"bytes": 1}, [[[[]]]], "../../state.json", "/etc/passwd", "\0"),
)


class Trained:
    """A small model after a few steps of AdamW, and a job with a checkpoint of each of two steps."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.run = RunDir(path / "runs" / "job_mine")
        self.artifacts = self.run.artifacts(None)
        self.shapes = TensorShapes.of(self.model)
        for step in (OLDER, NEWER):
            self.train()
            self.save(step, self.artifacts)

    def train(self) -> None:
        self.model(torch.ones(3, 4)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, artifacts: ArtifactDir) -> Path:
        state = RunState(
            step=step,
            tokens=10,
            rows_per_step=4,
            world_size=1,
            identity=IDENTITY,
            loss=1.0,
            interval=[[1.0, 0.0, 2.0, 0.0]],
            trouble=dataclasses.asdict(NonFiniteCounters()),
            probe={"loss": 1.0, "dtype": "float32"},
        )
        tensors = files.optimizer_tensors(self.model, self.optimizer)
        return files.write_checkpoint(artifacts, state, self.model.state_dict(), tensors).path

    def resume(self, from_resume: Path | None = None) -> tuple[Path | None, list[str]]:
        """Find a checkpoint as an attempt does; return it with the warnings."""
        described: dict[str, Any] = {"data": {"data_path": "/x"}}
        if from_resume is not None:
            described["checkpoint"] = {"from_resume": True, "save_dir": str(from_resume)}
        spec = JobSpec.model_validate_json(json.dumps(described))
        events: list[Event] = []
        artifacts = self.run.artifacts(spec.checkpoint.save_dir)
        found = find_resume_point(
            spec,
            self.run,
            artifacts,
            IDENTITY,
            lambda state: state.step >= 100 // state.rows_per_step,
            events.append,
            shapes=self.shapes,
        )
        return found.checkpoint if found else None, [str(e.message) for e in events if isinstance(e, WarningEvent)]

    def load(self, path: Path) -> RunState:
        """Load it and train a step with it."""
        state = files.load_checkpoint(path, self.model, self.optimizer)
        TrainProgress.from_state(state)
        self.train()
        return state


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path)


def sign(folder: Path) -> None:
    """Write a manifest that is right for the files as they are."""
    contents = {name: (folder / name).read_bytes() for name in CHECKPOINT_FILES}
    manifest = {name: FileDigest(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    (folder / MANIFEST_FILE).write_bytes(manifest_json(manifest))


def edit_state(folder: Path, **fields: Any) -> None:
    value = json.loads((folder / STATE_FILE).read_bytes())
    (folder / STATE_FILE).write_text(json.dumps({**value, **fields}))
    sign(folder)


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    change(tensors)
    save_file(tensors, folder / name)
    sign(folder)


def replace_file(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    kept = folder.parent.parent / "kept"
    shutil.move(folder / name, kept)
    make(folder / name)


def endless(folder: Path) -> None:
    os.truncate(folder / MODEL_FILE, 1 << 40)
    sizes = {name: (folder / name).stat().st_size for name in CHECKPOINT_FILES}
    (folder / MANIFEST_FILE).write_bytes(manifest_json({name: FileDigest(size, "0") for name, size in sizes.items()}))


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "moments of another shape": (
        r"optimizer\.safetensors: exp_avg\.0\.weight is \[1\] and must be \[6, 4\]",
        lambda at: edit_tensors(at, OPTIMIZER_FILE, lambda t: t.update({"exp_avg.0.weight": torch.ones(1)})),
    ),
    "moments of another kind": (
        r"exp_avg_sq\.0\.bias is F64 and must be F32",
        lambda at: edit_tensors(
            at, OPTIMIZER_FILE, lambda t: t.update({"exp_avg_sq.0.bias": t["exp_avg_sq.0.bias"].double()})
        ),
    ),
    "a moment is missing": (
        r"has exp_avg and step of 0\.weight",
        lambda at: edit_tensors(at, OPTIMIZER_FILE, lambda t: t.pop("exp_avg_sq.0.weight")),
    ),
    "moments of a stranger": (
        r"exp_avg\.stranger is not part of the model",
        lambda at: edit_tensors(at, OPTIMIZER_FILE, lambda t: t.update({"exp_avg.stranger": torch.ones(1)})),
    ),
    "the optimizer is before its start": (
        r"step\.0\.bias is -3\.0",
        lambda at: edit_tensors(at, OPTIMIZER_FILE, lambda t: t.update({"step.0.bias": torch.tensor(-3.0)})),
    ),
    "weights of another shape": (
        r"model\.safetensors: 0\.bias is \[7\]",
        lambda at: edit_tensors(at, MODEL_FILE, lambda t: t.update({"0.bias": torch.ones(7)})),
    ),
    "a weight is missing": (
        r"model\.safetensors: has no 1\.bias",
        lambda at: edit_tensors(at, MODEL_FILE, lambda t: t.pop("1.bias")),
    ),
    "the step is negative": ("state.json: step", lambda at: edit_state(at, step=-3)),
    "the step is another one": ("state.json: is of another step", lambda at: edit_state(at, step=NEWER + 1)),
    "no rows in a step": ("state.json: rows_per_step", lambda at: edit_state(at, rows_per_step=0)),
    "a field of another type": ("state.json: interval", lambda at: edit_state(at, interval={"a": 1})),
    "an unknown field": ("state.json: stranger", lambda at: edit_state(at, stranger=1)),
    "rows of two lengths": ("state.json: interval", lambda at: edit_state(at, interval=[[1.0] * 4, [1.0] * 5])),
    "a loss that is no number": ("state.json: loss", lambda at: edit_state(at, loss=float("nan"))),
    "a manifest that is nested": (
        "manifest.json unreadable",
        lambda at: (at / MANIFEST_FILE).write_text('{"files":' + "[" * 100_000),
    ),
    "a manifest that names other files": (
        "manifest.json unreadable",
        lambda at: (at / MANIFEST_FILE).write_text(
            (at / MANIFEST_FILE).read_text().replace("state.json", "../step-00000003/state.json")
        ),
    ),
    "sizes that are no numbers": (
        "manifest.json unreadable",
        lambda at: (at / MANIFEST_FILE).write_text(
            json.dumps({"files": {name: {"bytes": float("inf"), "sha256": ""} for name in CHECKPOINT_FILES}})
        ),
    ),
    "a FIFO for the manifest": (
        "manifest.json unreadable",
        lambda at: replace_file(at, MANIFEST_FILE, os.mkfifo),
    ),
    "a FIFO for the weights": (
        "model.safetensors unreadable",
        lambda at: replace_file(at, MODEL_FILE, os.mkfifo),
    ),
    "a folder for the state": (
        "state.json unreadable",
        lambda at: replace_file(at, STATE_FILE, lambda path: path.mkdir()),
    ),
    "a link for the weights": (
        "model.safetensors unreadable",
        lambda at: replace_file(at, MODEL_FILE, lambda path: path.symlink_to(at.parent.parent / "kept")),
    ),
    "a file without an end": ("model.safetensors size", lambda at: endless(at)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_named_and_the_one_before_is_taken(trained: Trained, fault: str) -> None:
    message, harm = FAULTS[fault]
    harm(trained.artifacts.checkpoint(NEWER))
    found, warnings = trained.resume()
    assert found == trained.artifacts.checkpoint(OLDER)
    assert len(warnings) == 1
    assert re.search(message, warnings[0]), warnings
    assert trained.load(found).step == OLDER


@pytest.mark.parametrize("fault", FAULTS)
def test_another_job_s_is_passed_over(trained: Trained, fault: str, tmp_path: Path) -> None:
    """The same with a checkpoint of another job, through from_resume."""
    if fault == "the step is another one":
        pytest.skip("the step of another job's checkpoint is what its state says")
    folder = tmp_path / "shared"
    theirs = ArtifactDir(folder / "job_theirs")
    for step in (OLDER, NEWER):
        place = trained.save(step, theirs)
        os.utime(place, (step, step))
    FAULTS[fault][1](theirs.checkpoint(NEWER))
    os.utime(theirs.checkpoint(NEWER), (NEWER, NEWER))
    found, _ = trained.resume(from_resume=folder)
    assert found == ArtifactDir(folder / "job_mine").checkpoint(OLDER)
    assert trained.load(found).step == OLDER
    assert not list(found.parent.glob(".*"))


def test_a_link_out_of_every_root_is_not_read(trained: Trained, tmp_path: Path) -> None:
    folder, secret = tmp_path / "shared", tmp_path / "secret"
    theirs = trained.save(NEWER, ArtifactDir(folder / "job_theirs"))
    shutil.move(theirs / MODEL_FILE, secret)
    (theirs / MODEL_FILE).symlink_to(secret)
    found, warnings = trained.resume(from_resume=folder)
    assert found is None
    assert "beginning at step 0" in warnings[0]
    assert not list((folder / "job_mine").rglob("*.safetensors"))


def mutated_json(value: Any, chooser: random.Random) -> Any:
    """The same value with a change somewhere in its structure."""
    if isinstance(value, dict) and value and chooser.random() < 0.85:
        key = chooser.choice(list(value))
        change = chooser.random()
        if change < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if change < 0.25:
            return {**value, chooser.choice(["", "x", "../x", "\0", "version"]): chooser.choice(STRANGE)}
        return {**value, key: mutated_json(value[key], chooser)}
    if isinstance(value, list) and value and chooser.random() < 0.7:
        place = chooser.randrange(len(value))
        return chooser.choice([
            [*value[:place], mutated_json(value[place], chooser), *value[place + 1 :]],
            value * 2,
            value[:place],
        ])  # fmt: skip
    return chooser.choice(STRANGE)


def mutate_json(folder: Path, name: str, chooser: random.Random) -> None:
    value = json.loads((folder / name).read_bytes())
    (folder / name).write_text(json.dumps(mutated_json(value, chooser)))


def mutate_tensors(folder: Path, name: str, chooser: random.Random) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    key = chooser.choice(list(tensors))
    shape = chooser.choice([(), (0,), (1,), (5, 5), (6, 4, 1), tuple(tensors[key].shape)])
    dtype = chooser.choice([torch.float32, torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool])
    value = chooser.choice([-3.0, 0.0, 7.0, float("nan"), float("inf"), 1e30])
    match chooser.randrange(3):
        case 0:
            del tensors[key]
        case 1:
            tensors[chooser.choice([key, f"x{key}", f"exp_avg.{key}", "step", "momentum.0.bias"])] = torch.ones(shape)
        case _:
            tensors[key] = torch.full(shape, value).to(dtype)
    save_file(tensors, folder / name)


def mutate_bytes(folder: Path, name: str, chooser: random.Random) -> None:
    data = bytearray((folder / name).read_bytes())
    for _ in range(chooser.randint(1, 6)):
        # Most of them in the header of tensors.
        place = chooser.randrange(min(len(data), chooser.choice([16, 600, len(data)])))
        data[place] = chooser.choice([data[place] ^ 1 << chooser.randrange(8), *b'0[{"', 0xFF])
    (folder / name).write_bytes(data[: chooser.choice([len(data)] * 3 + [chooser.randrange(len(data))])])


def mutate_kind(folder: Path, name: str, chooser: random.Random) -> None:
    (folder / name).unlink()
    kind = chooser.choice(["none", "fifo", "folder", "link", "dangling", "empty", "device"])
    with contextlib.suppress(PermissionError):
        if kind == "fifo":
            os.mkfifo(folder / name)
        elif kind == "folder":
            (folder / name).mkdir()
        elif kind in ("link", "dangling", "device"):
            targets = {"link": f"../../linked-{name}", "dangling": "nowhere", "device": "/dev/zero"}
            (folder / name).symlink_to(targets[kind])
        elif kind == "empty":
            (folder / name).touch()


def try_mutation(trained: Trained, number: int, index: int) -> bool:
    """Harm the newer checkpoint by one or two changes, resume, load and train. Return whether it was passed over."""
    chooser = random.Random(f"{number} {index}")
    newer = trained.save(NEWER, trained.artifacts)
    for _ in range(chooser.choice([1, 1, 2])):
        name = chooser.choice([STATE_FILE, MODEL_FILE, OPTIMIZER_FILE, MANIFEST_FILE])
        tensors = name in (MODEL_FILE, OPTIMIZER_FILE)
        mutate = chooser.choice([mutate_tensors if tensors else mutate_json] * 5 + [mutate_bytes] * 3 + [mutate_kind])
        if (newer / name).is_file() and not (
            newer / name
        ).is_symlink():  # else the first change has made something else of it
            # The second change may find nothing that it can read.
            with contextlib.suppress(Exception):
                mutate(newer, name, chooser)
        if (
            name != MANIFEST_FILE
            and chooser.random() < 0.9
            # An earlier change may have put a folder or a FIFO in a file's place.
            and all((newer / each).is_file() for each in (*CHECKPOINT_FILES, MANIFEST_FILE))
        ):
            sign(newer)
    try:
        return resume_passes_over(trained)
    finally:
        for path in trained.artifacts.checkpoints.iterdir():
            if path != trained.artifacts.checkpoint(OLDER):
                shutil.rmtree(path)


def resume_passes_over(trained: Trained) -> bool:
    """Resume, load and train a step. Return whether the newer checkpoint was passed over."""
    try:
        found, warnings = trained.resume()
    except TrainingError as error:
        # A state that was changed and signed may be a valid one of another run.
        if "is of another run" not in error.message:
            raise
        return False
    assert found is not None
    passed_over = found == trained.artifacts.checkpoint(OLDER)
    assert passed_over == bool(warnings), warnings
    assert trained.load(found).step == (OLDER if passed_over else NEWER)
    return passed_over


def fuzz(trained: Trained, number: int, count: int) -> None:
    shutil.rmtree(trained.artifacts.checkpoint(NEWER))
    passed_over = 0
    for index in range(count):
        try:
            passed_over += try_mutation(trained, number, index)
        except BaseException:
            print(f"seed {number}, mutation {index}")
            raise
    print(f"seed {number}: {passed_over} of {count} passed over")
    assert passed_over > count // 2


def test_mutated_checkpoints_are_passed_over_or_harmless(trained: Trained) -> None:
    fuzz(trained, 20261130, 150)


@pytest.mark.soak
def test_a_thousand_mutated_checkpoints(trained: Trained) -> None:
    fuzz(trained, seed(), 1000)
