"""Nodes that are separate hosts: they find each other and the home, or the error says what is missing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import MakeHome
from tests.faults.service_home import Home, telling
from tests.slurm import cluster, hosts
from tests.slurm.cluster import NODES, PATH
from tests.slurm.hosts import Hosts
from tests.slurm.slurm_jobs import fake, real, submit

MakeHosts = Callable[..., Home]


@pytest.fixture
def hosts_home(make_home: MakeHome, tmp_path: Path) -> Iterator[MakeHosts]:
    """A home whose service uses a cluster of two such hosts; ``without``: the node that does not have the home."""
    missing = cluster.skip_reason() or hosts.skip_reason()
    if missing is not None:
        pytest.skip(missing)
    made: list[Hosts] = []

    def make(without: str | None = None, **wanted: object) -> Home:
        home = make_home("home", **wanted)
        (tmp_path / "hosts").mkdir()
        made.append(Hosts(tmp_path / "hosts", {without: [home.path]} if without is not None else {}))
        made[0].start()
        slurm = {"TRAINYARD_SLURM": "on", "TRAINYARD_SLURM_DEVICE": "cpu", "TRAINYARD_SLURM_REPORTS": "directory"}
        home.environment |= {**slurm, "OMP_NUM_THREADS": "1", "PATH": PATH, **made[0].environment}
        home.start()
        return home

    try:
        with telling(lambda: "\n".join(each.logs() for each in made)):
            yield make
    finally:
        for each in made:
            each.stop()


@pytest.mark.soak
def test_ranks_meet_across_a_network_where_a_node_s_own_name_leads_to_itself(hosts_home: MakeHosts) -> None:
    home = hosts_home(real_ranks=True)
    job_id = submit(home, real(home))
    job = home.wait(job_id, "succeeded", seconds=120)
    assert (job["attempt"], job["placement"]["nodes"]) == (1, list(NODES))
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, 13))


@pytest.mark.soak
@pytest.mark.parametrize("node", NODES)
def test_a_node_that_does_not_have_the_home_is_named(hosts_home: MakeHosts, node: str) -> None:
    home = hosts_home(without=node)
    spec = fake(home, steps="1000", pace="0.1")
    spec["resources"]["max_restarts"] = 0
    job_id = submit(home, spec)
    error = home.wait(job_id, "failed", seconds=120)["error"]
    assert str(home.path) in f"{error['message']} {error['hint']}"
    if node != NODES[0]:
        assert error["message"].endswith(f"is not there on {node}")
