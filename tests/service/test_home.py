"""Who may enter the home and read the database."""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.service.test_service_process import DEADLINE, Process, start
from tests.unprivileged import drop_root, public_tmp_dir
from trainyard.service import home
from trainyard.service.db.cli import backup
from trainyard.service.db.engine import Database
from trainyard.service.settings import InvalidSettings, Settings

__all__ = ["start"]


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def upgrade(folder: Path) -> None:
    """Make the database of a home."""
    database = Database(f"sqlite:///{folder}/trainyard.db")
    database.upgrade()
    database.close()


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everyone may enter."""
    with public_tmp_dir() as folder:
        yield folder


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_home_of_an_earlier_release_is_closed_to_others(public: Path, start: Callable[..., Process]) -> None:
    folder = public / "home"
    (folder / "runs" / "job_a").mkdir(parents=True)
    shard = folder / "runs" / "job_a" / "weights"
    shard.write_text("of everyone")
    upgrade(folder)
    (folder / "trainyard.db").chmod(0o644)
    with drop_root():
        assert shard.read_text() == "of everyone"
    service = start(f"--home={folder}", home="logs")
    url = service.url()
    assert mode(folder) == "0700"
    database = [file for file in folder.iterdir() if file.name.startswith("trainyard.db")]
    assert {mode(file) for file in database} == {"0600"}
    lines = [line for line in service.said().splitlines() if "modes were changed" in line]
    assert len(lines) == 1, service.said()
    assert f"{folder} from 0755 to 0700, {folder}/trainyard.db from 0644 to 0600" in lines[0]
    assert "TRAINYARD_HOME_MODE" in lines[0]
    assert httpx2.get(f"{url}/jobs", timeout=DEADLINE).status_code == 200
    if os.geteuid() == 0:
        with drop_root(), pytest.raises(PermissionError):
            shard.read_text()
    service.end()
    again = start(f"--home={folder}", home="logs")
    again.url()
    assert "modes were changed" not in again.said()


def test_a_new_home_is_closed_to_others(public: Path, start: Callable[..., Process]) -> None:
    cache = public / "shards"
    service = start(f"--home={public / 'new' / 'home'}", home="logs", TRAINYARD_CORPUS_CACHE=str(cache))
    service.url()
    assert [mode(public / "new" / "home"), mode(cache)] == ["0700", "0700"]
    database = [file for file in (public / "new" / "home").iterdir() if file.name.startswith("trainyard.db")]
    assert {mode(file) for file in database} == {"0600"}
    assert "modes were changed" not in service.said()


def test_a_group_may_read_what_the_setting_allows(public: Path, start: Callable[..., Process]) -> None:
    folder = public / "home"
    service = start(f"--home={folder}", home="logs", TRAINYARD_HOME_MODE="0750")
    service.url()
    assert mode(folder) == "0750"
    assert mode(folder / "trainyard.db") == "0600", "no one but the service needs the secrets in it"


@pytest.mark.parametrize(("allowed", "umask"), [(0o700, 0o077), (0o750, 0o027), (0o755, 0o022)])
def test_new_files_follow_the_home(allowed: int, umask: int) -> None:
    os.umask(0o077)
    home.share_new_files(allowed)
    assert os.umask(0o022) == umask
    home.share_new_files(allowed)
    assert os.umask(0o022) == 0o022, "files outside of the home are as open as the user has them"


def test_a_backup_is_closed_to_others(tmp_path: Path) -> None:
    upgrade(tmp_path)
    backup(tmp_path / "trainyard.db", tmp_path / "copy.db")
    assert mode(tmp_path / "copy.db") == "0600"


def test_a_folder_of_others_stays_open_and_what_is_ours_is_closed(
    public: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (public / "datasets").mkdir()
    (public / "runs").mkdir()
    with caplog.at_level(logging.WARNING, "trainyard"):
        home.restrict(public, 0o700, None)
    assert mode(public) == "0755"
    assert [mode(public / name) for name in ("datasets", "runs", "cache", "trash")] == ["0755", "0700", "0700", "0700"]
    assert caplog.messages == [
        f"modes were changed: {public}/runs from 0755 to 0700; TRAINYARD_HOME_MODE sets that of the home"
    ]


def test_a_home_of_another_user_is_reported(
    public: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", denied)
    home.restrict(public, 0o700, None)
    assert caplog.messages == [f"the mode of {public} stays 0755: Operation not permitted"]


def test_a_shared_cache_keeps_its_mode(public: Path, start: Callable[..., Process]) -> None:
    cache = public / "shards"
    cache.mkdir(mode=0o755)
    start(f"--home={public / 'home'}", home="logs", TRAINYARD_CORPUS_CACHE=str(cache)).url()
    assert mode(cache) == "0755"


@pytest.mark.parametrize("text", ["700", "0700", "0750", "2750", "0755", "0710"])
def test_modes_that_may_be_set(text: str) -> None:
    assert Settings.read({"TRAINYARD_HOME_MODE": text}).home_mode == int(text, 8)


@pytest.mark.parametrize("text", ["0770", "0777", "0600", "rwx", "-1", "1700", "99"])
def test_modes_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidSettings, match="TRAINYARD_HOME_MODE must be an octal mode: 0700, or 0750"):
        Settings.read({"TRAINYARD_HOME_MODE": text})


def test_the_default() -> None:
    assert Settings.read({}).home_mode == 0o700
