"""What the first node's agent knows of the others, by the words that they leave."""

import time
from pathlib import Path

import pytest

from trainyard.contract.rundir import AttemptDir, RunDir, write_json
from trainyard.worker.agent import follower
from trainyard.worker.agent.follower import (
    LOOK_SECONDS,
    PARTING_SECONDS,
    NodeEnd,
    OtherNodes,
)
from trainyard.worker.agent.rendezvous import ALONE, Place


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    made = RunDir(tmp_path).attempt(1)
    made.path.mkdir()
    return made


def test_whoever_is_alone_waits_for_nobody(attempt: AttemptDir) -> None:
    others = OtherNodes(attempt, ALONE)
    others.look(0.0)
    others.wait()
    assert (others.missing(), others.deserted(1e9), others.ended) == ([], False, {})


def test_words_are_read_as_they_come(attempt: AttemptDir) -> None:
    others = OtherNodes(attempt, Place(0, 3))
    others.look(0.0)
    assert others.missing() == [1, 2]
    write_json(attempt.node(2), {"name": "node3", "status": -9, "message": None})
    others.look(LOOK_SECONDS / 2)
    assert others.missing() == [1, 2], "not looked at all the time"
    others.look(LOOK_SECONDS)
    assert others.missing() == [1]
    assert others.ended == {2: NodeEnd(2, "node3", -9)}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"bye"', "\x00\x00"])
def test_what_cannot_be_read_is_no_word(attempt: AttemptDir, text: str) -> None:
    attempt.node(1).write_text(text)
    others = OtherNodes(attempt, Place(0, 2))
    others.look(0.0)
    assert others.missing() == [1]
    write_json(attempt.node(1), {"status": 0})
    others.look(LOOK_SECONDS)
    assert others.ended == {1: NodeEnd(1, "1", 0)}


def test_a_word_of_tomorrow_is_read_as_far_as_it_is_known(attempt: AttemptDir) -> None:
    write_json(attempt.node(1), {"name": 7, "status": "ended", "message": ["no"], "mood": "good"})
    others = OtherNodes(attempt, Place(0, 2))
    others.look(0.0)
    assert others.ended == {1: NodeEnd(1, "7", None, "['no']")}


def test_a_directory_that_is_away_for_a_while_ends_nothing(attempt: AttemptDir) -> None:
    attempt.node(1).mkdir()
    others = OtherNodes(attempt, Place(0, 2))
    others.look(0.0)
    assert others.missing() == [1]


def test_ours_are_deserted_a_while_after_the_first_of_the_others_ended(attempt: AttemptDir) -> None:
    others = OtherNodes(attempt, Place(0, 3))
    assert not others.deserted(1e9)
    write_json(attempt.node(1), {"status": 1})
    others.look(100.0)
    write_json(attempt.node(2), {"status": 1})
    others.look(105.0)
    assert not others.deserted(100.0 + PARTING_SECONDS)
    assert others.deserted(100.1 + PARTING_SECONDS)


def test_a_node_that_says_nothing_is_lost_after_a_while(attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "WORD_SECONDS", 0.2)
    write_json(attempt.node(1), {"status": 0})
    others = OtherNodes(attempt, Place(0, 3))
    began = time.monotonic()
    others.wait()
    assert 0.2 <= time.monotonic() - began < 5
    assert others.missing() == [2]
