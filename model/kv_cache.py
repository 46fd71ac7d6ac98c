"""Caches of keys and values for generation: for one batch of equal lengths, and for rows that are added and removed.

Legend: ``B`` rows, ``K`` key-value heads, ``S`` positions, ``D`` head size.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainyard.model.config import ModelConfig

POSITIONS_STEP = 64
"""Capacities of `BatchKVCache` are multiples of this."""


class LayerCache(Protocol):
    """Keys and values of one layer."""

    def append(self, length: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``keys`` and ``values`` [B, K, S, D] after ``length`` positions; return all, [B, K, ..., D]."""


class Cache(Protocol):
    """Keys and values of all layers."""

    @property
    def layers(self) -> "list[LayerCache]":
        """Return the cache of each layer."""

    @property
    def length(self) -> int:
        """Return the number of filled positions."""

    def advance(self, positions: int) -> None:
        """Count ``positions`` that all layers have appended."""


class LayerKVCache(NamedTuple):
    """Keys and values of one layer, [B, K, capacity, D]; the first ``length`` positions are filled."""

    keys: Tensor
    values: Tensor

    def append(self, length: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``keys`` and ``values`` [B, K, S, D] after ``length`` positions; return all [B, K, length + S, D]."""
        end = length + keys.shape[2]
        self.keys[:, :, length:end] = keys
        self.values[:, :, length:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class KVCache:
    """Keys and values of all layers, for one batch of prompts. The first ``length`` positions are filled."""

    layers: list[LayerCache]
    buffer: Tensor
    """[layers, 2, B, K, capacity, D]: keys and values."""
    length: int = field(default=0)

    @classmethod
    def empty(
        cls, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        """Allocate ``capacity`` positions of ``rows`` rows."""
        buffer = _buffer(config, rows, capacity, dtype, device)
        return cls([LayerKVCache(*pair.unbind()) for pair in buffer.unbind()], buffer)

    def advance(self, positions: int) -> None:
        """Count ``positions`` that all layers have appended."""
        self.length += positions


class RaggedLayerKVCache(NamedTuple):
    """Keys and values of one layer, [B, K, keys, D], and the next position of each row, [B]."""

    keys: Tensor
    values: Tensor
    next_position: Tensor

    def append(self, length: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - of one length
        """Write one position of each row, [B, K, 1, D]; return all, [B, K, keys, D], also those not filled yet."""
        rows = torch.arange(len(self.next_position), device=keys.device)
        self.keys[rows, :, self.next_position] = keys[:, :, 0]
        self.values[rows, :, self.next_position] = values[:, :, 0]
        return self.keys, self.values


class BatchKVCache:
    """Keys and values of rows of different lengths, which get one position each at a time.

    Rows can be added and removed. The buffer grows as needed, and is freed with the last row.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._buffer: Tensor | None = None
        self.lengths: list[int] = []

    @property
    def capacity(self) -> int:
        """Positions of each row in the buffer."""
        return 0 if self._buffer is None else self._buffer.shape[4]

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return max(self.lengths, default=0)

    @property
    def layers(self) -> list[LayerCache]:
        """The caches of the layers, for the next position of each row."""
        assert self._buffer is not None
        rows, end = len(self.lengths), self.length + 1
        position = torch.tensor(self.lengths, device=self._device)
        used = self._buffer[:, :, :rows, :, :end]
        return [
            RaggedLayerKVCache(keys, values, position) for keys, values in (pair.unbind() for pair in used.unbind())
        ]

    def advance(self, positions: int) -> None:
        """Count ``positions`` that all layers have appended to each row."""
        self.lengths = [length + positions for length in self.lengths]

    def add(self, prompt: KVCache, capacity: int) -> None:
        """Add a row with the positions of ``prompt``, a cache of one row, and room for ``capacity`` positions."""
        row = len(self.lengths)
        buffer = self._grown(row + 1, capacity)
        buffer[:, :, row, :, : prompt.length] = prompt.buffer[:, :, 0, :, : prompt.length]
        self.lengths.append(prompt.length)

    def remove(self, row: int) -> None:
        """Remove a row. The last row takes its place."""
        last = len(self.lengths) - 1
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self._buffer = None
        elif row != last:
            assert self._buffer is not None
            self._buffer[:, :, row] = self._buffer[:, :, last]

    def _grown(self, rows: int, capacity: int) -> Tensor:
        old = self._buffer
        if old is None:
            self._buffer = self._allocate(rows, capacity)
        elif rows > old.shape[2] or capacity > old.shape[4]:
            # Twice the rows, so that adding a row seldom copies the others.
            self._buffer = self._allocate(max(rows, min(2 * old.shape[2], 2 * rows)), max(capacity, old.shape[4]))
            kept = (slice(None), slice(None), slice(len(self.lengths)), slice(None), slice(self.length))
            self._buffer[kept] = old[kept]
        assert self._buffer is not None
        return self._buffer

    def _allocate(self, rows: int, capacity: int) -> Tensor:
        return _buffer(self._config, rows, -(-capacity // POSITIONS_STEP) * POSITIONS_STEP, self._dtype, self._device)


def bytes_per_position(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the size of the keys and values of one position of one row."""
    assert config.head_dim is not None
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def _buffer(config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    assert config.head_dim is not None
    shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, capacity, config.head_dim)
    # Zeros: keys after the end of a row are masked, but 0 times NaN is NaN.
    return torch.zeros(shape, dtype=dtype, device=device)
