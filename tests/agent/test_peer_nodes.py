"""What the first node's agent knows of the others, by the words that they leave."""

import time
from pathlib import Path

import pytest

from trainyard.contract.rundir import AttemptDir, RunDir, write_json
from trainyard.worker.agent import follower
from trainyard.worker.agent.follower import (
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


def test_whoever_is_alone_waits_for_nobody(attempt: AttemptDir) -> None:
    others = PeerNodes(attempt, SINGLE_NODE)
    others.poll(0.0)
    others.wait_for_exits()
    assert (others.missing(), others.lost(1e9), others.ended) == ([], False, {})


def test_words_are_read_as_they_come(attempt: AttemptDir) -> None:
    others = PeerNodes(attempt, NodeInfo(0, 3))
    others.poll(0.0)
    assert others.missing() == [1, 2]
    write_json(attempt.node(2), {"name": "node3", "status": -9, "message": None})
    others.poll(POLL_SECONDS / 2)
    assert others.missing() == [1, 2], "not looked at all the time"
    others.poll(POLL_SECONDS)
    assert others.missing() == [1]
    assert others.ended == {2: NodeExit(2, "node3", -9)}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"bye"', "\x00\x00"])
def test_what_cannot_be_read_is_no_word(attempt: AttemptDir, text: str) -> None:
    attempt.node(1).write_text(text)
    others = PeerNodes(attempt, NodeInfo(0, 2))
    others.poll(0.0)
    assert others.missing() == [1]
    write_json(attempt.node(1), {"status": 0})
    others.poll(POLL_SECONDS)
    assert others.ended == {1: NodeExit(1, "1", 0)}


def test_a_word_of_tomorrow_is_read_as_far_as_it_is_known(attempt: AttemptDir) -> None:
    write_json(attempt.node(1), {"name": 7, "status": "ended", "message": ["no"], "mood": "good"})
    others = PeerNodes(attempt, NodeInfo(0, 2))
    others.poll(0.0)
    assert others.ended == {1: NodeExit(1, "7", None, "['no']")}


def test_a_directory_that_is_away_for_a_while_ends_nothing(attempt: AttemptDir) -> None:
    attempt.node(1).mkdir()
    others = PeerNodes(attempt, NodeInfo(0, 2))
    others.poll(0.0)
    assert others.missing() == [1]


def test_ours_are_deserted_a_while_after_the_first_of_the_others_ended(attempt: AttemptDir) -> None:
    others = PeerNodes(attempt, NodeInfo(0, 3))
    assert not others.lost(1e9)
    write_json(attempt.node(1), {"status": 1})
    others.poll(100.0)
    write_json(attempt.node(2), {"status": 1})
    others.poll(105.0)
    assert not others.lost(100.0 + PEER_EXIT_GRACE_SECONDS)
    assert others.lost(100.1 + PEER_EXIT_GRACE_SECONDS)


def test_a_node_that_says_nothing_is_lost_after_a_while(attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "EXIT_RECORD_SECONDS", 0.2)
    write_json(attempt.node(1), {"status": 0})
    others = PeerNodes(attempt, NodeInfo(0, 3))
    began = time.monotonic()
    others.wait_for_exits()
    assert 0.2 <= time.monotonic() - began < 5
    assert others.missing() == [2]
