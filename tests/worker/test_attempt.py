"""The files of an attempt: its heartbeat and its outcome."""

from pathlib import Path

from trainyard.contract.messages import Outcome
from trainyard.contract.status import Reason
from trainyard.worker.attempt import StepHeartbeat, write_outcome_once


def test_the_heartbeat_is_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    heartbeat = StepHeartbeat(path)
    for step in (99999, 7):
        heartbeat.beat(step)
        assert int(path.read_text()) == heartbeat.step == step
    StepHeartbeat(None).beat(3)


def test_the_first_outcome_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    failed = Outcome(outcome="failed", step=3, reason=Reason.OUT_OF_MEMORY)
    assert write_outcome_once(path, failed) == failed
    assert write_outcome_once(path, Outcome(outcome="completed", step=9)) == failed
    assert Outcome.model_validate_json(path.read_bytes()) == failed
    assert [file.name for file in tmp_path.iterdir()] == ["outcome.json"]
