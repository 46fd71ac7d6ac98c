"""Links that are changed between submit and start: refused with a reason, nothing outside is read or written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker import rank_runner
from trainyard.contract.allowed_paths import OutsideRoots, outside_reason
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.service.devices.inventory import cpu_slots
from trainyard.service.errors import SpecInvalid
from trainyard.service.jobs.submission import HostLimits, validate_spec
from trainyard.service.launch.base import AttemptRef, Launch
from trainyard.service.launch.environment import WorkerEnvironment
from trainyard.service.settings import Settings
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.weights import load_weights, write_weights
from trainyard.worker.errors import TrainingError
from trainyard.worker.paths import check_allowed_paths, weight_roots

TOKENIZER = {"model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2}, "merges": []}, "added_tokens": []}


class Ground:
    """A data root, a save root, and a place outside of both that holds the very same."""

    def __init__(self, path: Path) -> None:
        self.home, self.data, self.save, self.outside = (path / name for name in ("home", "data", "save", "outside"))
        self.run = RunDir(self.home / "runs" / "job_aaaa")
        for folder in (self.run.path, self.data / "in", self.save / "in"):
            folder.mkdir(parents=True)
        rank_runner.corpus(self.data / "in" / "corpus.jsonl")
        rank_runner.corpus(self.data / "in" / "held-out.jsonl", documents=9, seed=6)
        (self.data / "in" / "tok").mkdir()
        (self.data / "in" / "tok" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        torch.save({"x": torch.zeros(1)}, self.data / "in" / "start.pth")
        shutil.copytree(self.data / "in", self.outside)
        self.settings = Settings.read(
            {"TRAINYARD_DATA_ROOTS": str(self.data), "TRAINYARD_SAVE_ROOTS": str(self.save)}, home=self.home
        )
        self.environment = {
            "TRAINYARD_DATA_ROOTS": f"{self.data}:{self.home}",
            "TRAINYARD_SAVE_ROOTS": f"{self.save}:{self.home}",
        }

    def submitted(self, **groups: dict[str, Any]) -> JobSpec:
        """As the service takes it."""
        groups["training"] = {"max_steps": 2, **groups.get("training", {})}
        described = rank_runner.spec(self.data / "in" / "corpus.jsonl", **groups)
        return validate_spec(described, HostLimits(self.settings, cpu_slots(1)))

    def found_outside(self) -> dict[str, tuple[int, int]]:
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in [self.outside, *self.outside.rglob("*")]}


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path.resolve())


def swap(path: Path, target: Path) -> None:
    """``path`` is now a link to ``target``."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


Groups = Callable[[Ground], dict[str, dict[str, Any]]]
FIELDS: list[tuple[str, Groups]] = [
    ("data.data_path", lambda ground: {}),
    ("data.eval_data_path", lambda ground: {"data": {"eval_data_path": str(ground.data / "in" / "held-out.jsonl")}}),
    ("data.tokenizer_path", lambda ground: {"data": {"tokenizer_path": str(ground.data / "in" / "tok")}}),
    ("training.from_weight", lambda ground: {"training": {"from_weight": str(ground.data / "in" / "start.pth")}}),
    ("checkpoint.save_dir", lambda ground: {"checkpoint": {"save_dir": str(ground.save / "in")}}),
]


def leaf_of(spec: JobSpec, field: str) -> Path:
    group, leaf = field.split(".")
    return Path(str(getattr(getattr(spec, group), leaf)))


@pytest.mark.parametrize(("field", "groups"), FIELDS, ids=[field for field, _ in FIELDS])
@pytest.mark.parametrize("where", ["the path itself", "the folder above it"])
def test_a_link_that_was_changed_is_refused_by_name(ground: Ground, field: str, groups: Groups, where: str) -> None:
    spec = ground.submitted(**groups(ground))
    check_allowed_paths(spec, ground.run, ground.environment)
    path = leaf_of(spec, field)
    if where == "the path itself":
        swap(path, ground.outside if field == "checkpoint.save_dir" else ground.outside / path.name)
    else:
        parent = ground.save if field == "checkpoint.save_dir" else path.parent
        swap(parent, ground.outside)
        ground.environment = {
            # A root that is a link itself means what it means now, as it does for the service.
            "TRAINYARD_DATA_ROOTS": f"{ground.data}:{ground.home}",
            "TRAINYARD_SAVE_ROOTS": f"{ground.home}",
        }
    first = "data.data_path" if where != "the path itself" and field != "checkpoint.save_dir" else field
    with pytest.raises(TrainingError, match=f"{first} lies outside the directories") as refused:
        check_allowed_paths(spec, ground.run, ground.environment)
    assert "Nothing was read from it" in str(refused.value.hint)
    assert refused.value.reason == "spec_invalid"


