"""The files of an attempt: its heartbeat and its outcome."""

from pathlib import Path

from trainyard.contract.messages import Outcome
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import DataSpec, JobSpec, TrainingSpec
from trainyard.contract.status import Reason
from trainyard.worker.attempt import AttemptContext, StepHeartbeat, spec_changes, write_outcome_once


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


def test_a_changed_spec_is_named_field_by_field(tmp_path: Path) -> None:
    run, data = RunDir(tmp_path), DataSpec(data_path="/x")
    first = JobSpec(data=data)
    for number, spec in ((1, first), (2, JobSpec(data=data, training=TrainingSpec(learning_rate=0.1)))):
        run.attempt(number).path.mkdir()
        run.attempt(number).spec.write_text(spec.model_dump_json())
    assert spec_changes(AttemptContext(run, run.attempt(1), ()), first) == []
    changes = spec_changes(
        AttemptContext(run, run.attempt(2), ()), JobSpec(data=data, training=TrainingSpec(learning_rate=0.1))
    )
    assert changes == [f"training.learning_rate is 0.1 and was {first.training.learning_rate}"]
    run.attempt(1).spec.write_text("{")
    assert spec_changes(AttemptContext(run, run.attempt(2), ()), first) == []
