"""Paths of a spec that lie outside of the allowed folders."""

from pathlib import Path
from typing import Any

import pytest

from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.errors import TrainingError
from trainyard.worker.paths import check_allowed_paths


def spec(**groups: Any) -> JobSpec:
    import json

    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": "/x"}, **groups}))


def test_paths_outside_the_roots_are_refused(tmp_path: Path) -> None:
    home, data, outside = tmp_path / "home", tmp_path / "data", tmp_path / "outside"
    run = RunDir(home / "runs" / "job")
    for directory in (run.path, data, outside):
        directory.mkdir(parents=True)
    roots = {"TRAINYARD_DATA_ROOTS": str(data), "TRAINYARD_SAVE_ROOTS": str(data)}
    for good in (data / "c.jsonl", home / "c.jsonl"):
        check_allowed_paths(spec(data={"data_path": str(good)}), run, roots)
    check_allowed_paths(spec(data={"data_path": str(outside)}), run, {})
    (data / "link").symlink_to(outside)
    inside = {"data": {"data_path": str(data / "c.jsonl")}}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("data.data_path", {"data": {"data_path": str(data / "link" / "c.jsonl")}}),
        ("data.data_path", {"data": {"data_path": str(data / ".." / "outside" / "c")}}),
        ("data.eval_data_path", {"data": {"data_path": str(data / "c.jsonl"), "eval_data_path": str(outside)}}),
        ("data.tokenizer_path", {"data": {"data_path": str(data / "c.jsonl"), "tokenizer_path": str(outside)}}),
        ("training.from_weight", {**inside, "training": {"from_weight": str(outside / "w")}}),
        ("checkpoint.save_dir", {**inside, "checkpoint": {"save_dir": str(outside)}}),
    ]
    for field, groups in bad:
        with pytest.raises(TrainingError, match=f"{field} lies outside"):
            check_allowed_paths(spec(**groups), run, roots)


def test_a_directory_that_has_become_empty_is_left_to_the_opening_and_a_source_is_named(tmp_path: Path) -> None:
    run, data, outside = RunDir(tmp_path / "home" / "runs" / "job"), tmp_path / "data", tmp_path / "outside"
    for directory in (run.path, data / "empty", outside):
        directory.mkdir(parents=True)
    roots = {"TRAINYARD_DATA_ROOTS": str(data)}
    (data / "empty" / "link").symlink_to(outside)
    for path in (str(data / "empty"), f"{data}/*.jsonl"):
        check_allowed_paths(spec(data={"data_path": path}), run, roots)
    for corpus in (str(outside), f"{outside}/*", [str(data / "empty"), str(outside)]):
        sources = {"data_path": None, "sources": [{"name": "web", "path": corpus}]}
        with pytest.raises(TrainingError, match="source web lies outside"):
            check_allowed_paths(spec(data=sources), run, roots)
        held_out = {"data_path": str(data / "empty"), "eval_sources": [{"name": "web", "path": corpus}]}
        with pytest.raises(TrainingError, match="held-out set web lies outside"):
            check_allowed_paths(spec(data=held_out), run, roots)
