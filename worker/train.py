"""One attempt of a run, from its data to its last checkpoint. Read it from top to bottom."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trainyard.contract.events import Event, PhaseChanged, WarningEvent
from trainyard.contract.failpoints import hit
from trainyard.contract.messages import Outcome, RunSettings
from trainyard.contract.spec import JobSpec, NodeRange
from trainyard.contract.status import Phase, Reason
from trainyard.worker.attempt import AttemptContext, Heartbeat
from trainyard.worker.checkpoint.resume import ResumePoint, find_resume_point, newest_valid
from trainyard.worker.checkpoint.saver import Checkpointer
from trainyard.worker.checkpoint.weights import load_weights
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import TrainingData, prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext, require_device
from trainyard.worker.errors import TrainingError
from trainyard.worker.events.trackers import Trackers
from trainyard.worker.paths import check_allowed_paths
from trainyard.worker.training import nonfinite
from trainyard.worker.training.control import (
    ControlFlags,
    ControlSync,
    LiveSettings,
    StopSignal,
    settings_changed_event,
    with_settings,
)
from trainyard.worker.training.evaluate import Evaluator, generate_samples
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow, restore_window
from trainyard.worker.training.monitors import LearningMonitor, LossSpikeDetector, spike_warning
from trainyard.worker.training.nonfinite import StepDecision
from trainyard.worker.training.resume_check import ResumeCheck, compare_scores
from trainyard.worker.training.schedule import LRSchedule, StepIntervals, total_steps
from trainyard.worker.training.startup import device_warnings, started_event, supports_bfloat16
from trainyard.worker.training.state import (
    TrainProgress,
    TrainState,
    build_train_state,
    initial_model,
)
from trainyard.worker.training.step import (
    PendingMetrics,
    StepMetrics,
    read,
    seed_dropout,
)

EventSink = Callable[[Event], None]

MAX_PENDING_STEPS = 100
"""Steps that are at most taken before somebody looks at how they went."""


def train(
    spec: JobSpec,
    attempt: AttemptContext,
    ranks: DistributedContext,
    life: Heartbeat,
    stop: StopSignal,
    trackers: Trackers,
    say: EventSink,
) -> Outcome:
    """Run the attempt until the last step, or until it is asked to stop. All ranks run this alike; rank 0 speaks.

    Raises Failure for every end that was foreseen, and StopAsked where there was nothing to save yet.
    """
    # What we run on, and what we may touch.
    require_device(ranks, spec)
    check_allowed_paths(spec, attempt.run)
    say(PhaseChanged(phase=Phase.LOADING))
    for caution in device_warnings(spec, ranks.device.type, supports_bfloat16(ranks.device)):
        say(caution)
    if spec.training.deterministic:
        torch.use_deterministic_algorithms(True)

    # The data: token shards and rows, built once by rank 0. The vocabulary is known from here on.
    say(PhaseChanged(phase=Phase.PREPARING_DATA))
    material = prepare_data(spec, attempt.run, ranks, say, stop.requested)
    spec = material.spec
    products = attempt.run.artifacts(spec.checkpoint.save_dir)
    say(PhaseChanged(phase=Phase.LOADING))

    # The model, and where it goes on: from this job's newest sound checkpoint, an earlier job's, weights, or nothing.
    def steps_of(rows_per_step: int) -> int:
        return total_steps(spec.training, -(-len(material.train_set) // rows_per_step))

    from_step = attempt.directory.read_resume_from()
    begin = ranks.broadcast_from_rank0(
        lambda: find_resume_point(spec, attempt.run, products, material.identity, steps_of, say, from_step, ranks.world)
    )
    model = initial_model(spec.model, spec.training.seed, ranks.device)
    untrained = begin is None and spec.training.from_weight is None
    if begin is None and spec.training.from_weight is not None:
        # Looked at again: the tokenization may have taken hours.
        check_allowed_paths(spec, attempt.run)
        load_weights(model, spec, products)
    trainee = build_train_state(
        model, spec.training, spec.model.router_aux_loss_coef if spec.model.use_moe else 0.0, ranks
    )
    progress, interval, rows_per_step, scored = _restore(begin, trainee, spec, ranks)

    # The order of rows is a function of seed and step; how many make a step was fixed by the first attempt.
    order = StepSampler(material.train_set.targets, rows_per_step, spec.training.seed)
    steps = progress.base_step + steps_of(rows_per_step)
    probe = ResumeCheck.of(material.train_set, spec.training, ranks.device)
    experts = spec.model.num_experts if spec.model.use_moe else 0
    fact = started_event(material, ranks, order, progress, steps, begin)
    loop = Trainer(
        spec=spec,
        data=material,
        state=trainee,
        ranks=ranks,
        loader=MicroBatchLoader(
            material.train_set, order, ranks, spec.training.batch_size, spec.training.loss_normalization
        ),
        lr_schedule=LRSchedule.of(spec.training, steps, progress.base_step),
        intervals=StepIntervals.of(spec, steps, evaluates=material.eval_set is not None),
        metrics=MetricsProcessor(ranks, interval, fact.flops_per_token, spec.model.use_moe, experts),
        checkpointer=Checkpointer(
            spec, products, material.identity, rows_per_step, ranks, say, time.monotonic(), probe
        ),
        save_requested=attempt.directory.save,
        settings=LiveSettings(attempt.directory.settings, RunSettings.of(spec.model_dump())),
        trackers=trackers,
        heartbeat=life,
        emit=say,
        monitor=LearningMonitor(spec.model.vocab_size if untrained else None, spec.training.warmup_steps),
    )
    say(fact)
    trackers.start_at(progress.step)
    life.beat(progress.step)
    if begin is not None and ranks.is_main_process:
        for event in compare_scores(progress.step, scored, probe.score(trainee)):
            say(event)

    # The steps, and the end: the last checkpoint and the weights are of the last step.
    loop.warm_up()
    say(PhaseChanged(phase=Phase.TRAINING))
    try:
        progress, asked = loop.run(progress, steps, stop)
    finally:
        loop.checkpointer.close()
    if asked and progress.step < steps:
        return Outcome(
            outcome="stopped", step=progress.step, reason=Reason.USER, message=f"saved at step {progress.step}"
        )
    return Outcome(outcome="completed", step=progress.step, message=f"all {steps} steps done")


def _restore(
    begin: ResumePoint | None, trainee: TrainState, spec: JobSpec, ranks: DistributedContext
) -> tuple[TrainProgress, MetricsWindow, int, dict[str, Any]]:
    """(how far the run is, this rank's sums since the last metric line, rows in a step, what its probe scored)."""
    if begin is None:
        # As many as there are ranks, not as the spec says: by hand it is torchrun that decides. Where a cluster chooses
        # the number of nodes, a step must not depend on how many were free at the beginning.
        world = spec.resources.ranks if isinstance(spec.resources.nnodes, NodeRange) else ranks.world
        return TrainProgress(), MetricsWindow(), spec.training.batch_size * spec.training.accumulation_steps * world, {}
    state = trainee.load(begin.place)
    return TrainProgress.of(state), restore_window(state.interval, ranks), state.rows_per_step, state.probe


@dataclass(frozen=True)
class PendingStep:
    """A step that was taken and not looked at yet. ``scale``: the fp16 scaler's during it."""

    step: int
    data_step: int
    tokens: int
    scale: float | None
    metrics: PendingMetrics


@dataclass
class Trainer:
    """The steps of one attempt.

    Where reading a step's numbers would wait for the device they are read together, when something is due (`_read`).
    The brake has kept what is not finite from the weights by then, and on all ranks alike.
    """

    spec: JobSpec
    data: TrainingData
    state: TrainState
    ranks: DistributedContext
    loader: MicroBatchLoader
    lr_schedule: LRSchedule
    intervals: StepIntervals
    metrics: MetricsProcessor
    checkpointer: Checkpointer
    save_requested: Path
    settings: LiveSettings
    trackers: Trackers
    heartbeat: Heartbeat
    emit: EventSink
    monitor: LearningMonitor
    spike_detector: LossSpikeDetector = field(default_factory=LossSpikeDetector)
    pending: list[PendingStep] = field(default_factory=list)
    last: StepMetrics | None = None

    def warm_up(self) -> None:
        """One pass without labels, where there is something to compile or buckets to settle."""
        training = self.spec.training
        if training.use_compile:
            self.emit(PhaseChanged(phase=Phase.COMPILING))
        if training.use_compile or self.ranks.world > 1:
            self.state.train_step.warm_up(self.loader.dummy(training.batch_size if training.use_compile else 1))
        self.state.model.train()

    def run(self, progress: TrainProgress, steps: int, stop: StopSignal) -> tuple[TrainProgress, bool]:
        """All steps behind ``progress``; the second value says whether the run ended because it was asked to."""
        agreement = ControlSync(self.ranks)
        self.state.train_step.guard.reset(progress.trouble)
        if progress.step == 0 and self.spec.training.on_nonfinite == "rollback":
            self.checkpointer.save(self.state, progress, self.metrics, must=True)
        if progress.step >= steps:
            self._save(progress, must=True)
        while progress.step < steps:
            before, progress = progress, self.train_step(progress)
            if progress.step <= before.step:
                continue
            self.heartbeat.beat(progress.step)
            save, spike = self.ranks.is_main_process and self._wants_save(), self.spike_detector.pending is not None
            news = self.settings.poll() if self.ranks.is_main_process else None
            wishes = agreement.exchange(ControlFlags(stop=stop.requested(), save=save, spike=spike, settings=news))
            if wishes.settings is not None:
                self._apply_settings(wishes.settings, progress.step, steps)
            last = progress.step == steps
            if self.intervals.is_save_step(progress.step) or wishes.save or wishes.stop:
                if (progress := self._collect_pending(progress)).step <= before.step:
                    continue
                self._save(progress, must=last or wishes.stop)
            if wishes.spike and (warning := spike_warning(self.ranks.gather(self.spike_detector.row()))) is not None:
                self.emit(warning)
            if wishes.stop and not last:
                agreement.finish()
                return progress, True
        agreement.finish()
        return progress, False

    def _apply_settings(self, settings: RunSettings, step: int, steps: int) -> None:
        """Tell and save by other settings from now on, on all ranks at the same step."""
        self.emit(settings_changed_event(step, RunSettings.of(self.spec.model_dump()), settings))
        self.spec = self.checkpointer.spec = with_settings(self.spec, settings)
        self.intervals = StepIntervals.of(self.spec, steps, evaluates=self.data.eval_set is not None)

    def _wants_save(self) -> bool:
        """Whether a save is due by the clock, or somebody asked for one since the last step. The wish is taken away."""
        asked = self.save_requested.exists()
        if asked:
            self.save_requested.unlink(missing_ok=True)
        return asked or self.checkpointer.is_due_by_time(time.monotonic())

    def train_step(self, progress: TrainProgress) -> TrainProgress:
        """One optimizer step, and where it is time, a look at it; after a rollback the progress is further back."""
        hit("train.step", self, progress)
        step = progress.step + 1
        data_step = step + progress.data_offset
        scale = self.state.loss_scale()
        self.metrics.begin_step()
        measured = self.state.train_step.run(
            self.loader.microbatches(data_step), self.lr_schedule.at(step), self._seed_step(step)
        )
        tokens, waited = self.loader.tokens(data_step), self.loader.data_seconds
        self.pending.append(PendingStep(step, data_step, tokens, scale, measured))
        progress, due = progress.after(tokens, progress.trouble), self.intervals.is_log_step(step)
        if (
            due
            or self.intervals.is_save_step(step)
            or not self.state.defers_metrics()
            or len(self.pending) >= MAX_PENDING_STEPS
        ):
            progress = self._collect_pending(progress)
        if progress.step == step:
            self.metrics.end_step(tokens, waited)
            if due:
                self._log_metrics(progress)
        return progress

    def _collect_pending(self, progress: TrainProgress) -> TrainProgress:
        """See how the steps went that nobody has looked at yet. All ranks come here together.

        Raises Failure where the run must end; after a rollback the progress is further back.
        """
        taken, self.pending = self.pending, []
        if not taken:
            return progress
        for step, result in zip(taken, read([step.metrics for step in taken]), strict=True):
            verdict, trouble, what = self._decide(step, result, progress.trouble)
            progress = replace(progress, trouble=trouble)
            if verdict is StepDecision.ROLL_BACK:
                return self._roll_back(replace(progress, step=step.step - 1), what)
            self._record(step.step, result)
        return progress

    def _decide(
        self, taken: PendingStep, result: StepMetrics, before: nonfinite.NonFiniteCounters
    ) -> tuple[StepDecision, nonfinite.NonFiniteCounters, str]:
        """(verdict, trouble from now on, what is to be said of it). Raises Failure where the run must end."""
        suspects = () if result.finite else self._nonfinite_report(result)
        policy = self.spec.training.on_nonfinite
        verdict, trouble = nonfinite.decide_step(result.finite, policy, before, taken.scale, losses_finite=not suspects)
        if verdict in (StepDecision.APPLIED, StepDecision.OVERFLOWED):
            return verdict, trouble, ""
        what = nonfinite.nonfinite_message(taken.step, tuple(self.loader.rows_of(taken.data_step).tolist()), suspects)
        if verdict is StepDecision.FAIL:
            # Steps behind this one were held back, whatever the sign of life has told since.
            self.heartbeat.beat(taken.step - 1)
            raise _diverged_error(what, trouble)
        if verdict is StepDecision.SKIP:
            self.emit(WarningEvent(code="step_skipped", message=f"{what}; the update was left out", step=taken.step))
        return verdict, trouble, what

    def _record(self, step: int, result: StepMetrics) -> None:
        """A step that stays counts in the next metric line, and is looked at by those who warn."""
        self.last = result
        self.metrics.record(result)
        self.spike_detector.observe(step, result.loss, result.max_loss)
        for warning in self.monitor.observe(step, result.loss, result.grad_norm):
            self.emit(warning)

    def _seed_step(self, step: int) -> Callable[[int], None]:
        if self.spec.model.dropout == 0:
            return lambda _: None
        return lambda micro: seed_dropout(self.spec.training.seed, step, self.ranks.rank, micro)

    def _nonfinite_report(self, result: StepMetrics) -> tuple[int, ...]:
        """Rows of all ranks whose loss was not finite. Every rank is here, because all saw the same gradient."""
        own = [float(row) for row in result.nonfinite_rows[:8]]
        rows = self.ranks.gather((own + [-1.0] * 8)[:8])
        return tuple(int(row) for rank_rows in rows for row in rank_rows if row >= 0)

    def _roll_back(self, progress: TrainProgress, what: str) -> TrainProgress:
        """Back to the newest sound checkpoint; the data from there to the bad step is left out from now on."""
        self.checkpointer.wait()
        path = self.ranks.broadcast_from_rank0(lambda: newest_valid(self.checkpointer.products, self.emit))
        if path is None:
            raise _diverged_error(f"{what}, and there is no checkpoint to go back to", progress.trouble)
        state = self.state.load(path)
        self.state.train_step.guard.reset(progress.trouble)
        self.metrics.rewind(restore_window(state.interval, self.ranks))
        bad_step = progress.step + 1
        message = f"{what}; back at step {state.step}, and on without the data of steps {state.step + 1} to {bad_step}"
        self.emit(WarningEvent(code="rolled_back", message=message, step=bad_step, data={"to_step": state.step}))
        self.trackers.start_at(state.step)
        self.heartbeat.beat(state.step)
        offset = progress.data_offset + bad_step - state.step
        return replace(TrainProgress.of(state), data_offset=offset, trouble=progress.trouble)

    def _log_metrics(self, progress: TrainProgress) -> None:
        """The metric line that is due, with the held-out loss where that is due too."""
        assert self.last is not None
        step, held_out = progress.step, self.data.eval_set
        eval_loss = None
        if held_out is not None and self.intervals.is_eval_step(step):
            self.emit(PhaseChanged(phase=Phase.EVALUATING))
            eval_loss = Evaluator(held_out, self.ranks, self.spec.training.batch_size).loss(self.state)
            self.emit(PhaseChanged(phase=Phase.TRAINING))
        line = self.metrics.metric_event(
            step=step,
            epoch=self.loader.sampler.epochs_done(step + progress.data_offset),
            learning_rate=self.lr_schedule.at(step),
            tokens=progress.tokens,
            grad_norm=self.last.grad_norm,
            eval_loss=eval_loss,
        )
        self.emit(line)
        self.trackers.log(line)
        for warning in self.monitor.observe_metrics(step, line.loss):
            self.emit(warning)

    def _save(self, progress: TrainProgress, *, must: bool) -> None:
        """Checkpoint and weights, written beside the next steps, and what the model writes now."""
        self.checkpointer.save(self.state, progress, self.metrics, must=must)
        if self.ranks.is_main_process and self.intervals.is_save_step(progress.step):
            prompts, limit = self.spec.reporting.sample_prompts, self.spec.model.max_position_embeddings
            model, tokenizer = self.state.model, self.data.tokenizer
            for sample in generate_samples(model, tokenizer, prompts, progress.step, self.state.precision, limit):
                self.emit(sample)
        self.ranks.barrier()


def _diverged_error(what: str, trouble: nonfinite.NonFiniteCounters) -> TrainingError:
    """The failure of a run whose numbers are no longer numbers. Every checkpoint is from before."""
    counts = (
        f" ({trouble.skipped} steps skipped, {trouble.rollbacks} rollbacks)"
        if trouble != nonfinite.NonFiniteCounters()
        else ""
    )
    hint = (
        "Resume goes on from the last sound checkpoint. Lower training.learning_rate, set training.grad_clip or "
        'training.warmup_steps, look at those rows, or set training.on_nonfinite to "skip" or "rollback".'
    )
    return TrainingError(Reason.DIVERGED, f"{what}{counts}; the update was not applied", hint)
