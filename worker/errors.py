"""Foreseen failures of a run, each with a reason, a message and a hint. Any other exception is a crash and a bug."""

import errno
import re
from typing import Any

from trainyard.contract.messages import ErrorCard, Outcome
from trainyard.contract.spec import ResourcesSpec, TrainingSpec, next_memory_saving
from trainyard.contract.status import Reason

COMPILER_MODULES = ("torch._dynamo", "torch._inductor")
OUT_OF_MEMORY_TEXT = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|NCCL[\s\S]*out of memory"
)
"""What the CPU's allocator says, and on a full card the driver, cuBLAS, cuDNN and NCCL."""

NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


class TrainingError(Exception):
    """The run cannot continue. ``message`` says what happened and where, ``hint`` what to do."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        hint: str | None = None,
        rank: int | None = None,
        peak_memory_bytes: int | None = None,
    ) -> None:
        super().__init__(reason, message, hint, rank, peak_memory_bytes)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.rank = rank
        self.peak_memory_bytes = peak_memory_bytes

    def __str__(self) -> str:
        return self.message + (f"\n  {self.hint}" if self.hint else "")

    def outcome(self, step: int) -> Outcome:
        """Return the content of outcome.json. ``step``: the last one that was done."""
        card = ErrorCard(
            code=self.reason,
            message=self.message,
            hint=self.hint,
            rank=self.rank,
            peak_memory_bytes=self.peak_memory_bytes,
        )
        return Outcome(outcome="failed", step=step, reason=self.reason, message=self.message, error=card)


class StopRequested(Exception):
    """A stop was requested before there was anything to save."""


def save_error(error: OSError | MemoryError, what: str) -> TrainingError:
    """Return the error of a required file, ``what``, that could not be written."""
    message = f"{what} could not be written: {describe_error(error)}"
    if isinstance(error, MemoryError):
        return TrainingError(Reason.HOST_OUT_OF_MEMORY, message, "End other programs on the host, then resume.")
    hint = (
        "Free space, or point checkpoint.save_dir at a larger disk, then resume."
        if error.errno in NO_SPACE_ERRNOS
        else "Make the directory writable, or choose another checkpoint.save_dir, then resume."
    )
    return TrainingError(Reason.DISK_FULL, message, hint)


def describe_error(error: OSError | MemoryError) -> str:
    """Return e.g. ``No space left on device (/a/b)``."""
    if isinstance(error, MemoryError):
        return "the host is out of memory"
    path = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or str(error) or type(error).__name__}{path}"


def out_of_memory_error(
    error: BaseException,
    *,
    rank: int,
    step: int,
    training: TrainingSpec,
    resources: ResourcesSpec | None = None,
    peak_bytes: int | None = None,
) -> TrainingError | None:
    """Return the error for an exception that reports too little memory, or None for any other exception.

    ``step``: the last one that was done. ``peak_bytes``: peak memory of the rank.
    """
    # torch raises its own class if its allocator on CUDA has no memory, and a RuntimeError in all other cases.
    if type(error).__name__ not in ("OutOfMemoryError", "MemoryError") and not (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY_TEXT.search(str(error))
    ):
        return None
    text = " ".join(str(error).split())[:300]
    rows = training.batch_size
    message = f"out of memory on rank {rank} in step {step + 1} with {rows} rows in a micro-batch: {text}"
    hint = _memory_hint(training, resources or ResourcesSpec())
    return TrainingError(Reason.OUT_OF_MEMORY, message, hint, rank, peak_bytes)


def compile_error(error: BaseException) -> TrainingError | None:
    """Return the error for an exception of torch's compiler, or None for any other exception."""
    if not type(error).__module__.startswith(COMPILER_MODULES):
        return None
    text = " ".join(str(error).split())[:300]
    message = f"training.use_compile: the model cannot be compiled here: {text}"
    # torch often raises another class, and names that of the cause only in its text.
    missing = any(name in f"{type(error).__name__} {text}" for name in ("InvalidCxxCompiler", "C++ compiler"))
    need = "A C++ compiler is missing: install one (Debian: apt-get install g++), or name it in CXX. Or set"
    then = (
        "training.use_compile to false, in a fork if there is a checkpoint: the run is slower and otherwise the same."
    )
    hint = f"{need if missing else 'Set'} {then}"
    return TrainingError(Reason.SPEC_INVALID, message, hint)


def _memory_hint(training: TrainingSpec, resources: ResourcesSpec) -> str:
    saving = next_memory_saving(training, resources)
    if saving is None:
        return _smaller_batch_hint(training)
    smaller = _smaller_batch_hint(training)
    # A resume may not change the batch size.
    return f"{_saving_hint(saving)} {smaller.replace('Set ', 'Or, in a fork or a new job, set ', 1)}"


def _saving_hint(saving: dict[str, dict[str, Any]]) -> str:
    if "training" in saving:
        return (
            "Resume with training.gradient_checkpointing true: a layer then keeps only its input and is computed again "
            "in the backward pass; the result is the same."
        )
    return (
        f'Resume with resources.parallelism "{saving["resources"]["parallelism"]}": a rank then holds its share of '
        f"{SHARED[saving['resources']['parallelism']]}."
    )


SHARED = {"zero1": "the optimizer state", "fsdp": "weights, gradients and optimizer state"}


def _smaller_batch_hint(training: TrainingSpec) -> str:
    smaller = training.smaller_batch()
    if smaller is None:
        return "One row needs too much: submit it with a lower data.max_seq_len or a smaller model, or use more memory."
    rows, micro_batches = smaller
    return (
        f"Set training.batch_size to {rows} and training.accumulation_steps to {micro_batches}: "
        f"the result is the same, with 1/{training.batch_size // rows} of the memory of activations."
    )
