"""One attempt of a run, from its data to its last checkpoint. Read it from top to bottom."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from trainyard.contract.events import Event, MetricEvent, WarningEvent
from trainyard.contract.failpoints import hit
from trainyard.contract.lr_schedule import LRSchedule
from trainyard.contract.messages import Outcome, RunSettings
from trainyard.contract.smoothing import Ema
from trainyard.contract.spec import JobSpec, NodeRange
from trainyard.contract.status import Phase, Reason
from trainyard.worker.attempt import AttemptContext, StepHeartbeat, evaluated_loss, scored_tasks
from trainyard.worker.checkpoint.files import RunState, TensorShapes
from trainyard.worker.checkpoint.fork import read_fork
from trainyard.worker.checkpoint.relocate import move_artifacts
from trainyard.worker.checkpoint.resume import ResumePoint, find_resume_point, newest_own_checkpoint, saved_corpora
from trainyard.worker.checkpoint.saver import Checkpointer
from trainyard.worker.checkpoint.weights import load_weights
from trainyard.worker.data.byte_lengths import ByteLengths
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.data.prepare import TrainingData, prepare_data
from trainyard.worker.distributed import DistributedContext, require_device
from trainyard.worker.errors import StopRequested, TrainingError
from trainyard.worker.events.phases import PhaseReporter
from trainyard.worker.events.trackers import Trackers
from trainyard.worker.paths import check_allowed_paths, weight_roots
from trainyard.worker.stop_signal import StopSignal
from trainyard.worker.training.bits_per_byte import ByteCounter
from trainyard.worker.training.control import (
    ControlFlags,
    ControlSync,
    LiveSettings,
    settings_changed_event,
    take_request,
    with_settings,
)
from trainyard.worker.training.device_setup import set_up_device
from trainyard.worker.training.heldout import HeldOutEvaluator
from trainyard.worker.training.limits import RunLimits
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow, RankTimer, restore_window
from trainyard.worker.training.monitors import LearningMonitor, LossSpikeDetector, StragglerMonitor, spike_warning
from trainyard.worker.training.nonfinite import NonFiniteCounters, StepDecision, decide_step, nonfinite_message
from trainyard.worker.training.resume_check import ResumeCheck, compare_scores
from trainyard.worker.training.samples import generate_samples
from trainyard.worker.training.schedule import StepIntervals, is_finished, last_step
from trainyard.worker.training.startup import (
    device_warnings,
    rank_info,
    replica_check,
    schedule_warnings,
    started_event,
    supports_bfloat16,
)
from trainyard.worker.training.state import TrainProgress, TrainState, build_train_state, initial_model
from trainyard.worker.training.step import PendingMetrics, StepMetrics, Verification, read_metrics, seed_dropout
from trainyard.worker.training.tasks import Task, TaskScorer, load_tasks
from trainyard.worker.training.verify import StepVerifier

EventSink = Callable[[Event], None]

FIRST_STEPS = 3
"""Number of first steps of an attempt that report how many micro-batches are done."""

MAX_PENDING_STEPS = 100
"""Maximum number of steps whose results are read from the device together."""


def train(
    spec: JobSpec,
    attempt: AttemptContext,
    ranks: DistributedContext,
    heartbeat: StepHeartbeat,
    stop: StopSignal,
    trackers: Trackers,
    phases: PhaseReporter,
    emit: EventSink,
) -> Outcome:
    """Run the attempt until the last step or a requested stop. Every rank runs this; only rank 0's events are written.

    Raises TrainingError for every expected failure, and StopRequested if there is nothing to save yet.
    """
    # The device this runs on, and the paths it may use.
    require_device(ranks, spec)
    check_allowed_paths(spec, attempt.run)
    phases.enter(Phase.LOADING)
    for warning in device_warnings(spec, ranks.device.type, supports_bfloat16(ranks.device)):
        emit(warning)
    set_up_device(spec, ranks.device)

    # The data: token shards and packed rows, built once by rank 0. From here on the vocabulary size is known.
    artifacts = attempt.run.artifacts(spec.checkpoint.save_dir)
    with phases.during(Phase.PREPARING_DATA):
        data = prepare_data(
            spec, attempt.run, ranks, emit, stop.requested, lambda: saved_corpora(spec, attempt.run, artifacts)
        )
        spec = data.spec
        positions = spec.model.max_position_embeddings
        tasks = load_tasks(spec.evaluation.tasks, data.tokenizer, positions, ranks, data.roots)

    # The model, and what it starts from: a checkpoint (of this job, its parent or an earlier job), ``from_weight``, or
    # random weights.
    from_step = attempt.directory.read_resume_from()
    ranks.broadcast_from_rank0(lambda: move_artifacts(spec, attempt.run, artifacts, emit))
    # FSDP moves the weights to the device layer by layer: it may have no room for all of them.
    is_split = spec.resources.parallelism == "fsdp" and ranks.world > 1
    model = initial_model(
        spec.model,
        spec.training.seed,
        torch.device("cpu") if is_split else ranks.device,
        zero_init_projections=spec.training.zero_init_projections,
    )
    shapes = TensorShapes.of(model)
    resume_from = ranks.broadcast_from_rank0(
        lambda: find_resume_point(
            spec,
            attempt.run,
            artifacts,
            data.identity,
            lambda saved: is_finished(
                spec.training, TrainProgress.from_state(saved), -(-len(data.train_set) // saved.rows_per_step)
            ),
            emit,
            from_step,
            _ranks_of_batch(spec, ranks),
            shapes,
        )
    )
    untrained = resume_from is None and spec.training.from_weight is None
    if resume_from is None and spec.training.from_weight is not None:
        load_weights(model, spec, artifacts, weight_roots(attempt.run))
    lengths = data.byte_lengths
    byte_counter = ByteCounter.of(lengths, ranks.device) if isinstance(lengths, ByteLengths) else None
    aux_coefficient = spec.model.router_aux_loss_coef if spec.model.use_moe else 0.0
    state = build_train_state(model, spec.training, aux_coefficient, ranks, byte_counter, spec.resources.parallelism)
    progress, window, rows_per_step, saved = _restore(resume_from, state, spec, ranks)
    unevaluated = MetricEvent.model_validate(saved.unevaluated) if saved and saved.unevaluated is not None else None
    eval_loss = None
    if saved is not None and (unevaluated is not None or spec.limits.target_loss is not None):
        eval_loss = ranks.broadcast_from_rank0(lambda: evaluated_loss(attempt.run, progress.step))
        unevaluated = unevaluated if eval_loss is None else None
    scored = ranks.broadcast_from_rank0(lambda: scored_tasks(attempt.run, progress.step)) if tasks else frozenset()

    # Which rows a step takes is a function of seed and step. How many it takes was fixed by the first attempt.
    sampler = data.sampler(rows_per_step, spec.training.seed)
    # With ``max_tokens``, counting the tokens of the rows may take seconds, so only rank 0 does it.
    steps = ranks.broadcast_from_rank0(lambda: last_step(spec.training, progress, sampler, data.train_set.targets_of))
    resume_check = ResumeCheck.from_dataset(data.train_set, spec.training, ranks.device)
    # All attempts together share the limit of time, so this one continues the count of those before it.
    fork = read_fork(attempt.run)
    earlier_seconds = ranks.broadcast_from_rank0(attempt.run.train_seconds)
    limits = RunLimits(
        spec.limits, earlier_seconds, lambda: phases.training_seconds, first_step=fork.step if fork is not None else 0
    )
    heartbeat.train_seconds = limits.seconds
    places = ranks.gather_objects(rank_info(ranks))
    replicas, replica_warnings = replica_check(ranks, places, spec.resources.parallelism)
    started = started_event(data, ranks, sampler, progress, steps, resume_from, places, earlier_seconds)
    # FSDP waits for the other ranks in every layer, so the times of the ranks do not differ.
    measures_ranks = ranks.world > 1 and spec.resources.parallelism != "fsdp"
    trainer = Trainer(
        spec=spec,
        data=data,
        state=state,
        ranks=ranks,
        loader=MicroBatchLoader(
            data.train_set,
            sampler,
            ranks,
            spec.training.batch_size,
            spec.training.loss_normalization,
            # The model is compiled for each shape that it sees, so it must see one only.
            min_rows=spec.training.batch_size if spec.training.use_compile else 1,
            fixed_shape=spec.training.use_compile,
            prefetches=ranks.device.type == "cuda",
            equal_counts=state.gathers_weights,
        ),
        lr_schedule=LRSchedule.from_spec(spec.training, steps, progress.base_step),
        intervals=StepIntervals.from_spec(spec, steps, evaluates=bool(data.eval_sets)),
        metrics=MetricsProcessor(
            ranks,
            window,
            started.flops_per_token,
            has_aux=spec.model.use_moe,
            experts=spec.model.num_experts if spec.model.use_moe else 0,
            timer=RankTimer(model.model.embed_tokens.weight, ranks.device) if measures_ranks else None,
        ),
        checkpointer=Checkpointer(
            spec, artifacts, data.identity, rows_per_step, ranks, emit, time.monotonic(), resume_check, replicas
        ),
        save_request=attempt.directory.save,
        settings=LiveSettings(attempt.directory.settings, RunSettings.of(spec.model_dump())),
        trackers=trackers,
        heartbeat=heartbeat,
        stop=stop,
        limits=limits,
        # A run that ends by time has about 100 points too.
        max_log_seconds=min(60.0, 0.6 * spec.limits.max_minutes) if spec.limits.max_minutes is not None else 60.0,
        phases=phases,
        emit=emit,
        monitor=LearningMonitor(spec.model.vocab_size if untrained else None, spec.training.warmup_steps),
        tasks=tasks,
        eval_loss_at_start=eval_loss if data.eval_sets else None,
        scored_at_start=(progress.step, scored),
        straggler_monitor=StragglerMonitor(places),
        verifier=StepVerifier(model, ranks, places) if spec.training.verify_every is not None else None,
    )
    trainer.metrics.unevaluated = unevaluated if data.eval_sets else None
    trainer.metrics.smoothed = Ema.from_sums(saved.smoothed if saved else ())
    emit(started)
    for warning in (*replica_warnings, *schedule_warnings(spec.training, steps - progress.base_step)):
        emit(warning)
    trackers.start_at(progress.step)
    heartbeat.beat(progress.step)
    if resume_from is not None and (ranks.is_main_process or state.gathers_weights):
        for event in compare_scores(progress.step, saved.probe if saved else {}, resume_check.score(state)):
            emit(event)

    # The steps. The last checkpoint and the final weights are of the last step that was run.
    with phases.report_compilation() if spec.training.use_compile else contextlib.nullcontext():
        trainer.warm_up()
        phases.enter(Phase.TRAINING)
        try:
            progress, stopped = trainer.run(progress)
        finally:
            phases.enter(Phase.SAVING)
            hit("train.close")
            trainer.checkpointer.close()
    if stopped:
        return Outcome(
            outcome="stopped", step=progress.step, reason=Reason.USER, message=f"saved at step {progress.step}"
        )
    if trainer.limit is not None:
        return Outcome(outcome="completed", step=progress.step, reason=Reason.LIMIT, message=trainer.limit)
    return Outcome(outcome="completed", step=progress.step, message=f"all {trainer.intervals.steps} steps done")


def _restore(
    resume_from: ResumePoint | None, state: TrainState, spec: JobSpec, ranks: DistributedContext
) -> tuple[TrainProgress, MetricsWindow, int, RunState | None]:
    """Load the checkpoint, if any. Return progress, this rank's metrics window, rows per step, and the saved state."""
    if resume_from is None:
        # The first attempt fixes the size of a step.
        rows_per_step = spec.training.batch_size * spec.training.accumulation_steps * _ranks_of_batch(spec, ranks)
        return TrainProgress(), MetricsWindow(), rows_per_step, None
    saved = state.load(resume_from.checkpoint)
    window = restore_window(saved.interval, ranks, saved.interval_bytes)
    return TrainProgress.from_state(saved), window, saved.rows_per_step, saved


