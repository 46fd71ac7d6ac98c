"""A stop that is requested by a file or by a signal."""

from pathlib import Path

import pytest

from trainyard.worker.training.control import StopSignal


def test_a_wish_to_stop(tmp_path: Path) -> None:
    import signal

    wish = StopSignal(tmp_path / "stop")
    assert not wish.requested()
    (tmp_path / "stop").touch()
    assert wish.requested()
    by_signal = StopSignal(None)
    by_signal.on_signal(signal.SIGINT, None)
    assert by_signal.requested()
    with pytest.raises(KeyboardInterrupt):
        by_signal.on_signal(signal.SIGINT, None)
