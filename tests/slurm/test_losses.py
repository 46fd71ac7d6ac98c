"""Lost nodes, killed ranks and time limits: the run resumes, and its weights equal the undisturbed run's."""

import signal

import pytest

from tests.faults.invariants import check_weights
from tests.faults.service_home import Home, Member, until
from tests.slurm.cluster import SECONDS, Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.slurm.slurm_jobs import attempts, fake, real, submit


def weights(home: Home, job_id: str) -> dict[str, bytes]:
    """The last checkpoint's tensors and the weights file."""
    run = home.run(job_id)
    last = run.artifacts(None).published()[0][1]
    files = [*last.glob("*.safetensors"), *(run.path / "out").glob("*.pth")]
    return {file.name: file.read_bytes() for file in files}


def losses(home: Home, job_id: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in home.metrics(job_id)]


def of_node(home: Home, job_id: str, node: str) -> list[Member]:
    """The processes of the job that run on this node."""
    return [m for m in home.processes(job_id) if m.process.variable("SLURMD_NODENAME") == node]


def lose(cluster: Cluster, home: Home, job_id: str, node: str, what: str) -> None:
    """SIGKILL to the part of the node that ``what`` names: ranks, torchrun, agent, steps, or all with its slurmd."""
    mine = of_node(home, job_id, node)
    kinds = {"ranks": ("rank",), "torchrun": ("torchrun",), "agent": ("agent",)}
    victims = [m.process for m in mine if m.role in kinds.get(what, ())]
    if what in ("steps", "node"):
        victims = cluster.steps(node)
    if what == "node":
        victims += cluster.daemons(node) + [m.process for m in mine]
    assert victims, f"nothing to kill: {what} on {node}"
    for victim in victims:
        victim.send(signal.SIGKILL)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("node", "what"),
    [
        ("node2", "ranks"),
        ("node2", "torchrun"),
        ("node1", "agent"),
        ("node2", "steps"),
        ("node2", "node"),
        ("node1", "node"),
    ],
)
def test_what_is_killed_is_started_again_with_the_same_weights(
    cluster: Cluster, slurm_home: MakeSlurmHome, node: str, what: str
) -> None:
    home = slurm_home(real_ranks=True)
    spec = real(home, steps=40)
    untouched = submit(home, spec)
    home.wait(untouched, "succeeded", seconds=240)
    job_id = submit(home, spec)
    home.reach(job_id, 9)
    lose(cluster, home, job_id, node, what)
    if what == "node":
        until(
            lambda: home.job(job_id)["attempt"] == 2 or home.job(job_id)["status"] == "interrupted",
            150,
            "it is noticed",
        )
        cluster.start_node(node)
    home.wait(job_id, "succeeded", seconds=300)
    print([(each["outcome"], each["reason"], each["message"]) for each in attempts(home, job_id)])
    assert len(attempts(home, job_id)) >= 2
    assert losses(home, job_id) == losses(home, untouched)
    assert weights(home, job_id) == weights(home, untouched)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_time_limit_met_three_times_leaves_no_step_out(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home()
    steps = 900
    job_id = submit(home, fake(home, slurm={"time_limit": 60}, steps=str(steps), pace="0.15", save="1000"))
    job = home.wait(job_id, "succeeded", seconds=600)
    reasons = [each["reason"] for each in attempts(home, job_id)]
    assert reasons[:-1] == ["time_limit"] * (job["attempt"] - 1)
    assert len(reasons) > 3, reasons
    assert {each["outcome"] for each in attempts(home, job_id)[:-1]} == {"stopped"}
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, steps + 1))
    check_weights(home, job_id, steps)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_partition_s_limit_that_is_shorter_than_the_warning_leaves_time_to_train(
    cluster: Cluster, slurm_home: MakeSlurmHome
) -> None:
    """Slurm warns such a job as soon as it has begun."""
    home = slurm_home()
    job_id = submit(home, fake(home, slurm={"partition": "short"}, steps="1000", pace="0.1", save="10000"))
    home.wait(job_id, "succeeded", seconds=300)
    first, *others = attempts(home, job_id)
    assert (first["outcome"], first["reason"], len(others)) == ("stopped", "time_limit", 1)
    assert first["end_step"] > 500, "three quarters of two minutes"
    check_weights(home, job_id, 1000)


@pytest.mark.soak
def test_gpus_are_leased_by_slurm_on_each_node(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home(settings={"TRAINYARD_SLURM_DEVICE": "cuda"})
    spec = fake(home, steps="60", pace="0.1")
    spec["resources"] |= {"device": "auto"}
    job_id = submit(home, spec)
    home.reach(job_id, 1)
    until(lambda: (home.job(job_id)["placement"] or {}).get("nodes"), what="its nodes")
    leased = home.job(job_id)["placement"]["devices"]
    assert leased == ["node1/cuda:0", "node2/cuda:0"]
    for node in ("node1", "node2"):
        seen = {m.process.variable("CUDA_VISIBLE_DEVICES") for m in of_node(home, job_id, node)}
        assert seen == {"0"}, node
    home.wait(job_id, "succeeded")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_that_may_take_fewer_nodes_goes_on_without_the_lost_one(
    cluster: Cluster, slurm_home: MakeSlurmHome
) -> None:
    home = slurm_home(real_ranks=True)
    home.tolerance = 1e-6
    untouched = submit(home, real(home, steps=40))
    home.wait(untouched, "succeeded", seconds=240)
    until(lambda: set(cluster.states().values()) == {"IDLE"}, SECONDS, "both nodes can be had")
    job_id = submit(home, real(home, steps=40, nnodes={"min": 1, "max": 2}))
    home.reach(job_id, 9)
    lose(cluster, home, job_id, "node2", "node")
    home.wait(job_id, "succeeded", seconds=300)
    places = [each["placement"]["nodes"] for each in attempts(home, job_id)]
    assert (places[0], places[-1]) == (["node1", "node2"], ["node1"]), "it did not wait for the other to come back"
    assert attempts(home, job_id)[0]["reason"] == "node_lost"
    whole, rows = home.metrics(untouched), home.metrics(job_id)
    assert [(row["step"], row["tokens"]) for row in rows] == [(row["step"], row["tokens"]) for row in whole]
    # The same samples in the same steps: only the order of the sums differs with the number of ranks.
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=home.tolerance)
