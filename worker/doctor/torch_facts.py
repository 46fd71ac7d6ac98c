"""Facts about torch and its devices: ``python -m trainyard.worker.doctor.torch_facts`` prints them as JSON.

It runs in a separate process, because a broken driver may hang or kill the process that calls it.
"""

import json
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SECONDS = 0.25
"""Time of one measurement of a type. The types are measured in turns, so that a slow moment affects all of them."""

ROUNDS = 3


def torch_facts() -> dict[str, Any]:
    """Return the facts. Raises ImportError or OSError if torch cannot be loaded."""
    import torch
    import torch.distributed as dist

    from trainyard.worker.cuda_errors import short_cuda_error
    from trainyard.worker.distributed import cuda_problem

    # Each call may fail if a GPU is listed but does not work.
    cuda_error, cards, products = cuda_problem() if torch.version.cuda else None, [], {"cpu": product_speeds("cpu")}
    if torch.cuda.is_available() and cuda_error is None:
        try:
            cards = [_card(index) for index in range(torch.cuda.device_count())]
            products["cuda"] = product_speeds("cuda")
        except RuntimeError as error:
            cuda_error = short_cuda_error(str(error))
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda_available": bool(products.get("cuda")),
        "cuda_error": cuda_error,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": _nccl_version(),
        "triton": _triton_version(),
        "cards": cards,
        "products": products,
    }


def product_speeds(device: str) -> dict[str, float]:
    """Return FLOP/s of matrix products in float32 and bfloat16, each the median of `ROUNDS` measurements."""
    from trainyard.worker.matrix_speed import measure

    found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _ in range(ROUNDS):
        for dtype, speeds in found.items():
            speeds.append(measure(device, dtype, SECONDS))
    return {dtype: statistics.median(speeds) for dtype, speeds in found.items()}


def _card(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "capability": properties.major, "memory_bytes": properties.total_memory}


def _nccl_version() -> str | None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    began = time.perf_counter()
    facts = torch_facts()
    json.dump({**facts, "seconds": time.perf_counter() - began}, sys.stdout)
