"""A cluster for all tests of this folder, and homes whose service uses it. Skipped, with the reason, without Slurm."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MakeHome, make_home, nursery
from tests.faults.service_home import Home, telling
from tests.slurm.cluster import PATH, Cluster, skip_reason

__all__ = ["make_home", "nursery"]

MakeSlurmHome = Callable[..., Home]


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = skip_reason()
    if missing is not None:
        pytest.skip(missing)
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """Both nodes idle, and again afterwards."""
    with telling(whole_cluster.logs):
        yield whole_cluster
        whole_cluster.restore()


@pytest.fixture
def slurm_home(cluster: Cluster, make_home: MakeHome, tmp_path: Path) -> MakeSlurmHome:
    """Homes whose service has both launchers. ``settings`` go into its environment."""

    def make(name: str = "home", settings: dict[str, str] | None = None, **wanted: Any) -> Home:
        made = make_home(name, **wanted)
        # One thread a rank: sums differ in their last bits with the number.
        common = {"TRAINYARD_SLURM": "on", "TRAINYARD_SLURM_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PATH": PATH}
        made.environment |= {**common, **cluster.environment, **(settings or {})}
        made.start()
        return made

    return make
