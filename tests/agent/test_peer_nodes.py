"""What the first node's agent knows of the peers, by the words that they leave."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from trainyard.contract.rundir import AttemptDir, RunDir, write_json
from trainyard.worker.agent import follower
from trainyard.worker.agent.follower import (
    EXIT_RECORD_SECONDS,
    PEER_EXIT_GRACE_SECONDS,
    POLL_SECONDS,
    NodeExit,
    PeerNodes,
)
from trainyard.worker.agent.rendezvous import SINGLE_NODE, NodeInfo


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    made = RunDir(tmp_path).attempt(1)
    made.path.mkdir()
    return made


def test_a_single_node_waits_for_no_other(attempt: AttemptDir) -> None:
    peers = PeerNodes(attempt, SINGLE_NODE)
    peers.poll(0.0)
    peers.wait_for_exits()
    assert (peers.missing(), peers.lost(1e9), peers.exits) == ([], False, {})


def test_exit_records_are_read_as_they_come(attempt: AttemptDir) -> None:
    peers = PeerNodes(attempt, NodeInfo(0, 3))
    peers.poll(0.0)
    assert peers.missing() == [1, 2]
    write_json(attempt.node(2), {"name": "node3", "status": -9, "message": None})
    peers.poll(POLL_SECONDS / 2)
    assert peers.missing() == [1, 2], "not looked at all the time"
    peers.poll(POLL_SECONDS)
    assert peers.missing() == [1]
    assert peers.exits == {2: NodeExit(2, "node3", -9)}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"bye"', "\x00\x00"])
def test_what_cannot_be_read_is_no_exit_record(attempt: AttemptDir, text: str) -> None:
    attempt.node(1).write_text(text)
    peers = PeerNodes(attempt, NodeInfo(0, 2))
    peers.poll(0.0)
    assert peers.missing() == [1]
    write_json(attempt.node(1), {"status": 0})
    peers.poll(POLL_SECONDS)
    assert peers.exits == {1: NodeExit(1, "1", 0)}


def test_an_exit_record_of_a_later_release_is_read(attempt: AttemptDir) -> None:
    write_json(attempt.node(1), {"name": 7, "status": "ended", "message": ["no"], "mood": "good"})
    peers = PeerNodes(attempt, NodeInfo(0, 2))
    peers.poll(0.0)
    assert peers.exits == {1: NodeExit(1, "7", None, "['no']")}


def test_a_directory_that_is_away_for_a_while_ends_nothing(attempt: AttemptDir) -> None:
    attempt.node(1).mkdir()
    peers = PeerNodes(attempt, NodeInfo(0, 2))
    peers.poll(0.0)
    assert peers.missing() == [1]


def test_ours_are_deserted_a_while_after_the_first_of_the_peers_ended(attempt: AttemptDir) -> None:
    peers = PeerNodes(attempt, NodeInfo(0, 3))
    assert not peers.lost(1e9)
    write_json(attempt.node(1), {"status": 1})
    peers.poll(100.0)
    write_json(attempt.node(2), {"status": 1})
    peers.poll(105.0)
    assert not peers.lost(100.0 + PEER_EXIT_GRACE_SECONDS)
    assert peers.lost(100.1 + PEER_EXIT_GRACE_SECONDS)


def test_a_node_that_says_nothing_is_lost_after_a_while(attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(follower, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    write_json(attempt.node(1), {"status": 0})
    peers = PeerNodes(attempt, NodeInfo(0, 3))
    peers.wait_for_exits()
    assert EXIT_RECORD_SECONDS <= clock[0] - 1000.0 < EXIT_RECORD_SECONDS + 1.0
    assert peers.missing() == [2]
