"""A gate that delays the optimizer's update while a thread or a stream still reads the weights."""

import threading
import time
from typing import Any

import torch


class UpdateGate:
    """Delays updates while it is closed. ``blocked_seconds``: total time for which updates have waited on the host.

    Only the optimizer's update changes weights and moments, so they can be read during the forward and backward passes
    before it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.blocked_seconds = 0.0
        self._device = device
        self._is_open = threading.Event()
        self._is_open.set()
        self._event: Any = None
        self._hook = optimizer.register_step_pre_hook(self._delay)

    def close(self) -> None:
        """Make updates wait on the host until `open`."""
        self._is_open.clear()

    def close_until(self, event: Any) -> None:
        """Make updates wait on the device for ``event``, a CUDA event."""
        self._event = event

    def open(self) -> None:
        self._is_open.set()

    def remove(self) -> None:
        """Remove the gate from the optimizer."""
        self._hook.remove()

    def _delay(self, *_: object) -> None:
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        elif not self._is_open.is_set():
            start = time.perf_counter()
            self._is_open.wait()
            self.blocked_seconds += time.perf_counter() - start
