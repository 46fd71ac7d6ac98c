"""Staging: a copy of model and optimizer of exactly one step, in host memory, to be saved while training continues."""

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainyard.worker.checkpoint.files import optimizer_tensors, shared_names


class StateDicts(NamedTuple):
    """What a save writes: the model's state dict, and the optimizer's tensors named as by `optimizer_tensors`."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    @classmethod
    def live(cls, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> "StateDicts":
        """Return the live tensors, not a copy. Valid only while no step is running."""
        return cls(model.state_dict(), optimizer_tensors(model, optimizer))


class StagingBuffers:
    """Host buffers, allocated at the first save and reused by every later one.

    Only the optimizer's update changes weights and moments. So they are copied during the forward and backward passes
    that follow, and the next update waits if the copy is not complete by then. On a CPU the writer thread copies. On
    CUDA the device copies into pinned memory, on a stream of its own, and the update waits on the device.
    ``blocked_seconds``: how long updates have waited on the host.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.blocked_seconds = 0.0
        self._model = model
        self._optimizer = optimizer
        self._buffers: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._copied = threading.Event()
        self._copied.set()
        self._device = next(model.parameters()).device
        cuda: Any = torch.cuda  # its streams and events are unannotated
        self._stream: Any = cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._copy_event: Any = None
        self._hook = optimizer.register_step_pre_hook(self._delay_update)

    def stage(self) -> StateDicts:
        """Start copying the current step. The copies are valid after `fill` has returned, until the next `stage`.

        `fill` must be called, or the next update waits for ever. Raises MemoryError, or torch's RuntimeError, if there
        is not enough memory.
        """
        live = StateDicts.live(self._model, self._optimizer)
        self._pairs, weights = [], {}
        for names in shared_names(live.model):
            weights.update(dict.fromkeys(names, self._buffer(f"model.{names[0]}", live.model[names[0]])))
        moments = {name: self._buffer(f"optimizer.{name}", tensor) for name, tensor in live.optimizer.items()}
        if self._stream is None:
            self._copied.clear()
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for buffer, tensor in self._pairs:
                    buffer.copy_(tensor, non_blocking=True)
            self._copy_event = self._stream.record_event()
        return StateDicts({name: weights[name] for name in live.model}, moments)

    def release(self) -> None:
        """Free the buffers and remove the hook from the optimizer."""
        self._hook.remove()
        self._buffers, self._pairs = {}, []

    def fill(self) -> None:
        """Complete the copies. Called by the writer thread."""
        if self._copy_event is not None:
            self._copy_event.synchronize()
            return
        try:
            for buffer, tensor in self._pairs:
                # numpy copies in one thread and releases the GIL; torch would take all cores away from training.
                np.copyto(_bytes(buffer), _bytes(tensor))
        finally:
            self._copied.set()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        self._pairs.append((self._buffers[name], tensor.detach()))
        return self._buffers[name]

    def _delay_update(self, *_: object) -> None:
        if self._copy_event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copy_event)
        elif not self._copied.is_set():
            start = time.perf_counter()
            self._copied.wait()
            self.blocked_seconds += time.perf_counter() - start


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    # Of a contiguous tensor this is its own memory, not a copy.
    memory: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memory
