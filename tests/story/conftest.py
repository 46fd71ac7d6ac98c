"""Fixtures of the stories: a service for each module, a free port, and the code of release 0.1."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.story import service_process
from tests.story.service_process import Served

RELEASE_0_1 = "3dc47211ad9d41b04c08c5fedc7407a10f598d4f"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Served]:
    service = Served(tmp_path_factory.mktemp("home") / "home", [corpus.parent])
    service.start()
    yield service
    service.stop()


@pytest.fixture
def free_port() -> str:
    """A free port, as text."""
    return str(service_process.free_port())


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the code of release 0.1."""
    archive = subprocess.run(["git", "archive", RELEASE_0_1], cwd=ROOT, capture_output=True)
    if archive.returncode != 0:
        pytest.skip("release 0.1 is not in this repository's history")
    folder = tmp_path_factory.mktemp("release-0.1")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder
