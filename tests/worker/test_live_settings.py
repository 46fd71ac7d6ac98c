"""Settings that are changed during a run change what is logged and kept, but not what is trained."""

import json
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.worker import rank_runner
from tests.worker.test_resume_start import spec
from trainyard.contract.events import SettingsChanged
from trainyard.contract.messages import RunSettings
from trainyard.contract.rundir import RunDir, write_json
from trainyard.worker.training.control import ControlFlags, LiveSettings, settings_changed_event, with_settings

FIRST = RunSettings(log_interval=5, save_interval=8, keep_last=3)
SECOND = RunSettings(log_interval=2, save_interval=3, keep_last=2)


def test_new_settings_are_returned_once_and_torn_equal_or_invalid_ones_never(tmp_path: Path) -> None:
    settings = LiveSettings(tmp_path / "settings.json", FIRST)
    assert settings.poll() is None
    write_json(settings.file, FIRST.model_dump())
    assert settings.poll() is None
    write_json(settings.file, SECOND.model_dump())
    assert settings.poll() == SECOND
    assert settings.poll() is None
    settings.file.write_text("{")
    assert settings.poll() is None
    write_json(settings.file, {**FIRST.model_dump(), "log_interval": 0})
    assert settings.poll() is None
    # A spec does not allow these values. They would end the run.
    for name, value in (("max_minutes", 1e8), ("target_loss", 1e4), ("keep_last", 100_001)):
        write_json(settings.file, {**FIRST.model_dump(), name: value})
        assert settings.poll() is None
    write_json(settings.file, FIRST.model_dump())
    assert settings.poll() == FIRST


def test_settings_are_set_in_a_spec_and_the_event_names_the_change() -> None:
    assert RunSettings.of(with_settings(spec(), SECOND).model_dump()) == SECOND
    assert with_settings(spec(), RunSettings.of(spec().model_dump())) == spec()
    assert settings_changed_event(4, FIRST, FIRST.model_copy(update={"save_interval": 1000})).message == (
        "save_interval is 1,000 and was 8"
    )


def test_flags_are_the_same_after_a_conversion_to_integers() -> None:
    for flags in (
        ControlFlags(),
        ControlFlags(stop=True),
        ControlFlags(save=True, settings=SECOND),
        ControlFlags(spike=True),
        ControlFlags(log=True),
        ControlFlags(settings=SECOND.model_copy(update={"log_interval": None})),
    ):
        assert ControlFlags.from_ints(flags.to_ints()) == flags
    largest = RunSettings(log_interval=2**53 - 1, save_interval=1, keep_last=1)
    assert ControlFlags.from_ints(ControlFlags(settings=largest).to_ints()).settings == largest


def change_settings_after(run: RunDir, step: int) -> None:
    """Write other settings right after ``step``."""
    from trainyard.worker.attempt import StepHeartbeat

    beat = StepHeartbeat.beat

    def request_at(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        if done == step and self._descriptor is not None:
            write_json(run.attempt(1).settings, SECOND.model_dump())

    mock.patch.object(StepHeartbeat, "beat", request_at).start()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_changed_settings_do_not_change_the_weights(world: int, tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    described = rank_runner.spec(text, training={"max_steps": 16})
    untouched, touched = (rank_runner.new_run(tmp_path / kind, described) for kind in ("untouched", "touched"))
    rank_runner.run_to_end(untouched, world)
    rank_runner.run_to_end(touched, world, partial(change_settings_after, touched, 5))
    # All ranks apply the change at the same step: one rank alone at once, several ranks a step later.
    applied = 5 + (world > 1)
    changes = [event for event in rank_runner.events(touched) if isinstance(event, SettingsChanged)]
    assert [(event.step, event.log_interval, event.save_interval) for event in changes] == [(applied, 2, 3)]
    assert sorted(rank_runner.metrics(touched)) == [5, *range(applied + 1 + (applied + 1) % 2, 17, 2)]
    # The new settings decide whether this step is logged and saved.
    saves = [step for step in (6, 9, 12, 15, 16) if step >= applied]
    assert rank_runner.saves(touched) == saves
    kept = sorted(path.name for path in touched.artifacts(None).checkpoints.iterdir())
    assert kept == ["step-00000015", "step-00000016"]
    final = {name: data for name, data in rank_runner.outputs(untouched) if "16" in name or name.startswith("out/")}
    assert final == {name: data for name, data in rank_runner.outputs(touched) if name in final}
    assert len(final) == 3
    tokens = {step: line.tokens for step, line in rank_runner.metrics(touched).items()}
    assert tokens[16] == rank_runner.metrics(untouched)[16].tokens


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_changed_settings_and_every_point_is_right(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    described = rank_runner.spec(text, training={"max_steps": 12})
    untouched, run = (rank_runner.new_run(tmp_path / kind, described) for kind in ("untouched", "run"))
    rank_runner.run_to_end(untouched)
    rank_runner.run_to_end(run, 1, partial(both, run))
    run.spec.write_text(json.dumps({**described, "reporting": {"log_interval": 2}}))
    rank_runner.run_to_end(run)
    assert sorted(rank_runner.curve(run)) == [5, 6, 8, 10, 12]
    # The sums since the last point are kept: the mean of steps 6 to 10 is that of the uninterrupted run.
    ours, theirs = rank_runner.metrics(run), rank_runner.metrics(untouched)
    parts = {**ours, **rank_runner.metrics(run, 2)}
    weights = {step: parts[step].tokens - parts[before].tokens for before, step in ((5, 6), (6, 8), (8, 10))}
    mean = sum(weights[step] * float(parts[step].loss or 0) for step in weights) / sum(weights.values())
    assert mean == pytest.approx(theirs[10].loss, rel=1e-6)
    final = {name: data for name, data in rank_runner.outputs(untouched) if "00012" in name}
    assert final == {name: data for name, data in rank_runner.outputs(run) if name in final}


def both(run: RunDir) -> None:
    from tests.worker.test_resume import stop_after

    change_settings_after(run, 5)
    stop_after(run, 1, 7)
