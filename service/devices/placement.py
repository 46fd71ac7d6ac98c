"""The choice of GPUs for a job of several ranks: near each other, so that gradients are exchanged fast. Pure."""

from collections.abc import Iterable, Sequence

from trainyard.service.devices.inventory import Device

NVLINK, SAME_NODE, FAR = 0, 1, 2

MAX_GPUS = 64
"""With more free GPUs than this, distances are not compared. No host has so many."""


def has_neighbours(device: Device) -> bool:
    """Return whether the NUMA node or the NVLinks of the device are known."""
    return device.numa_node is not None or bool(device.nvlink_peers)


def distance(one: Device, other: Device) -> int:
    """Return 0 for GPUs with an NVLink between them, 1 on one NUMA node, else 2."""
    if other.id in one.nvlink_peers:
        return NVLINK
    return SAME_NODE if one.numa_node is not None and one.numa_node == other.numa_node else FAR


def choose(free: Sequence[Device], count: int) -> tuple[str, ...]:
    """Return the ids of ``count`` of the ``free`` devices, in their order: the group with the shortest distances.

    If several groups are equally good, the one that separates the fewest neighbours is chosen, so that a job with one
    rank does not take a GPU from a free pair. ``free`` has at least ``count`` devices.
    """
    if count >= len(free) or len(free) > MAX_GPUS or not any(map(has_neighbours, free)):
        return tuple(device.id for device in free[:count])
    # Greedy from each start: exact for the islands that hosts have, and quick with any number of GPUs.
    groups = {tuple(sorted(_grow(free, start, count))) for start in range(len(free))}
    best = min(groups, key=lambda group: (_inner(free, group), -_cut(free, group), group))
    return tuple(free[index].id for index in best)


def _grow(free: Sequence[Device], start: int, count: int) -> list[int]:
    group = [start]
    added = {index: distance(free[index], free[start]) for index in range(len(free)) if index != start}
    while len(group) < count:
        nearest = min(added, key=lambda index: (added[index], index))
        del added[nearest]
        group.append(nearest)
        for index in added:
            added[index] += distance(free[index], free[nearest])
    return group


def _inner(free: Sequence[Device], group: Sequence[int]) -> int:
    return sum(distance(free[one], free[other]) for one in group for other in group if one < other)


def _cut(free: Sequence[Device], group: Iterable[int]) -> int:
    chosen = set(group)
    rest = [index for index in range(len(free)) if index not in chosen]
    return sum(distance(free[one], free[other]) - FAR for one in chosen for other in rest)
