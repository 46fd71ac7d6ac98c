"""Scores of the model on task files: `choice` and `continuation`, by the formulas of EleutherAI's lm-eval.

Each text is scored after its context by the sum of the log-probabilities of its tokens, in nats:

- ``acc`` of a choice: the right choice has the highest sum; of a continuation: each of its tokens is the likeliest one.
- ``acc_norm`` of a choice: the right choice has the highest sum per UTF-8 byte.
- ``bpb``: bits per UTF-8 byte of the right text: minus the sum over all examples, over ln 2 and the bytes.

How a text becomes tokens:

- Context and text are joined as they are and tokenized together, after BOS, with which each training document begins.
- The text's tokens are those after the tokens of the context alone; at least the last one. White space at the end of
  the context counts as the beginning of the text: tokenizers join it with the word that follows.
- An empty context leaves BOS alone in front of the text.
- If all does not fit into ``max_position_embeddings``, the beginning is cut. A text that does not fit is an error.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.corpus_files import shown
from trainyard.contract.events import TaskScored
from trainyard.contract.failpoints import hit
from trainyard.contract.spec import TaskSpec
from trainyard.contract.status import Reason
from trainyard.contract.task_files import (
    Example,
    TaskFile,
    TaskFileInvalid,
    TaskKind,
    describe_bad_lines,
    read_task_file,
)
from trainyard.model.decoder import Decoder
from trainyard.model.loss import IGNORED
from trainyard.worker.data.tokenizers import Tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import StopRequested, TrainingError, describe_error
from trainyard.worker.paths import DATA_ROOTS, outside_error
from trainyard.worker.training.step import Precision

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoredText:
    """A text to score. ``ids``: BOS, context and text. ``scored``: number of tokens at the end that are the text's."""

    ids: list[int]
    scored: int
    truncated: bool


@dataclass(frozen=True)
class Task:
    """A task, tokenized. ``texts``: those of all examples, in order."""

    name: str
    kind: TaskKind
    sha256: str
    examples: Sequence[Example]
    texts: Sequence[ScoredText]


def load_tasks(
    specs: Sequence[TaskSpec],
    tokenizer: Tokenizer,
    positions: int,
    ranks: DistributedContext,
    roots: Sequence[Path] = (),
) -> list[Task]:
    """Read and tokenize the tasks. Rank 0 reads the files, so that all ranks have the same. All ranks call it together.

    ``positions``: of the model. Raises TrainingError for a file that cannot be used.
    """
    tasks = []
    for index, spec in enumerate(specs):
        file = ranks.broadcast_from_rank0(partial(_read, spec, index, roots))
        try:
            tasks.append(tokenize_task(spec.name, spec.kind, file, tokenizer, positions))
        except TaskFileInvalid as error:
            raise _data_error(index, f"{shown(Path(spec.path))} {error.reason}") from error
    return tasks


def _read(spec: TaskSpec, index: int, roots: Sequence[Path]) -> TaskFile:
    try:
        return read_task_file(spec.path, spec.kind, roots)
    except TaskFileInvalid as error:
        raise _data_error(index, f"{shown(Path(spec.path))} {error.reason}") from error
    except OutsideRoots as error:
        raise outside_error(f"evaluation.tasks[{index}].path", error.reason, DATA_ROOTS) from error
    except OSError as error:
        raise _data_error(index, f"cannot be read: {describe_error(error)}") from error


def _data_error(index: int, problem: str) -> TrainingError:
    hint = "Mend the file, then resume. A fork may have other evaluation.tasks."
    return TrainingError(Reason.DATA_INVALID, f"evaluation.tasks[{index}]: {problem}", hint)


def tokenize_task(name: str, kind: TaskKind, file: TaskFile, tokenizer: Tokenizer, positions: int) -> Task:
    """Tokenize the examples. Raises TaskFileInvalid for a text that does not fit into ``positions``."""
    contexts, wholes = [], []
    for example in file.examples:
        context = example.context.rstrip()
        contexts.append(context)
        wholes += [example.context + text for text in example.texts]
    context_lengths = [
        len(ids) if context else 0 for context, ids in zip(contexts, tokenizer.encode_batch(contexts), strict=True)
    ]
    encoded = iter(tokenizer.encode_batch(wholes))
    texts, bad = [], []
    for example, context_length in zip(file.examples, context_lengths, strict=True):
        for number, _ in enumerate(example.texts):
            ids = [tokenizer.bos_id, *next(encoded).tolist()]
            scored = max(1, len(ids) - 1 - context_length)
            what = f"choices[{number}]" if kind == "choice" else "continuation"
            if len(ids) == 1:
                bad.append((example.line, f"{what!r} has no token: the tokenizer drops its characters"))
            elif scored > positions:
                bad.append((example.line, f"{what!r} has {scored:,} tokens, and the model has {positions:,} positions"))
            # The last token is predicted and never an input, so one more than the positions fits.
            texts.append(ScoredText(ids[-(positions + 1) :], scored, len(ids) > positions + 1))
    if bad:
        raise TaskFileInvalid(name, describe_bad_lines(bad))
    return Task(name, kind, file.sha256, file.examples, texts)


