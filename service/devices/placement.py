"""The choice of GPUs for a job of several ranks: near each other, so that gradients are exchanged fast. Pure."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb

from trainyard.service.devices.inventory import Device

NVLINK, SAME_NODE, FAR, UNLIKE = 0, 1, 2, 3

NEARNESS = (2, 1, 0, 0)
"""What is lost if a group separates two GPUs, by their distance. Nothing for unlike GPUs: a job with one rank must not
get the only GPU of its model for this reason, which may be that of the display."""

MAX_GPUS = 64
"""With more free GPUs than this, distances are not compared. No host has so many."""

MAX_GROUPS = 100
"""All groups are compared if there are no more than these. Otherwise one group is compared for each free GPU."""


def differ(devices: Sequence[Device]) -> bool:
    """Return whether it matters which of the devices a job gets: some are near each other, or GPUs are unlike."""
    if len({device.model for device in devices if device.kind == "cuda"}) > 1:
        return True
    return any(device.numa_node is not None or device.nvlink_peers for device in devices)


def distance(one: Device, other: Device) -> int:
    """Return 0 for GPUs with an NVLink between them, 1 on one NUMA node, 3 for unlike GPUs, else 2.

    A run on unlike GPUs is as slow as the slowest, and their weights cannot be compared at saves.
    """
    if one.model != other.model:
        return UNLIKE
    if other.id in one.nvlink_peers:
        return NVLINK
    return SAME_NODE if one.numa_node is not None and one.numa_node == other.numa_node else FAR


def choose(free: Sequence[Device], count: int) -> tuple[str, ...]:
    """Return the ids of ``count`` of the ``free`` devices, in their order: the group with the shortest distances.

    If several groups are equally good, the one that separates the fewest neighbours is chosen, so that a job with one
    rank does not take a GPU from a free pair. ``free`` has at least ``count`` devices.
    """
    if count >= len(free) or len(free) > MAX_GPUS or not differ(free):
        return tuple(device.id for device in free[:count])
    between = [[distance(one, other) for other in free] for one in free]
    groups: Iterable[tuple[int, ...]]
    if comb(len(free), count) <= MAX_GROUPS:
        groups = combinations(range(len(free)), count)
    else:
        groups = {tuple(sorted(_grow(between, start, count))) for start in range(len(free))}
    best = min(groups, key=lambda group: (_inner(between, group), _separated(between, group), group))
    return tuple(free[index].id for index in best)


def _grow(between: Sequence[Sequence[int]], start: int, count: int) -> list[int]:
    """Return a group that begins with ``start`` and takes the nearest device each time.

    Of devices that are equally near, it takes the one with the most neighbours, which the next steps take; for the last
    place the one with the fewest.
    """
    group = [start]
    added = {index: between[index][start] for index in range(len(between)) if index != start}
    neighbours = {index: sum(NEARNESS[between[index][other]] for other in added if other != index) for index in added}
    while len(group) < count:
        sign = 1 if len(group) == count - 1 else -1
        _, _, nearest = min((total, sign * neighbours[index], index) for index, total in added.items())
        del added[nearest]
        group.append(nearest)
        for index in added:
            added[index] += between[index][nearest]
            neighbours[index] -= NEARNESS[between[index][nearest]]
    return group


def _inner(between: Sequence[Sequence[int]], group: Sequence[int]) -> int:
    return sum(between[one][other] for one in group for other in group if one < other)


def _separated(between: Sequence[Sequence[int]], group: Sequence[int]) -> int:
    rest = set(range(len(between))) - set(group)
    return sum(NEARNESS[between[one][other]] for one in group for other in rest)
