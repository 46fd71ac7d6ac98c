"""Ends of a run that are foreseen: each has a reason, a sentence and advice. Everything else is a crash and a bug."""

import errno

from trainyard.contract.messages import ErrorCard, Outcome
from trainyard.contract.spec import TrainingSpec
from trainyard.contract.status import Reason

COMPILER = ("torch._dynamo", "torch._inductor")
NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


class TrainingError(Exception):
    """The run cannot go on. ``message`` says what happened and where, ``hint`` what to do."""

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
        """What outcome.json says of it."""
        card = ErrorCard(
            code=self.reason,
            message=self.message,
            hint=self.hint,
            rank=self.rank,
            peak_memory_bytes=self.peak_memory_bytes,
        )
        return Outcome(outcome="failed", step=step, reason=self.reason, message=self.message, error=card)


class StopRequested(Exception):
    """The run was asked to stop before there was anything to save."""


def save_error(error: OSError | MemoryError, what: str) -> TrainingError:
    """A save that the run cannot end without has failed, and failed again."""
    message = f"{what} could not be written: {describe(error)}"
    if isinstance(error, MemoryError):
        return TrainingError(Reason.HOST_OUT_OF_MEMORY, message, "End other programs on the host, then resume.")
    hint = (
        "Free space, or point checkpoint.save_dir at a larger disk, then resume."
        if error.errno in NO_SPACE_ERRNOS
        else "Make the directory writable, or choose another checkpoint.save_dir, then resume."
    )
    return TrainingError(Reason.DISK_FULL, message, hint)


def describe(error: OSError | MemoryError) -> str:
    """``No space left on device (/a/b)``."""
    if isinstance(error, MemoryError):
        return "the host is out of memory"
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or type(error).__name__}{place}"


def out_of_memory(
    error: BaseException, *, rank: int, step: int, training: TrainingSpec, peak_bytes: int | None = None
) -> TrainingError | None:
    """The failure behind an exception that says there was not enough memory; None for any other exception.

    ``step`` is the last one that was done, ``peak_bytes`` the most memory the rank has had.
    """
    if not _is_out_of_memory(error):
        return None
    said = " ".join(str(error).split())[:300]
    rows = training.batch_size
    message = f"out of memory on rank {rank} in step {step + 1} with {rows} rows in a micro-batch: {said}"
    return TrainingError(Reason.OUT_OF_MEMORY, message, _memory_hint(training), rank, peak_bytes)


def cannot_compile(error: BaseException) -> TrainingError | None:
    """The failure behind an exception of torch's compiler; None for any other exception."""
    if not type(error).__module__.startswith(COMPILER):
        return None
    said = " ".join(str(error).split())[:300]
    message = f"training.use_compile: the model cannot be compiled here: {said}"
    # The class of the real cause is often only named in the text of the one that is raised.
    missing = any(name in f"{type(error).__name__} {said}" for name in ("InvalidCxxCompiler", "C++ compiler"))
    need = "A C++ compiler is missing: install one (Debian: apt-get install g++), or name it in CXX. Or set"
    hint = f"{need if missing else 'Set'} training.use_compile to false: the run is slower and otherwise the same."
    return TrainingError(Reason.SPEC_INVALID, message, hint)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises its own class on CUDA and a plain RuntimeError on a CPU.
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))


def _memory_hint(training: TrainingSpec) -> str:
    smaller = training.smaller_batch()
    if smaller is None:
        return "One row is too much already: lower data.max_seq_len or the model's size, or use more memory."
    rows, micro_batches = smaller
    return (
        f"Set training.batch_size to {rows} and training.accumulation_steps to {micro_batches}: "
        f"the result is the same, with 1/{training.batch_size // rows} of the memory of activations."
    )
