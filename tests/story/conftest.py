"""The service that a module's stories are told to; each module has its own ``corpus``."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.story.served import Served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Served]:
    service = Served(tmp_path_factory.mktemp("home") / "home", [corpus.parent])
    service.start()
    yield service
    service.stop()
