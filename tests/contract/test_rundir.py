"""Paths of a run, and files that are whole or not there."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from trainyard.contract.rundir import (
    ArtifactDir,
    FileDigest,
    RunDir,
    atomic_directory,
    manifest_json,
    parse_manifest,
    read_json,
    write_atomically,
    write_json,
)


def test_attempts_are_found_in_their_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in (10, 2, 1):
        run.attempt(number).path.mkdir()
    (tmp_path / "attempt-x").mkdir()
    assert [attempt.number for attempt in run.attempts()] == [1, 2, 10]


def test_only_published_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    products = ArtifactDir(tmp_path)
    for step in (100, 20):
        products.checkpoint(step).mkdir(parents=True)
    (products.checkpoints / ".step-00000300.tmp").mkdir()
    (products.checkpoints / "step-00000400").write_text("a file, not a checkpoint")
    assert [step for step, _ in products.published()] == [100, 20]


def test_products_of_two_jobs_in_one_save_dir_do_not_meet(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "job_a").artifacts("/out"), RunDir(tmp_path / "job_b").artifacts("/out")
    assert first.path == Path("/out/job_a")
    assert first.path != second.path


def test_minimind_s_names(tmp_path: Path) -> None:
    products = ArtifactDir(tmp_path)
    assert products.weights("pretrain", 512, use_moe=False).name == "pretrain_512.pth"
    assert products.weights("pretrain", 640, use_moe=True).name == "pretrain_640_moe.pth"


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "outcome.json"
    write_json(file, {"step": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"{}")
    assert read_json(file) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["outcome.json"]


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert read_json(tmp_path / "x.json") is None


def test_the_step_to_begin_at_is_read_where_one_was_named(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path).attempt(3)
    attempt.path.mkdir()
    assert attempt.read_resume_from() is None
    write_atomically(attempt.resume_from, b"1200\n")
    assert attempt.read_resume_from() == 1200
    assert attempt.save == tmp_path / "attempt-0003" / "save"


def test_milestones_are_no_checkpoints(tmp_path: Path) -> None:
    products = ArtifactDir(tmp_path)
    assert products.milestones() == []
    for step in (100, 20):
        products.milestone(step).mkdir(parents=True)
    products.checkpoint(20).mkdir()
    (products.checkpoints / ".saving-step-00000300-weights-7").mkdir()
    assert [step for step, _ in products.milestones()] == [100, 20]
    assert [step for step, _ in products.published()] == [20]


def test_an_atomic_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final, temporary = tmp_path / "all" / "step-1", tmp_path / "all" / ".saving-1"
    with atomic_directory(final, temporary) as directory:
        assert directory.samefile(temporary)
        (directory / "file").write_text("whole")
        assert not final.exists()
    assert (final / "file").read_text() == "whole"
    assert not temporary.exists()

    with suppress(ZeroDivisionError), atomic_directory(tmp_path / "all" / "step-2", temporary) as directory:
        (directory / "file").write_text(str(1 // 0))
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["step-1"]


def test_a_manifest_is_parsed_as_it_was_written() -> None:
    files = {"model.safetensors": FileDigest(10, "ab"), "state.json": FileDigest(0, "cd")}
    assert parse_manifest(manifest_json(files)) == files
    for other in (b"", b"[]", b"{}", b'{"files": []}', b'{"files": {"a": 1}}', b'{"files": {"a": {"bytes": 1}}}'):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            parse_manifest(other)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_what_is_written_follows_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", b"1")
        write_atomically(tmp_path / "a", b"2")
        write_json(tmp_path / "b", {})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"a": mode, "b": mode}
    assert (tmp_path / "a").read_bytes() == b"2"
