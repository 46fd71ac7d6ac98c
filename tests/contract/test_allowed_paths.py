"""Paths are opened below their roots, whatever is exchanged for a link and when."""

import errno
import os
from pathlib import Path

import pytest

from trainyard.contract import allowed_paths
from trainyard.contract.allowed_paths import (
    OutsideRoots,
    directory_inside,
    new_directory,
    open_inside,
    open_regular_in,
    open_regular_inside,
)


@pytest.fixture(params=["openat2", "without openat2"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without openat2":
        monkeypatch.setattr(allowed_paths, "_openat2", lambda *_: None)


@pytest.fixture
def folders(tmp_path: Path, either_kernel: None) -> tuple[Path, Path]:
    """A root and a place outside of it, with a file of the same name in each."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "in", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    return root, outside


def read(path: Path, root: Path) -> bytes:
    with open_regular_inside(path, [root]) as file:
        return file.readall()


def test_links_are_followed_as_long_as_they_stay_inside(folders: tuple[Path, Path]) -> None:
    root, outside = folders
    (root / "link").symlink_to(root / "in")
    (root / "leads-out").symlink_to(outside)
    assert read(root / "link" / "file", root) == b"in"
    for path in (root / "leads-out" / "file", root / ".." / "outside" / "file", outside / "file"):
        with pytest.raises(OutsideRoots, match="lies outside"):
            read(path, root)
    with open_regular_inside(outside / "file", ()) as file:
        assert file.readall() == b"outside", "without roots everything may be read"


@pytest.mark.parametrize("part", ["file", "directory"])
def test_a_link_that_appears_after_the_check_is_not_followed(
    folders: tuple[Path, Path], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = folders
    resolve = Path.resolve

    def resolve_then_exchange(path: Path, strict: bool = False) -> Path:
        real = resolve(path, strict)
        if path.name == "file":
            exchanged = path if part == "file" else path.parent
            exchanged.rename(root / "before")
            exchanged.symlink_to(outside / "file" if part == "file" else outside)
        return real

    monkeypatch.setattr(Path, "resolve", resolve_then_exchange)
    with pytest.raises(OutsideRoots, match="was replaced by a link"):
        read(root / "in" / "file", root)


def test_directories_are_created_below_the_root_alone(folders: tuple[Path, Path]) -> None:
    root, outside = folders
    os.close(open_inside(root / "a" / "b", [root], os.O_RDONLY | os.O_DIRECTORY, create=True))
    os.close(open_inside(root / "a" / "b", [root], os.O_RDONLY | os.O_DIRECTORY, create=True))
    assert (root / "a" / "b").is_dir()
    (root / "leads-out").symlink_to(outside)
    with pytest.raises(OutsideRoots):
        open_inside(root / "leads-out" / "c", [root], os.O_RDONLY | os.O_DIRECTORY, create=True)
    assert not (outside / "c").exists()


def test_what_is_written_stays_in_the_directory_that_was_opened(folders: tuple[Path, Path]) -> None:
    root, outside = folders
    with directory_inside(root / "in", [root]) as folder, new_directory(folder / "new") as new:
        (root / "in").rename(root / "before")
        (root / "in").symlink_to(outside)
        (folder / "written").write_text("x")
        (root / "before" / "new").rename(root / "new")
        (root / "before" / "new").symlink_to(outside)
        (new / "written").write_text("x")
    assert (root / "before" / "written").exists()
    assert (root / "new" / "written").exists()
    assert not (outside / "written").exists()


def test_errors_name_the_path_and_not_the_descriptor(folders: tuple[Path, Path]) -> None:
    root, _ = folders
    with pytest.raises(FileNotFoundError) as failed, directory_inside(root / "in", [root]) as folder:
        (folder / "missing").read_bytes()
    assert failed.value.filename == str(root / "in" / "missing")


def test_only_regular_files_are_opened_and_nothing_blocks(folders: tuple[Path, Path]) -> None:
    root, _ = folders
    os.mkfifo(root / "fifo")
    (root / "link").symlink_to(root / "in" / "file")
    for path in (root / "fifo", root / "in"):
        with pytest.raises(OSError, match="not a regular file"):
            read(path, root)
    with directory_inside(root) as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(OSError, match="not a regular file"):
            open_regular_in(descriptor, "fifo")
        with pytest.raises(OSError) as refused:
            open_regular_in(descriptor, "link")
        os.close(descriptor)
    assert refused.value.errno == errno.ELOOP


def test_a_loop_and_a_missing_file(folders: tuple[Path, Path]) -> None:
    root, _ = folders
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(OSError):
        read(root / "loop", root)
    with pytest.raises(FileNotFoundError) as missing:
        read(root / "in" / "none", root)
    assert missing.value.filename == str(root / "in" / "none")
    with pytest.raises(NotADirectoryError):
        read(root / "in" / "file" / "below", root)
