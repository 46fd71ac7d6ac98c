"""Offsets of parameters in a buffer in which each rank updates one region (``zero1``). Does not import torch."""

import heapq
from collections.abc import Sequence

ALIGNMENT = 64
"""Elements. A parameter starts at a multiple of 256 bytes, as if torch had allocated it."""


def element_offsets(sizes: Sequence[int], world: int) -> tuple[list[int], int]:
    """Return offsets for parameters of ``sizes`` elements one after the other, and the size of a rank's region."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    region = -(-end // world)
    return offsets, -(-region // ALIGNMENT) * ALIGNMENT


def matrix_offsets(sizes: Sequence[int], world: int) -> tuple[list[int], int]:
    """Return the same for matrices, each of which must be in one region: Muon needs the whole gradient of a matrix.

    The largest matrix is placed first, each into the region with the fewest elements.
    """
    loads, placed = [(0, rank) for rank in range(world)], [(0, 0)] * len(sizes)  # a heap
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        load, rank = loads[0]
        placed[index] = (rank, load)
        heapq.heapreplace(loads, (load + -(-sizes[index] // ALIGNMENT) * ALIGNMENT, rank))
    region = max(loads)[0]
    return [rank * region + start for rank, start in placed], region