def test_a_file_in_a_folder_may_be_the_link(ground: Ground) -> None:
    tokenizer = {"data": {"tokenizer_path": str(ground.data / "in" / "tok")}}
    spec = ground.submitted(**tokenizer)
    swap(ground.data / "in" / "tok" / "tokenizer.json", ground.outside / "tok" / "tokenizer.json")
    with pytest.raises(TrainingError, match=r"data\.tokenizer_path holds a link that leads outside"):
        check_allowed_paths(spec, ground.run, ground.environment)
    with pytest.raises(SpecInvalid) as refused:
        ground.submitted(**tokenizer)
    assert [problem["pointer"] for problem in refused.value.extra["errors"]] == ["/data/tokenizer_path"]


@pytest.mark.parametrize("inner", ["", "checkpoints", "out"])
def test_a_link_where_the_job_saves_is_refused(ground: Ground, inner: str) -> None:
    spec = ground.submitted(checkpoint={"save_dir": str(ground.save / "in")})
    place = ground.save / "in" / "job_aaaa" / inner
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(ground.outside)
    with pytest.raises(TrainingError, match=r"checkpoint\.save_dir (lies outside|holds a link)"):
        check_allowed_paths(spec, ground.run, ground.environment)


def test_minimind_s_bare_name_may_be_a_link_too(ground: Ground) -> None:
    spec = ground.submitted(checkpoint={"save_dir": str(ground.save / "in")}, training={"from_weight": "pretrain"})
    check_allowed_paths(spec, ground.run, ground.environment)
    (ground.save / "in" / "pretrain_32.pth").symlink_to(ground.outside / "start.pth")
    with pytest.raises(TrainingError, match=r"training\.from_weight lies outside"):
        check_allowed_paths(spec, ground.run, ground.environment)


def test_links_that_stay_inside_and_those_that_lead_nowhere(ground: Ground) -> None:
    inside, loop = ground.data / "link", ground.data / "loop"
    inside.symlink_to(ground.data / "in")
    loop.symlink_to(loop)
    assert outside_reason(inside / "corpus.jsonl", [ground.data]) is None
    assert outside_reason(loop, [ground.data]) == "cannot be resolved inside"
    assert outside_reason("a\0b", [ground.data]) == "cannot be resolved inside"
    assert outside_reason(ground.data / ".." / "outside", [ground.data]) == "lies outside"
    assert outside_reason(ground.data.with_name("data-and-more"), [ground.data]) == "lies outside"


def listen(outside: str, heard: str) -> None:
    """In a rank's process: note every file that is opened below ``outside``."""

    def hook(name: str, given: tuple[Any, ...]) -> None:
        touches = name in ("open", "os.mkdir", "os.rename", "os.link", "os.remove") and isinstance(given[0], str)
        if touches and os.path.realpath(given[0]).startswith(outside):
            descriptor = os.open(heard, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{name} {given[0]}\n".encode())
            os.close(descriptor)

    sys.addaudithook(hook)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["data.data_path", "checkpoint.save_dir"])
def test_a_rank_that_finds_a_changed_link_touches_nothing(ground: Ground, field: str) -> None:
    spec = ground.submitted(checkpoint={"save_dir": str(ground.save / "in")})
    ground.run.spec.write_text(spec.model_dump_json())
    heard = ground.home / "heard"
    before = ground.found_outside()
    swap(ground.data / "in" if field == "data.data_path" else ground.save / "in", ground.outside)
    patch = partial(listen, str(ground.outside), str(heard))
    outcome = rank_runner.run_to_end(ground.run, patch=patch, environment=ground.environment)
    assert (outcome.outcome, outcome.reason, outcome.step) == ("failed", "spec_invalid", 0)
    assert outcome.message == f"{field} lies outside the directories this service may use"
    assert outcome.error is not None
    assert "Nothing was read from it" in str(outcome.error.hint)
    assert not heard.exists(), heard.read_text()
    assert ground.found_outside() == before


@pytest.mark.slow
def test_what_listens_hears_a_run_without_limits(ground: Ground) -> None:
    """The two tests above would pass with ears that hear nothing."""
    spec = ground.submitted(checkpoint={"save_dir": str(ground.save / "in")})
    ground.run.spec.write_text(spec.model_dump_json())
    heard = ground.home / "heard"
    for path in (ground.data / "in", ground.save / "in"):
        swap(path, ground.outside)
    outcome = rank_runner.run_to_end(ground.run, patch=partial(listen, str(ground.outside), str(heard)))
    assert outcome.outcome == "completed"
    said = heard.read_text()
    assert "corpus.jsonl" in said
    assert "os.mkdir" in said


