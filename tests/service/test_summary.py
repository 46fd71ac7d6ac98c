"""The summary of a job."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from trainyard.contract.status import Desired, JobStatus, Phase
from trainyard.service.jobs.summary import SummaryInput, duration, summary
from trainyard.service.schemas import Checkpoint, Progress, Queue

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)

CHECKPOINT = Checkpoint(
    id="1",
    job_id="j",
    attempt=1,
    step=12_000,
    path="/x",
    bytes=1,
    sha256="a",
    kind="full",
    loss=None,
    created_at=NOW - timedelta(minutes=3),
)

RUNNING = SummaryInput(
    status=JobStatus.RUNNING,
    desired=Desired.RUN,
    attempt=2,
    message=None,
    hint=None,
    phase=Phase.TRAINING,
    phase_detail={},
    progress=Progress(step=12_400, steps=40_000, percent=31, eta_seconds=7800, tokens_per_second=118_240, loss=2.913),
    checkpoint=CHECKPOINT,
    queue=None,
    heard_at=NOW - timedelta(seconds=1),
)


def sentence(**changes: Any) -> str:
    return summary(replace(RUNNING, **changes), NOW)


def test_sentences() -> None:
    assert sentence() == (
        "Step 12,400 of 40,000 (31 %), ETA 2 h 10 min, 118k tok/s, loss 2.913, checkpoint 3 min ago at 12,000."
    )
    assert sentence(progress=Progress(step=3, nonfinite=True), checkpoint=None) == "Step 3, loss not finite."
    assert sentence(phase=None, progress=Progress()) == "Loading."
    slow = {"message": "step 1: micro-batch 3 of 8 done", "done": 3, "total": 8}
    first = Progress(step=0, steps=8, percent=0)
    assert sentence(phase_detail=slow, progress=first, checkpoint=None) == (
        "Step 0 of 8 (0 %), step 1: micro-batch 3 of 8 done."
    )
    assert sentence(phase=Phase.COMPILING) == "Compiling the model."
    assert sentence(heard_at=NOW - timedelta(seconds=45)) == (
        "No report for 45 s, expected every 0.5 s, last at step 12,400. "
        "Not treated as failed: its processes are being checked."
    )
    queue = Queue(position=3, waiting_for="2 GPUs; 1 of 4 free")
    assert sentence(status=JobStatus.QUEUED, queue=queue) == "Waiting for 2 GPUs; 1 of 4 free. Position 3."
    assert sentence(status=JobStatus.STARTING) == "Starting attempt 2."
    assert sentence(status=JobStatus.PAUSING) == "Saving and pausing at step 12,400."
    assert sentence(status=JobStatus.CANCELLING) == "Saving and stopping at step 12,400."
    assert sentence(status=JobStatus.CANCELLING, desired=Desired.KILL) == "Ending without a save at step 12,400."
    assert sentence(status=JobStatus.PAUSED) == "Paused at step 12,400; resuming continues from step 12,000."
    assert sentence(status=JobStatus.SUCCEEDED) == "Finished at step 12,400, loss 2.913."
    evaluated = RUNNING.progress.model_copy(update={"eval_loss": 3.01, "eval_bpb": 1.0954})
    assert sentence(status=JobStatus.SUCCEEDED, progress=evaluated) == (
        "Finished at step 12,400, loss 2.913, held-out loss 3.010 (1.095 bits per byte)."
    )
    failed = {"status": JobStatus.FAILED, "message": "out of GPU memory on rank 2", "hint": "Lower batch_size."}
    assert sentence(**failed) == "Out of GPU memory on rank 2. Lower batch_size."
    assert sentence(status=JobStatus.INTERRUPTED) == "Ended for an unknown reason."


@pytest.mark.parametrize("status", list(JobStatus))
def test_there_is_a_sentence_for_everything(status: JobStatus) -> None:
    bare = replace(
        RUNNING,
        status=status,
        progress=Progress(),
        checkpoint=None,
        queue=Queue(position=1, waiting_for="x"),
        heard_at=None,
    )
    for phase in (None, *Phase):
        said = summary(replace(bare, phase=phase), NOW)
        assert said.endswith(".")
        assert "None" not in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-3, "0 s"), (0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "1 h"), (7800, "2 h 10 min"), (180_000, "2 d 2 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
