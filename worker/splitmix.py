"""SplitMix64, a mixing function: neighbouring inputs give unrelated outputs.

Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

import numpy as np
import numpy.typing as npt

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment. Multiply small counting numbers by it before mixing: its multiples are far apart."""


def splitmix64(numbers: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Return a well-mixed 64-bit function of each number plus ``key``, modulo 2 ** 64."""
    x = numbers + np.uint64(key & (2**64 - 1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
