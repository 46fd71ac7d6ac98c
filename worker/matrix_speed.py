"""Measure the speed of matrix products for about a second: ``python -m trainyard.worker.matrix_speed cpu bfloat16``.

Prints FLOP/s. The service runs it once per kind of device and type, for estimates of time without an earlier run.
"""

import sys
import time

import torch

SECONDS = 1.0
SIZES = {"cpu": 768, "cuda": 4096}
"""Rows and columns of the matrices. In products of this size the time of the start of a kernel does not matter."""


def measure(device: str, dtype: str, seconds: float = SECONDS) -> float:
    """Return FLOP/s of products of two square matrices, measured for ``seconds``."""
    place = torch.device(device)
    size = SIZES[place.type]
    left, right = (torch.ones(size, size, dtype=getattr(torch, dtype), device=place) for _ in range(2))
    torch.mm(left, right)  # the first product also loads the library
    products, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        torch.mm(left, right)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        products += 1
    return 2.0 * size**3 * products / passed


if __name__ == "__main__":
    print(measure(sys.argv[1], sys.argv[2]))