@dataclass(frozen=True)
class TaskScorer:
    """Scores tasks on all ranks together.

    ``batch_tokens``: positions of a batch, padding included; a single text may have more. ``progress(done, total)`` is
    called before each round of batches. A stop request that any rank sees then raises StopRequested on all of them.
    """

    model: Decoder
    precision: Precision
    ranks: DistributedContext
    batch_tokens: int
    stop_requested: Callable[[], bool] = lambda: False
    progress: Callable[[int, int], None] = lambda _done, _total: None

    @torch.no_grad()
    def score(self, task: Task, step: int) -> TaskScored:
        """Return the scores of the model on ``task``, the same on every rank. All ranks call it together.

        Uses no random numbers, and changes neither the weights nor the training mode.
        """
        began = time.monotonic()
        was_training = self.model.training
        self.model.eval()
        try:
            log_probs, greedy = self._score_texts(task.texts)
        finally:
            self.model.train(was_training)
        acc, acc_norm, bpb = aggregate(task.kind, task.examples, log_probs, greedy)
        return TaskScored(
            step=step,
            task=task.name,
            task_kind=task.kind,
            examples=len(task.examples),
            acc=acc,
            acc_norm=acc_norm,
            bpb=bpb,
            truncated=sum(text.truncated for text in task.texts),
            file_sha256=task.sha256,
            seconds=time.monotonic() - began,
        )

    def _score_texts(self, texts: Sequence[ScoredText]) -> tuple[Floats, Floats]:
        """Return the sum of log-probabilities of each text, and 1.0 if all its tokens are the likeliest, else 0.0."""
        batches = split_batches([len(text.ids) for text in texts], self.batch_tokens)
        world, rank = self.ranks.world, self.ranks.rank
        own: list[float] = []
        for start in range(0, len(batches), world):
            hit("tasks.batch", start)
            self.progress(start, len(batches))
            if any(requested for (requested,) in self.ranks.gather([float(self.stop_requested())])):
                raise StopRequested
            # In the last round a rank may have no batch of its own. It scores another one all the same: with sharded
            # weights, every forward pass needs all ranks.
            batch = batches[start + rank] if start + rank < len(batches) else batches[start]
            sums = self._score_batch([texts[index] for index in batch])
            own += sums if start + rank < len(batches) else []
        return self._gather(batches, own, len(texts))

    def _score_batch(self, texts: Sequence[ScoredText]) -> list[float]:
        """Return the sum of log-probabilities of each text, then 1.0 or 0.0 of each as `_score_texts` does."""
        longest = max(len(text.ids) for text in texts) - 1
        inputs = torch.zeros(len(texts), longest, dtype=torch.long)
        labels = torch.full_like(inputs, IGNORED)
        for row, text in enumerate(texts):
            length = len(text.ids) - 1
            ids = torch.tensor(text.ids)
            inputs[row, :length] = ids[:-1]
            labels[row, length - text.scored : length] = ids[-text.scored :]
        device = self.ranks.device
        with self.precision.autocast():
            log_probs, likeliest = self.model.score_tokens(inputs.to(device), labels.to(device))
        values, hits = log_probs.double().cpu(), likeliest.cpu()
        ends = np.cumsum([0, *(text.scored for text in texts)]).tolist()
        rows = list(pairwise(ends))
        return [float(values[a:b].sum()) for a, b in rows] + [float(hits[a:b].all()) for a, b in rows]

    def _gather(self, batches: Sequence[Sequence[int]], own: list[float], count: int) -> tuple[Floats, Floats]:
        # `gather` needs rows of equal length.
        world = self.ranks.world
        lengths = [sum(2 * len(batch) for batch in batches[rank::world]) for rank in range(world)]
        rows = self.ranks.gather([*own, *[0.0] * (max(lengths) - len(own))])
        log_probs, greedy = np.zeros(count), np.zeros(count)
        for rank, row in enumerate(rows):
            at = 0
            for batch in batches[rank::world]:
                log_probs[batch] = row[at : at + len(batch)]
                greedy[batch] = row[at + len(batch) : at + 2 * len(batch)]
                at += 2 * len(batch)
        return log_probs, greedy


def split_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the indices of texts in batches of about ``batch_tokens`` positions, the longest texts first.

    The batches do not depend on the number of ranks, so that it does not change any score.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def aggregate(
    kind: TaskKind, examples: Sequence[Example], log_probs: Floats, greedy: Floats
) -> tuple[float | None, float | None, float | None]:
    """Return ``acc, acc_norm, bpb`` of the texts of all examples, in order. All are None if a number is not finite."""
    if not np.isfinite(log_probs).all():
        return None, None, None
    right = right_norm = exact = nats = 0.0
    size = 0
    for example, (start, end) in zip(examples, _ranges(examples), strict=True):
        sums = log_probs[start:end]
        lengths = np.array([len(text.encode()) for text in example.texts], dtype=np.float64)
        right += int(sums.argmax()) == example.answer
        right_norm += int((sums / lengths).argmax()) == example.answer
        exact += greedy[start + example.answer]
        nats -= sums[example.answer]
        size += int(lengths[example.answer])
    count, bpb = len(examples), float(nats / math.log(2) / size)
    return (right / count, right_norm / count, bpb) if kind == "choice" else (exact / count, None, bpb)


def _ranges(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """Yield where the texts of each example start and end."""
    start = 0
    for example in examples:
        yield start, start + len(example.texts)
        start += len(example.texts)
