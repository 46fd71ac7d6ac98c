"""Messages between the service and the side process that evaluates a checkpoint, see `contract.sidecar`.

The service sends one `EvaluationRequest`. The process answers with lines that have an ``event``: ``progress``
(``done``, ``total`` batches),
``scored`` (the fields of a `contract.events.TaskScored`), ``task_failed`` (``task``, ``message``), and at the end
``done``, or ``failed`` (``message``).
"""

from typing import Literal

from trainyard.contract.messages import Message
from trainyard.contract.spec import TaskSpec
from trainyard.contract.tokenizer_info import SpecialTokens


class EvaluationRequest(Message):
    """A checkpoint, and the tasks to score it on. ``dtype``: that of the training.

    ``batch_tokens``: see `worker.training.tasks.TaskScorer`.
    """

    checkpoint: str
    step: int
    tokenizer_path: str
    special_tokens: SpecialTokens
    dtype: Literal["bfloat16", "float16", "float32"]
    batch_tokens: int
    tasks: list[TaskSpec]
