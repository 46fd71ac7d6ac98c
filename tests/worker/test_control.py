"""A stop that is requested by a file or by a signal."""

from pathlib import Path

import pytest

from tests.unprivileged import drop_root, public_tmp_dir
from trainyard.worker.stop_signal import StopSignal


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


def test_a_run_directory_that_cannot_be_read_is_no_stop() -> None:
    with public_tmp_dir() as folder:
        (folder / "stop").touch()
        folder.chmod(0)
        with drop_root():
            assert not StopSignal(folder / "stop").requested()
        folder.chmod(0o755)
        assert StopSignal(folder / "stop").requested()
