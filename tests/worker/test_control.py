"""A stop that is requested by a file or by a signal."""

from pathlib import Path

import pytest

from trainyard.worker.training.control import StopWish


def test_a_wish_to_stop(tmp_path: Path) -> None:
    import signal

    wish = StopWish(tmp_path / "stop")
    assert not wish.asked()
    (tmp_path / "stop").touch()
    assert wish.asked()
    by_signal = StopWish(None)
    by_signal.on_signal(signal.SIGINT, None)
    assert by_signal.asked()
    with pytest.raises(KeyboardInterrupt):
        by_signal.on_signal(signal.SIGINT, None)
