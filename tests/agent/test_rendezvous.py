"""Node info, and the rendezvous endpoint of the ranks of all nodes."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.worker import rank_runner
from trainyard.contract.messages import ExitReport, read_message
from trainyard.contract.rundir import AttemptDir, RunDir, read_json, write_json
from trainyard.contract.spec import JobSpec
from trainyard.worker.agent import rendezvous
from trainyard.worker.agent.follower import PeerNodes
from trainyard.worker.agent.rendezvous import (
    PORTS,
    SINGLE_NODE,
    NodeInfo,
    RendezvousEndpoint,
    RendezvousTimeout,
    address_towards,
    can_reach,
    interface_of,
    is_loopback,
    publish_endpoint,
    wait_for_endpoint,
)
from trainyard.worker.agent.torchrun import rank_environment, torchrun_command


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    made = RunDir(tmp_path).attempt(1)
    made.path.mkdir()
    return made


def test_a_cluster_says_which_node_it_is() -> None:
    assert NodeInfo.of({}) == SINGLE_NODE
    found = NodeInfo.of({"TRAINYARD_NODE": "1", "TRAINYARD_NODES": "2", "TRAINYARD_FIRST_NODE": "10.0.0.1"})
    assert found == NodeInfo(1, 2, "10.0.0.1", clustered=True)
    assert not found.is_leader
    assert NodeInfo.of({"TRAINYARD_NODE": "0", "TRAINYARD_NODES": "2", "TRAINYARD_FIRST_NODE": ""}).leader_host is None
    with pytest.raises(ValueError, match="invalid literal"):
        NodeInfo.of({"TRAINYARD_NODE": "", "TRAINYARD_NODES": "2"})


def test_one_node_needs_no_endpoint(attempt: AttemptDir) -> None:
    assert publish_endpoint(attempt, NodeInfo(0, 1, "10.0.0.1", clustered=True)) is None
    assert not attempt.rendezvous.exists()


def test_the_first_node_publishes_its_endpoint(attempt: AttemptDir) -> None:
    endpoint = publish_endpoint(attempt, NodeInfo(0, 2, "10.0.0.1", clustered=True))
    assert endpoint is not None
    assert (endpoint.host, endpoint.port in PORTS) == ("10.0.0.1", True)
    assert read_json(attempt.rendezvous) == {"host": "10.0.0.1", "port": endpoint.port}
    assert [attempt.node(node).exists() for node in range(3)] == [False, True, False], "an empty exit record"
    peers = PeerNodes(attempt, NodeInfo(0, 2))
    peers.poll(0.0)
    assert peers.missing() == [1], "which is none yet"
    assert wait_for_endpoint(attempt, NodeInfo(1, 2), 0.0) == endpoint


def test_no_port_is_one_that_the_kernel_gives_away_itself() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(PORTS) < lowest


def own_server() -> socket.socket:
    """Listen on a port that the kernel gives to no other process, also once it is closed."""
    for port in random.sample(PORTS, 100):
        with contextlib.suppress(OSError):
            return socket.create_server(("", port))
    raise AssertionError("a hundred ports are in use")


def test_a_port_that_is_taken_is_passed_over(attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_server() as taken, own_server() as free:
        ports = [taken.getsockname()[1], free.getsockname()[1]]
        free.close()
        monkeypatch.setattr(rendezvous.random, "sample", lambda *_: ports)  # type: ignore[attr-defined]
        endpoint = publish_endpoint(attempt, NodeInfo(0, 2, "10.0.0.1"))
        assert endpoint is not None
        assert endpoint.port == ports[1]
        monkeypatch.setattr(rendezvous.random, "sample", lambda *_: ports[:1])  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="free"):
            publish_endpoint(attempt, NodeInfo(0, 2, "10.0.0.1"))


@pytest.mark.parametrize("own", ["127.0.0.1", "127.0.1.1", "::1", None])
def test_an_address_that_is_good_on_one_node_only_is_not_told_to_peers(
    attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.setattr(rendezvous, "address_towards", lambda _: "10.9.9.9")
    endpoint = publish_endpoint(attempt, NodeInfo(0, 2, own))
    assert endpoint is not None
    assert endpoint.host == "10.9.9.9"
    assert wait_for_endpoint(attempt, NodeInfo(1, 2, "10.0.0.1"), 0.0).host == "10.0.0.1", (
        "by which the first one is reached"
    )
    assert wait_for_endpoint(attempt, NodeInfo(1, 2, own), 0.0).host == "10.9.9.9"


def test_without_a_way_out_all_nodes_are_on_this_host(attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_host: str) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(rendezvous, "address_towards", unreachable)
    endpoint = publish_endpoint(attempt, NodeInfo(0, 2, "127.0.0.1"))
    assert endpoint is not None
    assert endpoint.host == "127.0.0.1"


def test_loopback_is_told_from_what_is_not() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "10.0.0.1", "node1", "")] == [
        *(True, True, True),
        *(False, False, False),
    ]


def test_the_endpoint_is_waited_for(attempt: AttemptDir) -> None:
    said = threading.Timer(0.15, write_json, (attempt.rendezvous, {"host": "n1", "port": 5}))
    said.start()
    assert wait_for_endpoint(attempt, NodeInfo(1, 2), 120.0) == RendezvousEndpoint("n1", 5)
    said.join()


def test_a_node_that_is_late_or_waits_too_long_gets_no_endpoint(attempt: AttemptDir) -> None:
    with pytest.raises(RendezvousTimeout, match="within 0 s"):
        wait_for_endpoint(attempt, NodeInfo(1, 2), 0.0)
    attempt.exit.touch()
    with pytest.raises(RendezvousTimeout, match="had ended"):
        wait_for_endpoint(attempt, NodeInfo(1, 2), 5.0)


def test_a_node_without_the_home_is_noticed(attempt: AttemptDir, tmp_path: Path) -> None:
    assert not can_reach(RunDir(tmp_path / "nowhere").attempt(1), 0.0)
    assert not can_reach(attempt, 0.0), "a directory of that name, and nothing in it"
    made = threading.Timer(0.15, attempt.spec.touch)
    made.start()
    began = time.monotonic()
    assert can_reach(attempt, 120.0)
    assert time.monotonic() - began < 60, "it does not wait for as long as it may"
    made.join()


def test_torchrun_gets_the_endpoint_and_the_local_address(attempt: AttemptDir) -> None:
    node, endpoint = NodeInfo(1, 3, "127.0.0.1", clustered=True), RendezvousEndpoint("127.0.0.1", 29999)
    command = torchrun_command(RunDir(attempt.path.parent), attempt, {"nproc_per_node": 4}, node, endpoint)
    assert {
        "trainyard.worker",
        "--nnodes=3",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:29999",
        f"--rdzv-id={attempt.path.parent.name}-1",
        "--rdzv-conf=is_host=0",
        "--local-addr=127.0.0.1",
        f"--log-dir={attempt.torchrun_logs}/node-1",
    } < set(command)


def test_a_single_node_never_needs_its_own_name(attempt: AttemptDir) -> None:
    command = torchrun_command(RunDir(attempt.path.parent), attempt, {"nproc_per_node": 4})
    assert {"--nnodes=1", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=is_host=1", "--local-addr=127.0.0.1"} < set(
        command
    )
    assert "--standalone" not in command, "which makes the ranks meet at the host's full name"


NAMELESS = """
hostname laptop.office.invalid
mount --bind hosts /etc/hosts
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.long
def test_ranks_meet_on_a_host_whose_name_resolves_to_nothing(tmp_path: Path) -> None:
    """The real agent with two real ranks."""
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs unshare, and the right to use it")
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    described = rank_runner.spec(text, training={"max_steps": 2}, resources={"nproc_per_node": 2})
    attempt = RunDir(tmp_path / "run").attempt(1)
    attempt.path.mkdir(parents=True)
    attempt.spec.write_text(JobSpec.model_validate_json(json.dumps(described)).model_dump_json())
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    agent = [sys.executable, "-m", "trainyard.worker.agent", str(attempt.path.parent), "--attempt=1"]
    subprocess.run(
        ["unshare", "--uts", "--mount", "/bin/sh", "-ec", NAMELESS, "sh", *agent],
        cwd=tmp_path,
        timeout=rank_runner.DEADLINE,
        check=True,
    )
    report = read_message(ExitReport, attempt.exit)
    assert report is not None
    assert (report.outcome, report.step) == ("completed", 2), report.message


def test_gloo_takes_the_interface_on_the_way_to_the_first_node() -> None:
    endpoint = RendezvousEndpoint("127.0.0.1", 1)
    assert rank_environment({}, endpoint)["GLOO_SOCKET_IFNAME"] == "lo"
    assert rank_environment({"GLOO_SOCKET_IFNAME": "ib0"}, endpoint)["GLOO_SOCKET_IFNAME"] == "ib0"
    assert rank_environment({})["GLOO_SOCKET_IFNAME"] == "lo", "on a single node"


def test_interfaces_are_found_by_their_addresses() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("198.51.100.77") is None
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_a_node_has_the_name_that_its_cluster_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert rendezvous.node_name() == "node7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert rendezvous.node_name() == os.uname().nodename
