"""The files of attempts, as a launcher reads them."""

import io
from pathlib import Path
from typing import Any

import pytest

from trainyard.service.launch.base import AttemptRef
from trainyard.service.launch.files import AttemptFiles


def test_an_outbox_that_is_polled_is_not_read_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent of a cluster's node that cannot reach the service is read every few seconds for the whole run."""
    name = AttemptRef("job_1", 1)
    files = AttemptFiles(tmp_path, tmp_path / "cache")
    outbox = files.attempt(name).outbox
    outbox.parent.mkdir(parents=True)
    outbox.write_bytes(b'{"kind":"warning"}\n' * 300_000)
    assert [line["seq"] for line in files.unacked_lines(name, 299_999, 10)] == [300_000]
    assert files.unacked_lines(name, 300_000, 10) == []
    sizes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            sizes.append(super().readinto(buffer) or 0)
            return sizes[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BufferedReader(Counted(path, "rb")))
        assert files.unacked_lines(name, 300_000, 10) == []
        assert sum(sizes) == 0
        with open(outbox, "ab") as more:
            more.write(b'{"kind":"phase"}\n')
        assert [line["seq"] for line in files.unacked_lines(name, 300_000, 10)] == [300_001]
        assert 0 < sum(sizes) < 100
    assert [line["seq"] for line in files.unacked_lines(name, 5, 1)] == [6], "a service that has lost lines"
