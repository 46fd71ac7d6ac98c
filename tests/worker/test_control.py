"""A stop or a save that is requested by a file or by a signal."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unprivileged import drop_root, public_tmp_dir
from trainyard.worker.stop_signal import StopSignal
from trainyard.worker.training.control import take_request


def test_a_stop_by_file_and_by_signal(tmp_path: Path) -> None:
    import signal

    stop = StopSignal(tmp_path / "stop")
    assert not stop.requested()
    (tmp_path / "stop").touch()
    assert stop.requested()
    by_signal = StopSignal(None)
    by_signal.on_signal(signal.SIGINT, None)
    assert by_signal.requested()
    with pytest.raises(KeyboardInterrupt):
        by_signal.on_signal(signal.SIGINT, None)


def test_a_temporary_io_error_is_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may evict its client. The request is found once the files can be read again."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    stop, save = StopSignal(tmp_path / "stop"), tmp_path / "save"
    for file in (tmp_path / "stop", save):
        file.touch()
    for call in ("stat", "unlink"):
        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            assert stop.requested() == (call != "stat")
            assert not take_request(save)
    assert stop.requested()
    assert take_request(save)
    assert not take_request(save)


def test_a_run_directory_that_cannot_be_read_requests_no_stop() -> None:
    with public_tmp_dir() as folder:
        (folder / "stop").touch()
        folder.chmod(0)
        with drop_root():
            assert not StopSignal(folder / "stop").requested()
        folder.chmod(0o755)
        assert StopSignal(folder / "stop").requested()
