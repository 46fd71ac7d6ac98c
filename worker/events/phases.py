"""The phase of an attempt, such as `training` or `saving`. The agent gives every phase but `training` more time."""

import contextlib
import time
from collections.abc import Callable, Iterator

from trainyard.contract.events import Event, PhaseChanged
from trainyard.contract.status import Phase


class PhaseReporter:
    """Emits the phase of this attempt if it changes.

    Only `training` has the short budget ``timeouts.progress``, so everything else that may take long runs `during`
    another phase.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self.current: Phase | None = None
        self._emit = emit
        self._training_seconds = 0.0
        self._entered_at = time.monotonic()

    def enter(self, phase: Phase) -> None:
        if phase is not self.current:
            self._training_seconds, self._entered_at = self.training_seconds, time.monotonic()
            self.current = phase
            self._emit(PhaseChanged(phase=phase))

    @property
    def training_seconds(self) -> float:
        """Seconds that this attempt was in phase `training` until now."""
        now = time.monotonic() - self._entered_at if self.current is Phase.TRAINING else 0.0
        return self._training_seconds + now

    def report(self, message: str | None = None, done: int | None = None, total: int | None = None) -> None:
        """Emit the progress of the current phase; without arguments, clear it."""
        self._emit(PhaseChanged(phase=self.current or Phase.TRAINING, message=message, done=done, total=total))

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Enter ``phase``, and return to the current one after the block. After an exception the phase stays."""
        before = self.current or phase
        self.enter(phase)
        yield
        self.enter(before)

    @contextlib.contextmanager
    def report_compilation(self) -> Iterator[None]:
        """Enter `compiling` whenever torch's compiler works within the block: also for a shape that it has not seen."""
        from torch._dynamo.callback import callback_handler

        before: list[Phase] = []

        def start(_: object) -> None:
            before.append(self.current or Phase.COMPILING)
            self.enter(Phase.COMPILING)

        def end(_: object) -> None:
            self.enter(before.pop())

        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(start)
            callback_handler.remove_end_callback(end)
