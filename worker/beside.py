"""Work that runs beside the training thread: one piece at a time, and whoever waits for it gets what it raised."""

import threading
from collections.abc import Callable


class Beside:
    """At most one piece of work. All methods are called by one thread, the training thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether waiting would take time."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, work: Callable[[], None]) -> None:
        """Start ``work`` and return at once. What was begun before must have been waited for."""
        assert self._thread is None, f"{self._name} is busy"
        # A daemon: an interpreter that ends in spite of us does not hang here. Whoever ends in order waits first.
        self._thread = threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is running; raises what the work raised."""
        self.join()
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def join(self) -> None:
        """Return once nothing is running, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._raised = error