def checkpoint_state(step: int) -> files.RunState:
    identity = RunIdentity(model={}, tokenizer="t", corpus="c", seed=1, max_seq_len=8, packing="none")
    return files.RunState(step=step, tokens=0, rows_per_step=4, world_size=1, identity=identity)


@pytest.mark.parametrize("part", ["save_dir", "the job's folder", "checkpoints"])
def test_saves_do_not_follow_a_link_that_appears_during_the_run(
    ground: Ground, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a save, and in the middle of one."""
    monkeypatch.setenv("TRAINYARD_SAVE_ROOTS", ground.environment["TRAINYARD_SAVE_ROOTS"])
    spec = ground.submitted(checkpoint={"save_dir": str(ground.save / "in")})
    artifacts = ground.run.artifacts(spec.checkpoint.save_dir)
    weights = {"weight": torch.ones(2, 2)}
    files.write_checkpoint(artifacts, checkpoint_state(1), weights, {})
    before = ground.found_outside()
    exchanged = {
        "save_dir": ground.save / "in",
        "the job's folder": artifacts.path,
        "checkpoints": artifacts.checkpoints,
    }
    place, write_blocks, done = exchanged[part], files.write_blocks, list[str]()

    def exchange_then_write(path: Path, blocks: Any) -> Any:
        if not done:
            place.rename(ground.home / "taken-away")
            place.symlink_to(ground.outside)
            done.append(path.name)
        return write_blocks(path, blocks)

    monkeypatch.setattr(files, "write_blocks", exchange_then_write)
    files.write_checkpoint(artifacts, checkpoint_state(2), weights, {})
    assert done
    assert len(list((ground.home / "taken-away").rglob("step-00000002"))) == 1, "it is where the folder is now"
    assert ground.found_outside() == before
    for refused in (
        lambda: files.write_checkpoint(artifacts, checkpoint_state(3), weights, {}),
        lambda: write_weights(artifacts.out / "pretrain_512.pth", weights),
        lambda: files.verify(artifacts.checkpoint(1)) and files.read_manifest(artifacts.checkpoint(1)),
        lambda: files.quarantine(artifacts.checkpoint(1)),
    ):
        if part == "checkpoints" and refused.__code__.co_names[0] == "write_weights":
            continue  # the folder of the weights is still the job's
        with pytest.raises(OutsideRoots, match="may use"):
            refused()
    assert ground.found_outside() == before


def test_weights_that_are_exchanged_after_the_check_are_not_read(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ground.submitted(training={"from_weight": str(ground.data / "in" / "start.pth")})
    check_allowed_paths(spec, ground.run, ground.environment)
    swap(ground.data / "in" / "start.pth", ground.outside / "start.pth")
    for name, value in ground.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=r"training\.from_weight lies outside the directories"):
        load_weights(torch.nn.Linear(1, 1), spec, ground.run.artifacts(None), weight_roots(ground.run))


def test_adding_the_directory_is_enough(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.jsonl").write_text("")
    run = RunDir(tmp_path / "home" / "runs" / "job_a")
    spec = JobSpec.model_validate({"data": {"data_path": str(elsewhere / "c.jsonl")}})
    with pytest.raises(TrainingError) as refused:
        check_allowed_paths(spec, run, {"TRAINYARD_DATA_ROOTS": str(tmp_path / "data")})
    assert "add its directory to TRAINYARD_DATA_ROOTS" in str(refused.value.hint)
    check_allowed_paths(spec, run, {"TRAINYARD_DATA_ROOTS": f"{tmp_path / 'data'}:{elsewhere}"})


def test_a_folder_with_a_colon_is_read_and_written(tmp_path: Path) -> None:
    data = tmp_path / "a:b"
    data.mkdir()
    (data / "c.jsonl").write_text("")
    run = RunDir(tmp_path / "home" / "runs" / "job_a")
    groups = {"data": {"data_path": str(data / "c.jsonl")}, "checkpoint": {"save_dir": str(data / "out")}}
    spec = JobSpec.model_validate(groups)
    launch = Launch(AttemptRef("job_a", 1), "att_a", spec, (), "token")
    environment = WorkerEnvironment(tmp_path / "home", tmp_path, [data], [data]).of(launch)
    check_allowed_paths(spec, run, environment)
    with pytest.raises(TrainingError, match="lies outside"):
        # As release 0.1 handed it over.
        check_allowed_paths(spec, run, {"TRAINYARD_DATA_ROOTS": f"{data}:{tmp_path / 'home'}"})
