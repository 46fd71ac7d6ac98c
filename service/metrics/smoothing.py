"""Smooth a curve without lag: at each step, the line that fits the points around it best. Pure.

The weight of a point is a Gaussian of its distance in steps. A weighted mean alone would lag at the ends of the curve,
where all points are on one side: on a falling loss it is above the newest points. A straight line through the points
(local linear regression) has no such bias: a curve that falls evenly is reproduced up to its last step. Half of the
points would make it twice as noisy there, so at the newest end the kernel is twice as wide.

Only steps count, not pixels, buckets or the log interval, so the line is the same at every zoom. To keep long runs
fast, the points are summed in cells, which are narrow compared with the kernel and start at multiples of their width.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import mul
from typing import NamedTuple

from trainyard.service.metrics.downsampling import Aggregate

REACH = 4.0
"""Points that are farther away than so many widths have no weight."""

MIN_WIDTH = 1e-3
"""A narrower kernel gives the same values, those of single steps. The fit divides by its square, which may be 0."""

CELLS_PER_WIDTH = 3
MAX_AUTO_WIDTH = 1000


class Cell(NamedTuple):
    """The finite points of a few adjacent steps. ``middle``: the step that represents them."""

    middle: float
    first_step: int
    last_step: int
    points: int
    loss_sum: float


def auto_width(last_step: int) -> float:
    """Return the default width of the kernel in steps for a curve that ends at ``last_step``: about 1 % of it.

    It is 1, 2 or 5 times a power of ten, so that it seldom changes while the run grows.
    """
    wanted = min(last_step / 100, MAX_AUTO_WIDTH)
    series = (digit * 10.0**power for power in range(4) for digit in (1, 2, 5))
    return max((width for width in series if width <= wanted), default=1.0)


def cell_width(width: float) -> int:
    """Return the width of the cells in steps for a kernel of ``width``: a power of two, at most a third of it."""
    return 1 << max(0, int(math.log2(max(1.0, width / CELLS_PER_WIDTH))))


def width_at(step: int, last_step: int, width: float) -> float:
    """Return the width of the kernel at ``step``: it doubles over the last two widths of the curve."""
    return width * (1 + max(0.0, 1 - (last_step - step) / (2 * width)))


def covered_ranges(steps: Sequence[int], width: float, last_step: int) -> list[tuple[int, int]]:
    """Return the ranges of steps, first and last, that the smoothed values at ``steps`` depend on: whole cells.

    ``steps`` are in order; ``last_step`` is the last one of the whole curve. The steps of a whole run are far
    apart, so that a narrow kernel needs few of the points.
    """
    cell = cell_width(width)
    ranges: list[tuple[int, int]] = []
    for step in steps:
        reach = math.ceil(REACH * width_at(step, last_step, width))
        first, last = max(0, step - reach) // cell * cell, ((step + reach) // cell + 1) * cell - 1
        if ranges and first <= ranges[-1][1] + 1:
            first = ranges.pop()[0]
        ranges.append((first, last))
    return ranges


def to_cells(aggregates: Iterable[Aggregate], width: float) -> list[Cell]:
    """Return the cells of aggregates, which are in step order, and none wider than a cell. ``width``: of the kernel."""
    cell, cells = cell_width(width), []
    for _, group in groupby(aggregates, key=lambda part: part.step // cell):
        parts = [part for part in group if part.finite_step is not None]
        if parts:
            first, last = parts[0].first_step, parts[-1].finite_step or 0
            count = sum(part.points - part.nonfinite for part in parts)
            cells.append(Cell((first + last) / 2, first, last, count, math.fsum(part.loss_sum for part in parts)))
    return cells


def smooth(cells: Sequence[Cell], steps: Iterable[int], width: float, last_step: int) -> list[float | None]:
    """Return the smoothed loss at each of ``steps``; None if no point is near.

    ``width``: of the Gaussian, in steps. ``last_step``: of the whole curve, also if ``cells`` are only a part of it.
    """
    middles = [cell.middle for cell in cells]
    points = [float(cell.points) for cell in cells]
    sums = [cell.loss_sum for cell in cells]
    values: list[float | None] = []
    for step in steps:
        own = max(MIN_WIDTH, width_at(step, last_step, width))
        first, end = bisect_left(middles, step - REACH * own), bisect_right(middles, step + REACH * own)
        if first == end:
            values.append(None)
            continue
        # Not beyond the points: the line may be steep there.
        at = min(max(step, cells[first].first_step), cells[end - 1].last_step)
        distances = [middle - at for middle in middles[first:end]]
        values.append(_fit(distances, points[first:end], sums[first:end], own))
    return values


def _fit(distances: Sequence[float], points: Sequence[float], sums: Sequence[float], width: float) -> float:
    """Return the value at distance 0 of the line that fits the cells best, given by their points and loss sums."""
    exp, scale = math.exp, -0.5 / (width * width)
    kernel = [exp(scale * distance * distance) for distance in distances]
    # Sums of products by `map`: a loop over the cells takes twice as long.
    weights: list[float] = list(map(mul, kernel, points))
    values: list[float] = list(map(mul, kernel, sums))
    moments: list[float] = list(map(mul, weights, distances))
    weight, value, moment = sum(weights), sum(values), sum(moments)
    square: float = sum(map(mul, moments, distances))
    product: float = sum(map(mul, values, distances))
    spread = weight * square - moment * moment
    if spread <= 1e-9 * (weight * width) ** 2:
        return value / weight  # A single cell has no slope.
    return (square * value - moment * product) / spread
