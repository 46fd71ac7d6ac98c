"""One rank, by hand: what a run says, writes and leaves, and how it ends when something is wrong."""

import errno
import json
import math
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.worker import rank_runner
from tests.worker.test_resume import stop_after
from trainyard.contract.events import (
    CheckpointRemoved,
    CheckpointSaved,
    Finished,
    MetricEvent,
    PhaseChanged,
    SampleEvent,
    Started,
    WarningEvent,
)
from trainyard.contract.failpoints import arm
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.messages import Outcome
from trainyard.contract.rundir import OPTIMIZER_FILE, FileDigest, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.model.costs import flops_per_token

pytestmark = pytest.mark.slow


def spec_of(run: RunDir) -> JobSpec:
    return JobSpec.model_validate_json(run.attempt(1).spec.read_bytes())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_runner.corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with everything in it: held-out data, samples, missing trackers, retention, warm-up."""
    described = rank_runner.spec(
        text,
        data={"eval_fraction": 0.2},
        training={"warmup_steps": 3},
        checkpoint={"save_interval": 5, "keep_last": 1, "keep_every": 10},
        reporting={"log_interval": 4, "sample_prompts": ["the cat", ""], "tensorboard": True, "use_wandb": True},
        resources={"device": "auto"},
    )
    run = rank_runner.new_run(tmp_path_factory.mktemp("runs") / "finished", described)
    outcome = rank_runner.run_to_end(run, patch=without_trackers)
    assert outcome == Outcome(outcome="completed", step=24, message="all 24 steps done")
    return run


def without_trackers() -> None:
    """As where neither is installed."""
    sys.modules.update({"tensorboard": None, "wandb": None, "swanlab": None})  # type: ignore[dict-item]


def test_the_attempt_tells_what_it_is(finished: RunDir, text: Path) -> None:
    started = next(event for event in rank_runner.events(finished) if isinstance(event, Started))
    weights = torch.load(finished.artifacts(None).out / "pretrain_32.pth", weights_only=True)
    unique = {value.data_ptr(): value.numel() for value in weights.values()}
    assert started.parameters == started.active_parameters == sum(unique.values())
    assert (started.start_step, started.steps, started.world_size, started.vocab_size) == (0, 24, 1, 259)
    assert (started.documents, started.bad_lines, started.global_batch) == (60, 0, 8)
    assert started.tokens == sum(len(json.loads(line)["text"]) + 2 for line in text.read_text().splitlines())
    assert started.steps_per_epoch == math.ceil(started.samples / 8)
    assert started.flops_per_token > 6 * (started.parameters - 259 * 32)
    assert started.flops_per_token < flops_per_token(spec_of(finished).model.with_vocab_size(259), 32), (
        "documents are shorter than rows"
    )
    assert started.resumed_from is None
    lines = text.read_text().splitlines()
    assert started.duplicates == len(lines) - len(set(lines))
    assert (started.bos_token, started.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert started.inputs == {"data_path": FileFingerprint.of(text)}


def test_by_hand_the_resolved_spec_is_kept(finished: RunDir) -> None:
    kept = spec_of(finished)
    assert kept.checkpoint.keep_every == 10
    assert kept.model.intermediate_size == 128
    assert finished.current.read_text() == "1"


def test_metric_lines_are_due_when_they_should_be_and_true(finished: RunDir) -> None:
    lines = rank_runner.metrics(finished)
    assert sorted(lines) == [4, 5, 8, 10, 12, 15, 16, 20, 24]
    for step, line in lines.items():
        done = (step - 3) / 21
        assert line.learning_rate == pytest.approx(5e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * done))), abs=1e-12)
        assert (line.eval_loss is not None) == (step in (5, 10, 15, 20, 24))
        assert line.mfu is None
        assert line.memory_bytes is not None
        assert line.memory_bytes > 50e6
        assert line.tokens_per_second is not None
        assert line.step_seconds is not None
        assert line.data_seconds is not None
        assert 0 < line.data_seconds < line.step_seconds
        assert not line.nonfinite
    assert [line.tokens for line in lines.values()] == sorted(line.tokens for line in lines.values())
    first, last = lines[4], lines[24]
    assert first.loss is not None
    assert last.loss is not None
    assert last.eval_loss is not None
    assert last.loss < 0.7 * first.loss
    assert last.eval_loss == pytest.approx(last.loss, abs=0.5)


def test_events_come_in_order(finished: RunDir) -> None:
    found = rank_runner.events(finished)
    phases = [event.phase for event in found if isinstance(event, PhaseChanged)]
    # A phase that takes long is reported again with its progress.
    assert [phase for phase, _ in groupby(phases)][:4] == ["loading", "preparing_data", "loading", "training"]
    assert {"evaluating", "saving"} <= set(phases)
    assert isinstance(found[-1], Finished)
    assert (found[-1].outcome, found[-1].step) == ("completed", 24)
    saved = [event for event in found if isinstance(event, CheckpointSaved)]
    full = [event.step for event in saved if event.checkpoint_kind == "full"]
    assert full == [5, 10, 15, 20, 24]
    removed = [(event.step, event.why) for event in found if isinstance(event, CheckpointRemoved)]
    assert removed == [(5, "retention"), (10, "only its weights are kept"), (15, "retention")]
    assert [step for step, _ in finished.artifacts(None).published()] == [24, 20]
    assert [step for step, _ in finished.artifacts(None).milestones()] == [10]
    losses = {step: line.loss for step, line in rank_runner.metrics(finished).items()}
    assert saved[0].loss == losses[5]
    assert finished.attempt(1).progress.read_text().split()[0] == "24"


def test_samples_are_written_at_saves(finished: RunDir) -> None:
    samples = [event for event in rank_runner.events(finished) if isinstance(event, SampleEvent)]
    assert [(sample.step, sample.prompt) for sample in samples[:3]] == [(5, "the cat"), (5, ""), (10, "the cat")]
    assert all(len(sample.text.encode()) <= 200 for sample in samples)
    assert any(sample.text for sample in samples)


def test_what_is_missing_or_unasked_is_a_warning(finished: RunDir) -> None:
    warned = rank_runner.warned(finished)
    assert set(warned) == {"cpu_fallback", "tensorboard_missing", "wandb_missing"}
    assert "pip install tensorboard" in warned["tensorboard_missing"].message
    assert "pip install wandb" in warned["wandb_missing"].message


def test_the_weights_are_minimind_s(finished: RunDir) -> None:
    weights = torch.load(finished.artifacts(None).out / "pretrain_32.pth", weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_norm.weight"} <= set(weights)
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()


def test_a_person_can_read_the_terminal(finished: RunDir) -> None:
    printed = (finished.path / "printed-1-0").read_text().splitlines()
    assert any(line.startswith("step 24/24  loss ") and "tok/s" in line and "ETA 0 s" in line for line in printed)
    assert all(len(line) < 300 for line in printed)


def test_the_loss_of_an_untrained_model_is_that_of_guessing(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, training={"learning_rate": 1e-12, "max_steps": 2}, reporting={"log_interval": 1})
    described["model"] = {"hidden_size": 128, "num_hidden_layers": 2}
    run = rank_runner.new_run(tmp_path / "run", described)
    rank_runner.run_to_end(run)
    for line in rank_runner.metrics(run).values():
        assert line.loss == pytest.approx(math.log(259), rel=0.02)


def fail_save(run: RunDir, fail_at: int, code: int) -> None:
    """Make each save of one step fail half way."""
    from trainyard.worker.checkpoint import files as checkpoint

    write, write_checkpoint = checkpoint.write_tensors, checkpoint.write_checkpoint
    steps: list[int] = []

    def full(path: Path, tensors: Any) -> FileDigest:
        written = write(path, tensors)
        if steps[-1] == fail_at and path.name == OPTIMIZER_FILE:
            raise OSError(code, "No space left on device", str(path))
        return written

    def note_step(artifacts: Any, state: Any, *tensors: Any) -> Any:
        steps.append(state.step)
        return write_checkpoint(artifacts, state, *tensors)

    mock.patch.object(checkpoint, "write_tensors", full).start()
    mock.patch.object(checkpoint, "write_checkpoint", note_step).start()


def test_a_failed_save_is_a_warning_and_the_next_one_works(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    assert rank_runner.run_to_end(run, patch=partial(fail_save, run, 16, errno.ENOSPC)).outcome == "completed"
    warning = rank_runner.warned(run)["save_failed"]
    assert warning.step == 16
    assert "No space left on device" in warning.message
    assert rank_runner.saves(run) == [8, 24]
    assert sorted(path.name for path in run.artifacts(None).checkpoints.iterdir()) == ["step-00000008", "step-00000024"]


def test_a_last_save_that_fails_is_no_success(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    failed = rank_runner.run_to_end(run, patch=partial(fail_save, run, 24, errno.EDQUOT))
    assert (failed.outcome, failed.reason, failed.step) == ("failed", "disk_full", 24)
    assert "checkpoint of step 24" in str(failed.message)
    assert rank_runner.saves(run) == [8, 16]
    assert rank_runner.run_to_end(run).outcome == "completed"
    assert rank_runner.saves(run, 2) == [24]


def poison(*steps: int) -> None:
    """Make the gradient of these data steps not finite."""
    from trainyard.worker.data.loader import MicroBatchLoader

    micros = MicroBatchLoader.microbatches

    def poisoned(self: MicroBatchLoader, step: int) -> Any:
        for micro in micros(self, step):
            yield micro if step not in steps else type(micro)(micro.batch, math.nan, micro.rows, micro.tokens)

    mock.patch.object(MicroBatchLoader, "microbatches", poisoned).start()


def poison_unread(*steps: int) -> None:
    """The same, with steps that are read when something is due, as on CUDA."""
    from trainyard.worker.training.state import TrainState

    mock.patch.object(TrainState, "defers_metrics", return_value=True).start()
    poison(*steps)


@pytest.mark.parametrize("poisoned", [poison, poison_unread])
def test_fail_applies_nothing_and_names_step_and_rows(poisoned: Any, text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    failed = rank_runner.run_to_end(run, patch=partial(poisoned, 11))
    assert (failed.outcome, failed.reason, failed.step) == ("failed", "diverged", 10)
    assert "not finite at step 11, over rows " in str(failed.message)
    assert failed.error is not None
    assert "learning_rate" in str(failed.error.hint)
    assert [step for step, _ in run.artifacts(None).published()] == [8]
    assert isinstance(rank_runner.events(run)[-1], Finished)
    resumed = rank_runner.run_to_end(run)
    assert resumed.outcome == "completed"


def test_skip_leaves_the_update_out(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"on_nonfinite": "skip"}))
    assert rank_runner.run_to_end(run, patch=partial(poison, 10, 11)).outcome == "completed"
    skipped = [e.step for e in rank_runner.events(run) if isinstance(e, WarningEvent) and e.code == "step_skipped"]
    assert skipped == [10, 11]
    assert rank_runner.metrics(run)[10].nonfinite
    assert rank_runner.metrics(run)[10].grad_norm is None
    assert not rank_runner.metrics(run)[20].nonfinite


@pytest.mark.parametrize("poisoned", [poison, poison_unread])
def test_skip_gives_up_in_the_end(poisoned: Any, text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"on_nonfinite": "skip"}))
    failed = rank_runner.run_to_end(run, patch=partial(poisoned, *range(9, 25)))
    assert (failed.reason, failed.step) == ("diverged", 18)
    assert "(11 steps skipped, 0 rollbacks)" in str(failed.message)


def test_rollback_goes_back_and_around_the_bad_data(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, training={"on_nonfinite": "rollback"}, reporting={"log_interval": 1})
    run = rank_runner.new_run(tmp_path / "run", described)
    assert rank_runner.run_to_end(run, patch=partial(poison, 3, 11)).outcome == "completed"
    warnings = [event for event in rank_runner.events(run) if isinstance(event, WarningEvent)]
    rolled = [(event.step, event.data["to_step"]) for event in warnings if event.code == "rolled_back"]
    # Steps 3 and 8 fail: after the first one, step n takes the data of step n + 3.
    assert rolled == [(3, 0), (8, 0)]
    steps = [e.step for e in rank_runner.events(run) if isinstance(e, MetricEvent)]
    assert steps == [1, 2, 1, 2, 3, 4, 5, 6, 7, *range(1, 25)]
    state = json.loads((run.artifacts(None).checkpoint(24) / "state.json").read_bytes())
    assert (state["data_offset"], state["trouble"]["rollbacks"]) == (11, 2)


def request_a_save(file: Path, at: int) -> None:
    """Request a save while step ``at`` runs, whose gradient is not finite."""
    from trainyard.worker.training.step import TrainStep

    poison_unread(at)
    run, steps = TrainStep.run, iter(range(1, 1000))

    def requesting(self: TrainStep, *arguments: Any) -> Any:
        if next(steps) == at:
            file.touch()
        return run(self, *arguments)

    mock.patch.object(TrainStep, "run", requesting).start()


def test_a_save_request_outlives_a_rollback(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"on_nonfinite": "rollback"}))
    patch = partial(request_a_save, run.attempt(1).save, 11)
    assert rank_runner.run_to_end(run, patch=patch).outcome == "completed"
    assert "rolled_back" in rank_runner.warned(run)
    assert rank_runner.saves(run) == [0, 8, 9, 16, 24], "requested at step 11, which was rolled back to step 8"


def test_when_steps_are_read_does_not_show_in_what_becomes_of_them(text: Path, tmp_path: Path) -> None:
    ends = []
    for name, poisoned in (("at_once", poison), ("unread", poison_unread)):
        described = rank_runner.spec(text, training={"on_nonfinite": "rollback"}, reporting={"log_interval": 7})
        run = rank_runner.new_run(tmp_path / name, described)
        # Both bad steps lie between a line and a save; steps that were dispatched after them must not be applied.
        assert rank_runner.run_to_end(run, patch=partial(poisoned, 3, 19)).outcome == "completed"
        files = run.artifacts(None).checkpoint(24)
        rolled = [e.step for e in rank_runner.events(run) if isinstance(e, WarningEvent) and e.code == "rolled_back"]
        weights, state = ((files / file).read_bytes() for file in ("model.safetensors", "state.json"))
        ends.append((rolled, weights, json.loads(state)["trouble"], json.loads(state)["data_offset"]))
    assert len(ends[0][0]) == 2
    assert ends[0] == ends[1]


def test_rollback_gives_up_after_three(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"on_nonfinite": "rollback"}))
    failed = rank_runner.run_to_end(run, patch=partial(poison, *range(2, 100)))
    assert (failed.reason, failed.step) == ("diverged", 0)


def no_memory() -> None:
    """Fail as torch does on a CPU."""
    from trainyard.worker.training import step

    def forward(*_: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 99 bytes")

    mock.patch.object(step, "forward", forward).start()


def test_out_of_memory_says_what_to_change(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    failed = rank_runner.run_to_end(run, patch=no_memory)
    assert failed.reason == "out_of_memory"
    assert "with 4 rows in a micro-batch" in str(failed.message)
    assert failed.error is not None
    assert (failed.error.rank, failed.error.code) == (0, "out_of_memory")
    assert "batch_size to 2 and training.accumulation_steps to 4" in str(failed.error.hint)


def test_an_unforeseen_exception_is_a_crash_and_no_outcome(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    ranks = rank_runner.start(run, patch=bug)
    assert ranks.wait() == [1]
    assert not run.attempt(1).outcome.exists()
    assert not any(isinstance(event, Finished) for event in rank_runner.events(run))
    assert "ZeroDivisionError" in ranks.logs()


def bug() -> None:
    """An unforeseen error."""
    from trainyard.worker.training import step

    mock.patch.object(step, "forward", side_effect=ZeroDivisionError("unforeseen")).start()


@pytest.mark.parametrize(
    ("content", "reason", "says"),
    [
        ("", "data_invalid", "holds no document"),
        ('{"text": "a"}\n{"text": 3}\n', "data_invalid", "line 2"),
        (None, "data_invalid", "corpus.jsonl"),
    ],
)
def test_data_that_cannot_be_used(content: str | None, reason: str, says: str, tmp_path: Path) -> None:
    data = tmp_path / "corpus.jsonl"
    if content is not None:
        data.write_text(content)
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(data))
    failed = rank_runner.run_to_end(run)
    assert (failed.outcome, failed.reason, failed.step) == ("failed", reason, 0)
    assert says in str(failed.message)
    printed = (run.path / "printed-1-0").read_text()
    assert f"failed at step 0: {failed.message}" in printed
    assert "Traceback" not in printed


def test_by_hand_a_changed_learning_rate_is_not_taken_silently(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, training={"max_steps": 2, "learning_rate": 1e-3})
    run = rank_runner.new_run(tmp_path / "run", described)
    rank_runner.run_to_end(run)
    assert "spec_changed" not in rank_runner.warned(run)
    described["training"]["learning_rate"] = 2e-3
    run.spec.write_text(json.dumps(described))
    rank_runner.run_to_end(run)
    assert "training.learning_rate is 0.002 and was 0.001" in rank_runner.warned(run, 2)["spec_changed"].message
    printed = (run.path / "printed-2-0").read_text()
    assert "training.learning_rate is 0.002 and was 0.001" in printed
    assert "completed: all 2 steps done" in printed


def test_a_stop_before_the_first_step_has_nothing_to_save(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    stopped = rank_runner.run_to_end(run, patch=partial(stop_while_preparing, run))
    assert (stopped.outcome, stopped.step, stopped.reason) == ("stopped", 0, "user")
    assert run.artifacts(None).published() == []


def stop_while_preparing(run: RunDir) -> None:
    """Touch the stop file as soon as the data is being read."""
    from trainyard.worker.data import prepare, tokenizers

    load = tokenizers.load_tokenizer

    def stopping(*arguments: Any) -> Any:
        run.attempt(1).stop.touch()
        return load(*arguments)

    mock.patch.object(prepare, "load_tokenizer", stopping).start()


def test_wrong_usage_names_every_mistake(tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", {"data": {}, "training": {"epochz": 1, "learning_rate": -1}})
    ranks = rank_runner.start(run)
    assert ranks.wait() == [2]
    for part in ("/data/data_path", "/training/epochz", "/training/learning_rate"):
        assert part in ranks.logs()


def test_save_minutes_saves_in_between(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(
        tmp_path / "run", rank_runner.spec(text, training={"max_steps": 3}, checkpoint={"save_minutes": 1e-9})
    )
    rank_runner.run_to_end(run)
    assert rank_runner.saves(run) == [1, 2, 3]


def test_weights_of_one_run_start_another(finished: RunDir, text: Path, tmp_path: Path) -> None:
    def first_loss(start: str | None, **model: Any) -> float:
        training = {"from_weight": start, "max_steps": 1, "learning_rate": 1e-12}
        place = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        described = rank_runner.spec(text, training=training, checkpoint={"save_dir": str(finished.path / "out")})
        run = rank_runner.new_run(place, described)
        outcome = rank_runner.run_to_end(run)
        assert outcome.outcome == "completed", outcome
        loss = rank_runner.metrics(run)[1].loss
        assert loss is not None
        return loss

    fresh = first_loss(None)
    by_path = first_loss(str(finished.path / "out" / "pretrain_32.pth"))
    by_name = first_loss("pretrain")
    assert by_path == by_name < 0.7 * fresh


def test_weights_that_do_not_fit_are_refused_with_every_mismatch(finished: RunDir, text: Path, tmp_path: Path) -> None:
    start = str(finished.path / "out" / "pretrain_32.pth")
    described = rank_runner.spec(
        text, training={"from_weight": start}, model={"hidden_size": 48, "num_hidden_layers": 3}
    )
    failed = rank_runner.run_to_end(rank_runner.new_run(tmp_path / "run", described))
    assert failed.reason == "checkpoint_invalid"
    assert "model.embed_tokens.weight is [259, 32] and must be [259, 48]" in str(failed.message)
    missing = rank_runner.spec(text, training={"from_weight": "nowhere"})
    failed = rank_runner.run_to_end(rank_runner.new_run(tmp_path / "other", missing))
    assert failed.reason == "spec_invalid"
    assert "nowhere_32.pth" in str(failed.message)


@pytest.mark.long
def test_from_resume_goes_on_from_an_earlier_job(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, checkpoint={"save_dir": str(tmp_path / "out"), "from_resume": True})
    first = rank_runner.new_run(tmp_path / "first", described)
    stopped = rank_runner.run_to_end(first, patch=partial(stop_after, first, 1, 13))
    assert stopped.step == 13
    assert "nothing_to_resume" in rank_runner.warned(first)
    second = rank_runner.new_run(tmp_path / "second", described)
    assert rank_runner.run_to_end(second).step == 24
    started = next(event for event in rank_runner.events(second) if isinstance(event, Started))
    assert started.start_step == 13
    assert started.resumed_from == str(tmp_path / "out" / "first" / "checkpoints" / "step-00000013")
    third = rank_runner.new_run(tmp_path / "third", {**described, "training": {**described["training"], "seed": 1}})
    rank_runner.run_to_end(third)
    message = rank_runner.warned(third)["nothing_to_resume"].message
    assert "seed is 1 and was 42" in message
    assert next(event for event in rank_runner.events(third) if isinstance(event, Started)).start_step == 0


def test_a_corpus_of_marks_is_counted_and_warned_of_once(tmp_path: Path) -> None:
    text = tmp_path / "c.jsonl"
    lines = [{"text": "the cat <|im_end|>"}] * 20 + [{"text": "the dog"}] * 20
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for mode in ("text", "tokens"):
        described = rank_runner.spec(text, data={"special_tokens": mode}, training={"max_steps": 1})
        run = rank_runner.new_run(tmp_path / mode, described)
        assert rank_runner.run_to_end(run).outcome == "completed"
        events = rank_runner.events(run)
        (started,) = [event for event in events if isinstance(event, Started)]
        assert (started.special_tokens, started.special_texts) == (20, 20)
        found[mode] = [e.message for e in events if isinstance(e, WarningEvent) and e.code == "special_tokens"]
    assert len(found["text"]) == 1
    assert "50.0 % of the texts" in found["text"][0]
    assert 'set data.special_tokens to "tokens"' in found["text"][0]
    assert found["tokens"] == []


def test_a_warm_up_beyond_a_run_of_epochs_is_warned_of(text: Path, tmp_path: Path) -> None:
    training = {"epochs": 1, "max_steps": None, "warmup_steps": 5000}
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training=training))
    assert rank_runner.run_to_end(run).outcome == "completed"
    found = [event for event in rank_runner.events(run) if isinstance(event, WarningEvent)]
    (warning,) = [event for event in found if event.code == "warmup_beyond_run"]
    assert "warmup_steps 5,000 is not shorter than the run" in warning.message


def log_at_every_chance() -> None:
    """As if a minute had passed at every step, and two seconds after every micro-batch."""

    def hurry(trainer: Any, _progress: Any) -> None:
        trainer.max_log_seconds = trainer.microbatch_seconds = 0.0

    arm("train.step", hurry)


@pytest.mark.long
def test_a_curve_without_an_interval_has_points_and_a_slow_first_step_shows_progress(
    text: Path, tmp_path: Path
) -> None:
    described = rank_runner.spec(text, reporting={"log_interval": None}, training={"max_steps": 250})
    described["training"] |= {"batch_size": 1, "accumulation_steps": 3}
    run = rank_runner.new_run(tmp_path / "plain", described)
    assert rank_runner.run_to_end(run).outcome == "completed"
    steps = list(rank_runner.metrics(run))
    assert steps == list(range(2, 251, 2))
    # With more points the weights are the same: when a line is written changes nothing of what is trained.
    chatty = rank_runner.new_run(tmp_path / "chatty", described)
    assert rank_runner.run_to_end(chatty, patch=log_at_every_chance).outcome == "completed"
    assert list(rank_runner.metrics(chatty)) == list(range(2, 251))
    weights = [torch.load(r.artifacts(None).out / "pretrain_32.pth", weights_only=True) for r in (run, chatty)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    phases = [event for event in rank_runner.events(chatty) if isinstance(event, PhaseChanged) and event.total == 3]
    assert {event.message for event in phases} >= {"step 1: micro-batch 1 of 3 done", "step 3: micro-batch 2 of 3 done"}
    assert all(event.phase == "training" for event in phases)
