"""``python -m trainyard.worker.evaluation``: score a checkpoint on tasks for the service, see `contract.evaluation`."""

import os
import sys
import time
import traceback
from pathlib import Path

from trainyard.contract.corpus_files import shown
from trainyard.contract.evaluation import EvaluationRequest
from trainyard.contract.task_files import TaskFileInvalid, read_task_file
from trainyard.worker.sidecar import ServiceLink, lower_priority

PROGRESS_SECONDS = 1.0


class CannotEvaluate(Exception):
    """The checkpoint cannot be evaluated. The message says why."""


def main() -> int:
    """Evaluate the checkpoint of the service's request. Return 0, or 1 if it cannot be evaluated."""
    lower_priority()
    # Before torch is imported: the service may end meanwhile.
    link = ServiceLink.from_environment()
    request = EvaluationRequest.model_validate(link.receive(wait=True))
    try:
        evaluate(link, request)
    except CannotEvaluate as error:
        link.send({"event": "failed", "message": str(error)})
        return 1
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        link.send({"event": "failed", "message": f"{type(error).__name__}: {text}"})
        return 1
    link.send({"event": "done"})
    return 0


def evaluate(link: ServiceLink, request: EvaluationRequest) -> None:
    """Send the scores of each task, or why it has none. Raises CannotEvaluate."""
    import torch

    from trainyard.contract.tokenizer_info import TokenizerInvalid
    from trainyard.worker.checkpoint.export import ExportError, find_export_source
    from trainyard.worker.data.tokenizers import load_tokenizer
    from trainyard.worker.distributed import DistributedContext, GpuUnusable, assigned_device
    from trainyard.worker.paths import data_roots
    from trainyard.worker.training.state import DTYPES
    from trainyard.worker.training.step import Precision
    from trainyard.worker.training.tasks import TaskScorer, tokenize_task

    torch.set_num_threads(int(os.environ.get("TRAINYARD_THREADS", "1")))
    try:
        device = assigned_device()
        source = find_export_source(Path(request.checkpoint))
        tokenizer = load_tokenizer(request.tokenizer_path, request.special_tokens, data_roots())
        if tokenizer.fingerprint != source.state.identity.tokenizer:
            raise CannotEvaluate("its tokenizer has changed since the checkpoint was saved")
        model = source.load_model(device)
    except (ExportError, TokenizerInvalid, OSError) as error:
        raise CannotEvaluate(f"the checkpoint cannot be loaded: {error}") from error
    except GpuUnusable as error:
        raise CannotEvaluate(str(error)) from error
    scorer = TaskScorer(
        model,
        Precision(device.type, DTYPES[request.dtype]),
        DistributedContext(0, 1, 0, 1, device),
        request.batch_tokens,
        progress=_Progress(link),
    )
    for spec in request.tasks:
        try:
            file = read_task_file(spec.path, spec.kind, data_roots())
            task = tokenize_task(spec.name, spec.kind, file, tokenizer, source.model.max_position_embeddings)
        except (TaskFileInvalid, OSError) as error:
            why = error.reason if isinstance(error, TaskFileInvalid) else f"cannot be read: {error.strerror}"
            link.send({"event": "task_failed", "task": spec.name, "message": f"{shown(Path(spec.path))} {why}"})
            continue
        link.send({"event": "scored", **scorer.score(task, request.step).model_dump(mode="json")})


class _Progress:
    """Reports to the service at intervals, so that the process is not considered hung."""

    def __init__(self, link: ServiceLink) -> None:
        self._link = link
        self._sent_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._sent_at >= PROGRESS_SECONDS:
            self._sent_at = time.monotonic()
            self._link.send({"event": "progress", "done": done, "total": total})


if __name__ == "__main__":
    sys.exit(main())
