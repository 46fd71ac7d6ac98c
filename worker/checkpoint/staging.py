"""A copy of model and optimizer in host memory, of exactly one step: what a save writes while training goes on."""

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
    """What a save writes: a state dict whose tied names share memory, and tensors named as in `optimizer_tensors`."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    @classmethod
    def live(cls, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> "StateDicts":
        """No copy at all, but what training works on: good only while nobody trains."""
        return cls(model.state_dict(), optimizer_tensors(model, optimizer))


class StagingBuffers:
    """Host buffers, made at the first save and used again by every later one.

    Weights and moments change in the optimizer's update and nowhere else, so they are copied during the forward and
    backward passes that follow, and only an update that comes sooner than the copy's end waits for it. On a CPU the
    writing thread copies; on CUDA the device does, on a stream of its own and into pinned memory, and the update waits
    on the device. ``held`` counts the seconds that updates have waited on the host.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.held = 0.0
        self._model = model
        self._optimizer = optimizer
        self._buffers: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._copied = threading.Event()
        self._copied.set()
        self._device = next(model.parameters()).device
        cuda: Any = torch.cuda  # its streams and events are unannotated
        self._stream: Any = cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._filled: Any = None
        self._hook = optimizer.register_step_pre_hook(self._delay_update)

    def stage(self) -> StateDicts:
        """The copies of everything as it is now; they hold once `fill` has returned, and until the next `take`.

        Somebody must call `fill`, or the next update waits for ever. Raises MemoryError, or RuntimeError as torch does,
        where there is no room.
        """
        live = StateDicts.live(self._model, self._optimizer)
        self._pairs, weights = [], {}
        for names in shared_names(live.model):
            weights.update(dict.fromkeys(names, self._buffer(f"model.{names[0]}", live.model[names[0]])))
        moments = {name: self._buffer(f"optimizer.{name}", tensor) for name, tensor in live.optimizer.items()}
        if self._stream is not None:
            self._begin_on_device()
        else:
            self._copied.clear()
        return StateDicts({name: weights[name] for name in live.model}, moments)

    def release(self) -> None:
        """Let go of the optimizer, and of the buffers with it: there was no room for all of them."""
        self._hook.remove()
        self._buffers, self._pairs = {}, []

    def fill(self) -> None:
        """Return once the copies are there. Called by the thread that writes them."""
        if self._filled is not None:
            self._filled.synchronize()
            return
        try:
            for buffer, tensor in self._pairs:
                # By numpy, one thread and without Python's lock: torch would take all cores away from training.
                np.copyto(_bytes(buffer), _bytes(tensor))
        finally:
            self._copied.set()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        self._pairs.append((self._buffers[name], tensor.detach()))
        return self._buffers[name]

    def _begin_on_device(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for buffer, tensor in self._pairs:
                buffer.copy_(tensor, non_blocking=True)
        self._filled = self._stream.record_event()

    def _delay_update(self, *_: object) -> None:
        if self._filled is not None:
            torch.cuda.current_stream(self._device).wait_event(self._filled)
        elif not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self.held += time.perf_counter() - began


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The tensor's memory, where it is contiguous."""
    found: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found