def _ranks_of_batch(spec: JobSpec, ranks: DistributedContext) -> int:
    """Return the number of ranks that determines the size of a step: the ranks that torchrun has started.

    With a range of nodes, it is the largest number of ranks. The size must not depend on how many nodes were free.
    """
    return spec.resources.ranks if isinstance(spec.resources.nnodes, NodeRange) else ranks.world


@dataclass(frozen=True)
class PendingStep:
    """A step that was dispatched and whose result is not read yet.

    ``data_step``: its step in the data order, see `TrainProgress`. ``scale``: the fp16 loss scale during the step.
    """

    step: int
    data_step: int
    scale: float | None
    metrics: PendingMetrics


@dataclass
class Trainer:
    """The steps of one attempt.

    On CUDA, results are read in batches (at log and save steps) to avoid a device sync per step. That is safe: on the
    device, the guard skips bad updates at once, and the same ones on all ranks.
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
    save_request: Path
    settings: LiveSettings
    trackers: Trackers
    heartbeat: StepHeartbeat
    stop: StopSignal
    limits: RunLimits
    phases: PhaseReporter
    emit: EventSink
    monitor: LearningMonitor
    straggler_monitor: StragglerMonitor
    verifier: StepVerifier | None = None
    spike_detector: LossSpikeDetector = field(default_factory=LossSpikeDetector)
    pending: list[PendingStep] = field(default_factory=list)
    last_metrics: StepMetrics | None = None
    max_log_seconds: float = 60.0
    """Without a ``log_interval``, a metric line is written at least this often."""
    microbatch_seconds: float = 2.0
    """The number of finished micro-batches is reported at most this often."""
    _logged_at: float = field(default_factory=time.monotonic)
    _logs_next_step: bool = False
    _slow_steps: int = FIRST_STEPS
    """Steps of this attempt that still report their micro-batches."""
    save_is_owed: bool = False
    limit: str | None = None
    """The limit that has ended the run, as a message."""
    _ends_next_step: bool = False
    tasks: list[Task] = field(default_factory=list)
    eval_loss_at_start: float | None = None
    """The ``eval_loss`` of the step that this attempt starts from, if an earlier attempt has evaluated it."""
    scored_at_start: tuple[int, frozenset[str]] = (0, frozenset())
    """The step that this attempt starts from, and the tasks that an earlier attempt has scored there."""

    def warm_up(self) -> None:
        """Run one pass without labels, if needed to compile the model or to fix the order of DDP's buckets."""
        compiles = self.spec.training.use_compile
        if compiles:
            self.phases.enter(Phase.COMPILING)
        if compiles or self.ranks.world > 1:
            self.state.train_step.warm_up(self.loader.dummy())
        self.state.model.train()

    def run(self, progress: TrainProgress) -> tuple[TrainProgress, bool]:
        """Run all steps after ``progress``. Return the progress, and whether a stop request ended the run early.

        A step that is to be saved and evaluated is saved first: an evaluation may be long, and a stop request or a
        crash ends it. The next attempt then does it.
        """
        control = ControlSync(self.ranks)
        self.state.train_step.guard.reset(progress.nonfinite)
        self._end_at_start(progress)
        self._save_at_start(progress)
        stopped = not self._evaluate(progress)
        while not stopped and progress.step < self.intervals.steps:
            previous_step, progress = progress.step, self.train_step(progress)
            if progress.step <= previous_step:
                continue  # rolled back
            self.heartbeat.beat(progress.step)
            # One all-reduce shares the flags of all ranks. With several ranks, they are those of the previous step.
            flags = control.exchange(self._own_flags())
            if flags.save_failed:
                self.checkpointer.wait()  # raises the error on every rank
            if flags.settings is not None:
                self._apply_settings(flags.settings, progress.step)
            self._logs_next_step = flags.log
            self._ends_next_step = flags.limit
            self.limits.end_step()
            is_last = progress.step == self.intervals.steps
            if self.intervals.is_save_step(progress.step) or flags.save or flags.stop:
                # A checkpoint must not hold a step whose result was never checked.
                if (progress := self._collect_pending(progress)).step <= previous_step:
                    self.save_is_owed = flags.save  # the request file is gone: save after the next step
                    continue
                self._save(progress, required=is_last or flags.stop)
            if flags.spike:
                self._emit_spike_warning()
            if flags.stop:
                self._give_up_evaluation()
                stopped = not is_last or self.metrics.unevaluated is not None or bool(self._due_tasks(progress.step))
            else:
                stopped = not self._evaluate(progress)
            if stopped:
                break
        control.finish()
        return progress, stopped

    def _end_at_start(self, progress: TrainProgress) -> None:
        """End the run if earlier attempts have reached a limit. Raises TrainingError if they have saved nothing."""
        minutes, smoothed, eval_loss = self.limits.spec.max_minutes, self.metrics.smoothed, self.eval_loss_at_start
        if minutes is not None and self.limits.earlier_seconds >= 60 * minutes:
            if progress.step == self.limits.first_step:
                message = (
                    f"limits.max_minutes: {minutes:g} minutes of training are used up, and no checkpoint was saved"
                )
                hint = "Resume with more max_minutes. With checkpoint.save_minutes a crash loses less."
                raise TrainingError(Reason.LIMIT, message, hint)
            self._end_at(progress.step, self.limits.time_message(progress.step))
        elif self.limits.is_reached(eval_loss):
            self._end_at(progress.step, self.limits.loss_message("eval_loss", eval_loss, progress.step))
        elif not self.data.eval_sets and smoothed.weight and self.limits.is_reached(smoothed.value):
            self._end_at(progress.step, self.limits.loss_message("smoothed loss", smoothed.value, progress.step))

    def _end_at(self, step: int, message: str) -> None:
        """Make ``step`` the last one of the run, because of a limit. All ranks call it at the same step."""
        if step < self.intervals.steps:
            self.limit = message
            self._set_last_step(step)

    def _save_at_start(self, progress: TrainProgress) -> None:
        if progress.step == 0 and self.spec.training.on_nonfinite == "rollback":
            # A bad step before the first regular save also needs a checkpoint to roll back to.
            with self.phases.during(Phase.SAVING):
                self.checkpointer.save(self.state, progress, self.metrics, required=True)
        if progress.step >= self.intervals.steps:
            # All steps are done, but the attempt that did them may have died before its final weights were written.
            self._save(progress, required=True)

    def _own_flags(self) -> ControlFlags:
        return ControlFlags(
            stop=self.stop.requested(),
            save=self.ranks.is_main_process and self._should_save_now(),
            spike=self.spike_detector.pending is not None,
            log=self.ranks.is_main_process and self._is_log_overdue(),
            save_failed=self.checkpointer.has_failed,
            # The others read it a step later, and the step after that is the last one.
            limit=self.ranks.is_main_process and self.ranks.world > 1 and self.limits.is_time_up(steps_ahead=2),
            settings=self.settings.poll() if self.ranks.is_main_process else None,
        )

    def _is_log_overdue(self) -> bool:
        if self.spec.reporting.log_interval is not None or time.monotonic() - self._logged_at < self.max_log_seconds:
            return False
        # Only once: with several ranks the flag comes back a step later.
        self._logged_at = time.monotonic()
        return True

    def _microbatches(self, step: int, data_step: int) -> Iterator[MicroBatch]:
        """Yield the step's micro-batches. In the first steps, report how many are done: one step may take minutes."""
        if self._slow_steps == 0 or not self.ranks.is_main_process:
            yield from self.loader.microbatches(data_step)
            return
        self._slow_steps -= 1
        total, emitted_at, was_slow = self.spec.training.accumulation_steps, time.monotonic(), False
        for done, micro_batch in enumerate(self.loader.microbatches(data_step)):
            if time.monotonic() - emitted_at >= self.microbatch_seconds:
                emitted_at, was_slow = time.monotonic(), True
                self.phases.report(f"step {step:,}: micro-batch {done} of {total} done", done, total)
            yield micro_batch
        if was_slow:
            self.phases.report()

    def _emit_spike_warning(self) -> None:
        warning = spike_warning(self.ranks.gather(self.spike_detector.take_row()))
        # None if the previous step has taken the spike: a flag arrives a step later, so it was sent twice.
        if warning is not None:
            self.emit(warning)

    def _apply_settings(self, settings: RunSettings, step: int) -> None:
        """Use new settings for logging and saving from now on. All ranks do it at the same step."""
        self.emit(settings_changed_event(step, RunSettings.of(self.spec.model_dump()), settings))
        self.spec = self.checkpointer.spec = with_settings(self.spec, settings)
        self.limits.spec = self.spec.limits
        self._set_last_step(self.intervals.steps)

    def _set_last_step(self, steps: int) -> None:
        self.intervals = StepIntervals.from_spec(self.spec, steps, evaluates=bool(self.data.eval_sets))

    def _should_save_now(self) -> bool:
        """Return whether a save is due by time or was requested. The request file is deleted."""
        requested = take_request(self.save_request)
        requested, self.save_is_owed = requested or self.save_is_owed, False
        return requested or self.checkpointer.is_due_by_time(time.monotonic())

    def train_step(self, progress: TrainProgress) -> TrainProgress:
        """Run one optimizer step, and read results if due. After a rollback the progress is an earlier step's."""
        hit("train.step", self, progress)
        step = progress.step + 1
        data_step = step + progress.data_offset
        scale = self.state.loss_scale()
        self.metrics.begin_step()
        pending_metrics = self.state.train_step.run(
            self._microbatches(step, data_step),
            self.lr_schedule.at(step),
            self._dropout_seeder(step),
            self._verification(step),
        )
        self.pending.append(PendingStep(step, data_step, scale, pending_metrics))
        tokens, data_seconds = self.loader.tokens(data_step), self.loader.data_seconds
        progress = progress.next_step(tokens)
        if self._ends_next_step or (self.ranks.world == 1 and self.limits.is_time_up()):
            self._end_at(step, self.limits.time_message(step))
        log_due = self.intervals.is_log_step(step) or self._logs_next_step
        if (
            log_due
            or self.intervals.is_save_step(step)
            or self.intervals.is_task_step(step)
            or not self.state.defers_metrics()
            or len(self.pending) >= MAX_PENDING_STEPS
        ):
            progress = self._collect_pending(progress)
        if progress.step == step:
            self.metrics.end_step(tokens, data_seconds)
            if log_due:
                self._log_metrics(progress)
        return progress

    def _collect_pending(self, progress: TrainProgress) -> TrainProgress:
        """Read the results of all pending steps. All ranks call it together.

        Raises TrainingError if the run must end. After a rollback the progress is an earlier step's.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return progress
        all_metrics = read_metrics([pending_step.metrics for pending_step in pending])
        for pending_step, metrics in zip(pending, all_metrics, strict=True):
            decision, counters, reason = self._decide(pending_step, metrics, progress.nonfinite)
            progress = replace(progress, nonfinite=counters)
            if decision is StepDecision.ROLL_BACK:
                return self._roll_back(replace(progress, step=pending_step.step - 1), reason)
            self._record(pending_step.step, metrics)
        return progress

    def _decide(
        self, pending_step: PendingStep, metrics: StepMetrics, counters: NonFiniteCounters
    ) -> tuple[StepDecision, NonFiniteCounters, str]:
        """Return the decision on a step, the new counters and the reason. Raises TrainingError if the run must end."""
        bad_rows = () if metrics.finite else self._gather_nonfinite_rows(metrics)
        policy = self.spec.training.on_nonfinite
        decision, counters = decide_step(
            metrics.finite, policy, counters, pending_step.scale, losses_finite=not bad_rows
        )
        if decision in (StepDecision.APPLIED, StepDecision.OVERFLOWED):
            return decision, counters, ""
        rows = tuple(self.loader.rows_of(pending_step.data_step).tolist())
        reason = nonfinite_message(pending_step.step, rows, bad_rows)
        if decision is StepDecision.FAIL:
            # The guard has skipped every step after this one, but the heartbeat has counted them.
            self.heartbeat.beat(pending_step.step - 1)
            raise _diverged_error(reason, counters)
        if decision is StepDecision.SKIP:
            message = f"{reason}; the update was left out"
            self.emit(WarningEvent(code="step_skipped", message=message, step=pending_step.step))
        return decision, counters, reason

    def _gather_nonfinite_rows(self, metrics: StepMetrics) -> tuple[int, ...]:
        """Return the rows of all ranks whose loss was not finite, at most 8 per rank.

        Every rank calls this: the gradient is summed over ranks, so all of them see the same NaN.
        """
        own = [float(row) for row in metrics.nonfinite_rows[:8]]
        gathered = self.ranks.gather((own + [-1.0] * 8)[:8])
        return tuple(int(row) for rank_rows in gathered for row in rank_rows if row >= 0)

    def _record(self, step: int, metrics: StepMetrics) -> None:
        """Add a step to the next metric line, and let the monitors check it."""
        self.last_metrics = metrics
        self.metrics.record(metrics)
        self.spike_detector.observe(step, metrics.loss, metrics.max_loss_rows)
        for warning in self.monitor.observe(step, metrics.loss, metrics.grad_norm):
            self.emit(warning)

    def _verification(self, step: int) -> Verification | None:
        every = self.spec.training.verify_every
        if self.verifier is None or not every or step % every:
            return None
        return Verification(self.verifier, step, self.metrics.restart_rank_clock)

    def _dropout_seeder(self, step: int) -> Callable[[int], None]:
        if self.spec.model.dropout == 0:
            return lambda _: None
        return lambda micro: seed_dropout(self.spec.training.seed, step, self.ranks.rank, micro)

    def _roll_back(self, progress: TrainProgress, reason: str) -> TrainProgress:
        """Reload the newest valid checkpoint. The data from there to the bad step is skipped from now on."""
        shapes = self.state.shapes
        with self.phases.during(Phase.LOADING):
            hit("train.roll_back")
            self.checkpointer.wait()
            artifacts = self.checkpointer.artifacts
            path = self.ranks.broadcast_from_rank0(lambda: newest_own_checkpoint(artifacts, self.emit, shapes))
            if path is None:
                raise _diverged_error(f"{reason}, and there is no checkpoint to go back to", progress.nonfinite)
            saved = self.state.load(path)
        self.state.train_step.guard.reset(progress.nonfinite)
        self.metrics.rewind(restore_window(saved.interval, self.ranks, saved.interval_bytes))
        self.metrics.smoothed = Ema.from_sums(saved.smoothed)
        bad_step = progress.step + 1
        message = (
            f"{reason}; rolled back to step {saved.step}; the data of steps {saved.step + 1} to {bad_step} is skipped"
        )
        self.trackers.start_at(saved.step)
        self.heartbeat.beat(saved.step)
        # Keep the current counters: with the checkpoint's, a run could roll back for ever.
        offset = progress.data_offset + bad_step - saved.step
        progress = replace(TrainProgress.from_state(saved), data_offset=offset, nonfinite=progress.nonfinite)
        self.limit = None
        self._set_schedule(progress)
        data = {"to_step": saved.step, "steps": self.intervals.steps}
        self.emit(WarningEvent(code="rolled_back", message=message, step=bad_step, data=data))
        return progress

    def _set_schedule(self, progress: TrainProgress) -> None:
        """Adapt the length of the run to the data that a rollback has skipped."""
        training, sampler, targets_of = self.spec.training, self.loader.sampler, self.data.train_set.targets_of
        steps = self.ranks.broadcast_from_rank0(lambda: last_step(training, progress, sampler, targets_of))
        self._set_last_step(steps)
        self.lr_schedule = LRSchedule.from_spec(training, steps, progress.base_step)

    def _log_metrics(self, progress: TrainProgress) -> None:
        """Emit the metric line that is due. If an evaluation is due too, hold the line until `_evaluate`."""
        assert self.last_metrics is not None
        step = progress.step
        metric = self.metrics.metric_event(
            step=step,
            epoch=self.loader.sampler.epochs_done(step + progress.data_offset),
            learning_rate=self.lr_schedule.at(step),
            tokens=progress.tokens,
            grad_norm=self.last_metrics.grad_norm,
            eval_loss=None,
        ).model_copy(update={"train_seconds": self.limits.seconds()})
        self._logged_at = time.monotonic()
        smoothed = self.metrics.smoothed
        if not self.data.eval_sets and smoothed.weight and self.limits.is_reached(smoothed.value):
            self._end_at(step, self.limits.loss_message("smoothed loss", smoothed.value, step))
        if self.intervals.is_eval_step(step):
            self.metrics.unevaluated = metric
        else:
            self._emit_metric(metric)

    def _emit_metric(self, metric: MetricEvent) -> None:
        self.emit(metric)
        self.trackers.log(metric)
        for warning in (*self.monitor.observe_metrics(metric), *self.straggler_monitor.observe(metric)):
            self.emit(warning)

    def _evaluate(self, progress: TrainProgress) -> bool:
        """Do the evaluations that are due: the loss on the evaluation split, and tasks. All ranks call it together.

        Return False if a stop was requested meanwhile: then the evaluation is given up, and the step is saved.
        """
        return self._evaluate_loss(progress) and self._score_tasks(progress)

    def _evaluate_loss(self, progress: TrainProgress) -> bool:
        metric = self.metrics.unevaluated
        if metric is None or not self.data.eval_sets:
            return True
        batch_size, counter = self.spec.training.batch_size, self.state.train_step.byte_counter
        with self.phases.during(Phase.EVALUATING):
            evaluator = HeldOutEvaluator(self.data.eval_sets, self.ranks, batch_size, counter, self.stop.requested)
            try:
                found = evaluator.evaluate(self.state)
            except StopRequested:
                self._give_up_evaluation()
                self._save_once(progress)
                return False
        self.metrics.unevaluated = None
        results = {"eval_loss": found.loss, "eval_bpb": found.bpb, "eval": found.sets, "at": datetime.now(UTC)}
        self._emit_metric(metric.model_copy(update=results))
        if progress.step < self.intervals.steps and self.limits.is_reached(found.loss):
            self._end_at(progress.step, self.limits.loss_message("eval_loss", found.loss, progress.step))
            self._save_once(progress)
        return True

    def _score_tasks(self, progress: TrainProgress) -> bool:
        due = self._due_tasks(progress.step)
        if not due:
            return True
        training = self.spec.training
        scorer = TaskScorer(
            self.state.model,
            self.state.precision,
            self.ranks,
            training.batch_size * self.spec.data.max_seq_len,
            self.stop.requested,
        )
        with self.phases.during(Phase.EVALUATING):
            for number, task in enumerate(due):
                self.phases.report(f"task {task.name}", number, len(due))
                try:
                    scored = scorer.score(task, progress.step)
                except StopRequested:
                    self._save_once(progress)
                    return False
                finally:
                    if self.state.split is not None:
                        self.state.split.release()
                self.emit(scored)
                self.trackers.log(scored)
        return True

    def _due_tasks(self, step: int) -> list[Task]:
        """Return the tasks to score at ``step``. If this attempt ends early, the next one scores the rest."""
        start, scored = self.scored_at_start
        if not self.intervals.is_task_step(step):
            return []
        return [task for task in self.tasks if step != start or task.name not in scored]

    def _give_up_evaluation(self) -> None:
        """Emit the metric line that waits for its evaluation, if any. The next attempt emits the complete one.

        It is not passed to the trackers: they ignore another line of a step that they have.
        """
        if self.metrics.unevaluated is not None:
            self.emit(self.metrics.unevaluated)

    def _save_once(self, progress: TrainProgress) -> None:
        """Save the step unless it is saved already."""
        artifacts = self.checkpointer.artifacts
        with self.phases.during(Phase.SAVING):
            self.checkpointer.wait()
            if not self.ranks.broadcast_from_rank0(lambda: os.path.exists(artifacts.checkpoint(progress.step))):
                self.checkpointer.save(self.state, progress, self.metrics, required=True)

    def _save(self, progress: TrainProgress, *, required: bool) -> None:
        """Start saving checkpoint and weights, and emit samples of what the model generates now."""
        with self.phases.during(Phase.SAVING):
            hit("train.save")
            self.checkpointer.save(self.state, progress, self.metrics, required=required)
        takes_part = self.ranks.is_main_process or self.state.gathers_weights
        if takes_part and self.intervals.is_save_step(progress.step):
            self._emit_samples(progress.step)
        self.ranks.barrier()

    def _emit_samples(self, step: int) -> None:
        """Emit samples of what the model generates now. After a stop request the other prompts are left out."""
        prompts, limit = self.spec.reporting.sample_prompts, self.spec.model.max_position_embeddings
        model, tokenizer = self.state.model, self.data.tokenizer
        with self.phases.during(Phase.EVALUATING) if prompts else contextlib.nullcontext():
            for sample in generate_samples(
                model, tokenizer, prompts, step, self.state.precision, limit, in_step=self.state.gathers_weights
            ):
                self.emit(sample)
                if self._stops_samples():
                    break
        if self.state.split is not None:
            self.state.split.release()

    def _stops_samples(self) -> bool:
        if not self.state.gathers_weights:
            return self.stop.requested()
        return any(requested for (requested,) in self.ranks.gather([float(self.stop.requested())]))


def _diverged_error(reason: str, counters: NonFiniteCounters) -> TrainingError:
    counts = (
        f" ({counters.skipped} steps skipped, {counters.rollbacks} rollbacks)"
        if counters != NonFiniteCounters()
        else ""
    )
    hint = (
        "Resume continues from the last valid checkpoint. A fork of it may have a lower training.learning_rate, "
        'another training.grad_clip or training.warmup_steps, or training.on_nonfinite "skip" or "rollback". '
        "Look at those rows."
    )
    return TrainingError(Reason.DIVERGED, f"{reason}{counts}; the update was not applied", hint)
