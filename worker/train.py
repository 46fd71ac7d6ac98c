"""One attempt of a run, from its data to its last checkpoint. Read it from top to bottom."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trainyard.contract.events import Event, PhaseChanged, Warned
from trainyard.contract.failpoints import hit
from trainyard.contract.messages import Outcome, RunSettings
from trainyard.contract.spec import JobSpec, NodeRange
from trainyard.contract.status import Phase, Reason
from trainyard.worker.attempt import Attempt, SignOfLife
from trainyard.worker.checkpoint.resume import Start, find_start, newest_of
from trainyard.worker.checkpoint.saver import Saver
from trainyard.worker.checkpoint.weights import start_from
from trainyard.worker.data.loader import Feed
from trainyard.worker.data.paths import check_roots
from trainyard.worker.data.prepare import Material, prepare
from trainyard.worker.data.sampler import Order
from trainyard.worker.distributed import Ranks, require
from trainyard.worker.errors import Failure
from trainyard.worker.events.trackers import Trackers
from trainyard.worker.training import nonfinite
from trainyard.worker.training.control import Agreement, SettingsWish, StopWish, Wishes, changed, with_settings
from trainyard.worker.training.evaluate import Evaluation, written
from trainyard.worker.training.metrics import Interval, Meters, own_interval
from trainyard.worker.training.monitors import CurveWatch, Spikes, told
from trainyard.worker.training.nonfinite import Verdict
from trainyard.worker.training.resume_check import Probe, verified
from trainyard.worker.training.schedule import Calendar, LearningRate, total_steps
from trainyard.worker.training.startup import cautions, has_bfloat16, started
from trainyard.worker.training.state import (
    Progress,
    Trainee,
    build,
    initial_model,
)
from trainyard.worker.training.step import (
    StepResult,
    Unread,
    read,
    seed_dropout,
)

Say = Callable[[Event], None]

MOST_UNREAD = 100
"""Steps that are at most taken before somebody looks at how they went."""


def train(
    spec: JobSpec, attempt: Attempt, ranks: Ranks, life: SignOfLife, stop: StopWish, trackers: Trackers, say: Say
) -> Outcome:
    """Run the attempt until the last step, or until it is asked to stop. All ranks run this alike; rank 0 speaks.

    Raises Failure for every end that was foreseen, and StopAsked where there was nothing to save yet.
    """
    # What we run on, and what we may touch.
    require(ranks, spec)
    check_roots(spec, attempt.run)
    say(PhaseChanged(phase=Phase.LOADING))
    for caution in cautions(spec, ranks.device.type, has_bfloat16(ranks.device)):
        say(caution)
    if spec.training.deterministic:
        torch.use_deterministic_algorithms(True)

    # The data: token shards and rows, built once by rank 0. The vocabulary is known from here on.
    say(PhaseChanged(phase=Phase.PREPARING_DATA))
    material = prepare(spec, attempt.run, ranks, say, stop.asked)
    spec = material.spec
    products = attempt.run.products(spec.checkpoint.save_dir)
    say(PhaseChanged(phase=Phase.LOADING))

    # The model, and where it goes on: from this job's newest sound checkpoint, an earlier job's, weights, or nothing.
    def steps_of(rows_per_step: int) -> int:
        return total_steps(spec.training, -(-len(material.rows) // rows_per_step))

    from_step = attempt.directory.read_resume_from()
    begin = ranks.from_leader(
        lambda: find_start(spec, attempt.run, products, material.identity, steps_of, say, from_step, ranks.world)
    )
    model = initial_model(spec.model, spec.training.seed, ranks.device)
    untrained = begin is None and spec.training.from_weight is None
    if begin is None and spec.training.from_weight is not None:
        # Looked at again: the tokenization may have taken hours.
        check_roots(spec, attempt.run)
        start_from(model, spec, products)
    trainee = build(model, spec.training, spec.model.router_aux_loss_coef if spec.model.use_moe else 0.0, ranks)
    progress, interval, rows_per_step, scored = _restored(begin, trainee, spec, ranks)

    # The order of rows is a function of seed and step; how many make a step was fixed by the first attempt.
    order = Order(material.rows.targets, rows_per_step, spec.training.seed)
    steps = progress.base_step + steps_of(rows_per_step)
    probe = Probe.of(material.rows, spec.training, ranks.device)
    experts = spec.model.num_experts if spec.model.use_moe else 0
    fact = started(material, ranks, order, progress, steps, begin)
    loop = Loop(
        spec=spec,
        material=material,
        trainee=trainee,
        ranks=ranks,
        feed=Feed(material.rows, order, ranks, spec.training.batch_size, spec.training.loss_normalization),
        rate=LearningRate.of(spec.training, steps, progress.base_step),
        calendar=Calendar.of(spec, steps, evaluates=material.evaluation is not None),
        meters=Meters(ranks, interval, fact.flops_per_token, spec.model.use_moe, experts),
        saver=Saver(spec, products, material.identity, rows_per_step, ranks, say, time.monotonic(), probe),
        asked_to_save=attempt.directory.save,
        settings=SettingsWish(attempt.directory.settings, RunSettings.of(spec.model_dump())),
        trackers=trackers,
        life=life,
        say=say,
        watch=CurveWatch(spec.model.vocab_size if untrained else None, spec.training.warmup_steps),
    )
    say(fact)
    trackers.begin(progress.step)
    life.beat(progress.step)
    if begin is not None and ranks.leads:
        for event in verified(progress.step, scored, probe.score(trainee)):
            say(event)

    # The steps, and the end: the last checkpoint and the weights are of the last step.
    loop.warm_up()
    say(PhaseChanged(phase=Phase.TRAINING))
    try:
        progress, asked = loop.run(progress, steps, stop)
    finally:
        loop.saver.close()
    if asked and progress.step < steps:
        return Outcome(
            outcome="stopped", step=progress.step, reason=Reason.USER, message=f"saved at step {progress.step}"
        )
    return Outcome(outcome="completed", step=progress.step, message=f"all {steps} steps done")


def _restored(
    begin: Start | None, trainee: Trainee, spec: JobSpec, ranks: Ranks
) -> tuple[Progress, Interval, int, dict[str, Any]]:
    """(how far the run is, this rank's sums since the last metric line, rows in a step, what its probe scored)."""
    if begin is None:
        # As many as there are ranks, not as the spec says: by hand it is torchrun that decides. Where a cluster chooses
        # the number of nodes, a step must not depend on how many were free at the beginning.
        world = spec.resources.ranks if isinstance(spec.resources.nnodes, NodeRange) else ranks.world
        return Progress(), Interval(), spec.training.batch_size * spec.training.accumulation_steps * world, {}
    state = trainee.load(begin.place)
    return Progress.of(state), own_interval(state.interval, ranks), state.rows_per_step, state.probe


@dataclass(frozen=True)
class Taken:
    """A step that was taken and not looked at yet. ``scale``: the fp16 scaler's during it."""

    step: int
    data_step: int
    tokens: int
    scale: float | None
    measured: Unread


@dataclass
class Loop:
    """The steps of one attempt.

    Where reading a step's numbers would wait for the device they are read together, when something is due (`_read`).
    The brake has kept what is not finite from the weights by then, and on all ranks alike.
    """

    spec: JobSpec
    material: Material
    trainee: Trainee
    ranks: Ranks
    feed: Feed
    rate: LearningRate
    calendar: Calendar
    meters: Meters
    saver: Saver
    asked_to_save: Path
    settings: SettingsWish
    trackers: Trackers
    life: SignOfLife
    say: Say
    watch: CurveWatch
    spikes: Spikes = field(default_factory=Spikes)
    unread: list[Taken] = field(default_factory=list)
    last: StepResult | None = None

    def warm_up(self) -> None:
        """One pass without labels, where there is something to compile or buckets to settle."""
        training = self.spec.training
        if training.use_compile:
            self.say(PhaseChanged(phase=Phase.COMPILING))
        if training.use_compile or self.ranks.world > 1:
            self.trainee.stepper.warm_up(self.feed.dummy(training.batch_size if training.use_compile else 1))
        self.trainee.model.train()

    def run(self, progress: Progress, steps: int, stop: StopWish) -> tuple[Progress, bool]:
        """All steps behind ``progress``; the second value says whether the run ended because it was asked to."""
        agreement = Agreement(self.ranks)
        self.trainee.stepper.brake.release(progress.trouble)
        if progress.step == 0 and self.spec.training.on_nonfinite == "rollback":
            self.saver.save(self.trainee, progress, self.meters, must=True)
        if progress.step >= steps:
            self._save(progress, must=True)
        while progress.step < steps:
            before, progress = progress, self._step(progress)
            if progress.step <= before.step:
                continue
            self.life.beat(progress.step)
            save, spike = self.ranks.leads and self._wants_save(), self.spikes.pending is not None
            news = self.settings.news() if self.ranks.leads else None
            wishes = agreement.exchange(Wishes(stop=stop.asked(), save=save, spike=spike, settings=news))
            if wishes.settings is not None:
                self._take_over(wishes.settings, progress.step, steps)
            last = progress.step == steps
            if self.calendar.saves(progress.step) or wishes.save or wishes.stop:
                if (progress := self._read(progress)).step <= before.step:
                    continue
                self._save(progress, must=last or wishes.stop)
            if wishes.spike and (warning := told(self.ranks.gather(self.spikes.row()))) is not None:
                self.say(warning)
            if wishes.stop and not last:
                agreement.settle()
                return progress, True
        agreement.settle()
        return progress, False

    def _take_over(self, settings: RunSettings, step: int, steps: int) -> None:
        """Tell and save by other settings from now on, on all ranks at the same step."""
        self.say(changed(step, RunSettings.of(self.spec.model_dump()), settings))
        self.spec = self.saver.spec = with_settings(self.spec, settings)
        self.calendar = Calendar.of(self.spec, steps, evaluates=self.material.evaluation is not None)

    def _wants_save(self) -> bool:
        """Whether a save is due by the clock, or somebody asked for one since the last step. The wish is taken away."""
        asked = self.asked_to_save.exists()
        if asked:
            self.asked_to_save.unlink(missing_ok=True)
        return asked or self.saver.is_due_by_time(time.monotonic())

    def _step(self, progress: Progress) -> Progress:
        """One optimizer step, and where it is time, a look at it; after a rollback the progress is further back."""
        hit("train.step", self, progress)
        step = progress.step + 1
        data_step = step + progress.data_offset
        scale = self.trainee.loss_scale()
        self.meters.begin_step()
        measured = self.trainee.stepper.step(self.feed.micros(data_step), self.rate.at(step), self._seeding(step))
        tokens, waited = self.feed.tokens(data_step), self.feed.waited
        self.unread.append(Taken(step, data_step, tokens, scale, measured))
        progress, due = progress.after(tokens, progress.trouble), self.calendar.logs(step)
        if due or self.calendar.saves(step) or not self.trainee.may_lag() or len(self.unread) >= MOST_UNREAD:
            progress = self._read(progress)
        if progress.step == step:
            self.meters.end_step(tokens, waited)
            if due:
                self._log(progress)
        return progress

    def _read(self, progress: Progress) -> Progress:
        """See how the steps went that nobody has looked at yet. All ranks come here together.

        Raises Failure where the run must end; after a rollback the progress is further back.
        """
        taken, self.unread = self.unread, []
        if not taken:
            return progress
        for step, result in zip(taken, read([step.measured for step in taken]), strict=True):
            verdict, trouble, what = self._judged(step, result, progress.trouble)
            progress = replace(progress, trouble=trouble)
            if verdict is Verdict.ROLL_BACK:
                return self._rolled_back(replace(progress, step=step.step - 1), what)
            self._count(step.step, result)
        return progress

    def _judged(
        self, taken: Taken, result: StepResult, before: nonfinite.Trouble
    ) -> tuple[Verdict, nonfinite.Trouble, str]:
        """(verdict, trouble from now on, what is to be said of it). Raises Failure where the run must end."""
        suspects = () if result.finite else self._suspects(result)
        policy = self.spec.training.on_nonfinite
        verdict, trouble = nonfinite.judge(result.finite, policy, before, taken.scale, losses_finite=not suspects)
        if verdict in (Verdict.APPLIED, Verdict.OVERFLOWED):
            return verdict, trouble, ""
        what = nonfinite.describe(taken.step, tuple(self.feed.rows_of(taken.data_step).tolist()), suspects)
        if verdict is Verdict.FAIL:
            # Steps behind this one were held back, whatever the sign of life has told since.
            self.life.beat(taken.step - 1)
            raise _diverged(what, trouble)
        if verdict is Verdict.SKIP:
            self.say(Warned(code="step_skipped", message=f"{what}; the update was left out", step=taken.step))
        return verdict, trouble, what

    def _count(self, step: int, result: StepResult) -> None:
        """A step that stays counts in the next metric line, and is looked at by those who warn."""
        self.last = result
        self.meters.count(result)
        self.spikes.look(step, result.loss, result.worst)
        for warning in self.watch.step(step, result.loss, result.grad_norm):
            self.say(warning)

    def _seeding(self, step: int) -> Callable[[int], None]:
        if self.spec.model.dropout == 0:
            return lambda _: None
        return lambda micro: seed_dropout(self.spec.training.seed, step, self.ranks.rank, micro)

    def _suspects(self, result: StepResult) -> tuple[int, ...]:
        """Rows of all ranks whose loss was not finite. Every rank is here, because all saw the same gradient."""
        own = [float(row) for row in result.suspects[:8]]
        rows = self.ranks.gather((own + [-1.0] * 8)[:8])
        return tuple(int(row) for rank_rows in rows for row in rank_rows if row >= 0)

    def _rolled_back(self, progress: Progress, what: str) -> Progress:
        """Back to the newest sound checkpoint; the data from there to the bad step is left out from now on."""
        self.saver.settle()
        path = self.ranks.from_leader(lambda: newest_of(self.saver.products, self.say))
        if path is None:
            raise _diverged(f"{what}, and there is no checkpoint to go back to", progress.trouble)
        state = self.trainee.load(path)
        self.trainee.stepper.brake.release(progress.trouble)
        self.meters.rewind(own_interval(state.interval, self.ranks))
        bad_step = progress.step + 1
        message = f"{what}; back at step {state.step}, and on without the data of steps {state.step + 1} to {bad_step}"
        self.say(Warned(code="rolled_back", message=message, step=bad_step, data={"to_step": state.step}))
        self.trackers.begin(state.step)
        self.life.beat(state.step)
        offset = progress.data_offset + bad_step - state.step
        return replace(Progress.of(state), data_offset=offset, trouble=progress.trouble)

    def _log(self, progress: Progress) -> None:
        """The metric line that is due, with the held-out loss where that is due too."""
        assert self.last is not None
        step, held_out = progress.step, self.material.evaluation
        eval_loss = None
        if held_out is not None and self.calendar.evaluates(step):
            self.say(PhaseChanged(phase=Phase.EVALUATING))
            eval_loss = Evaluation(held_out, self.ranks, self.spec.training.batch_size).loss(self.trainee)
            self.say(PhaseChanged(phase=Phase.TRAINING))
        line = self.meters.line(
            step=step,
            epoch=self.feed.order.epochs_done(step + progress.data_offset),
            learning_rate=self.rate.at(step),
            tokens=progress.tokens,
            grad_norm=self.last.grad_norm,
            eval_loss=eval_loss,
        )
        self.say(line)
        self.trackers.log(line)
        for warning in self.watch.line(step, line.loss):
            self.say(warning)

    def _save(self, progress: Progress, *, must: bool) -> None:
        """Checkpoint and weights, written beside the next steps, and what the model writes now."""
        self.saver.save(self.trainee, progress, self.meters, must=must)
        if self.ranks.leads and self.calendar.saves(progress.step):
            prompts, limit = self.spec.reporting.sample_prompts, self.spec.model.max_position_embeddings
            model, tokenizer = self.trainee.model, self.material.tokenizer
            for sample in written(model, tokenizer, prompts, progress.step, self.trainee.precision, limit):
                self.say(sample)
        self.ranks.wait_for_all()


def _diverged(what: str, trouble: nonfinite.Trouble) -> Failure:
    """The failure of a run whose numbers are no longer numbers. Every checkpoint is from before."""
    counts = (
        f" ({trouble.skipped} steps skipped, {trouble.rollbacks} rollbacks)" if trouble != nonfinite.Trouble() else ""
    )
    hint = (
        "Resume goes on from the last sound checkpoint. Lower training.learning_rate, set training.grad_clip or "
        'training.warmup_steps, look at those rows, or set training.on_nonfinite to "skip" or "rollback".'
    )
    return Failure(Reason.DIVERGED, f"{what}{counts}; the update was not applied", hint)
