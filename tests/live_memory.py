"""The memory of tensors: exact, on any device, and without the allocator's."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class is not annotated
    """Bytes of all storages that are given or that operations make, while they are alive. ``peak``: their highest sum.

    Their sizes are read after each operation, because FSDP frees storages by resizing them.
    """

    def __init__(self, given: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in given:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self._storages = {key: storage for key, storage in self._storages.items() if storage() is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for each in self._storages.values() if (storage := each())))
        return found

    def _add(self, tensor: torch.Tensor) -> None:
        local = getattr(tensor, "_local_tensor", tensor)
        storage = local.untyped_storage()
        self._storages.setdefault(storage._cdata, weakref.ref(storage))  # noqa: SLF001
