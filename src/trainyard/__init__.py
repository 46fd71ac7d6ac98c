"""The Python API of Trainyard: `Client`, `JobSpec`, the client's errors and `__version__`.

Each name is imported at its first use, because the agent of a run also imports `trainyard` and must not load httpx2.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.client.api import Client
    from trainyard.client.errors import (
        AmbiguousName,
        ApiError,
        ChecksumMismatch,
        InvalidSpec,
        InvalidState,
        InvalidUrl,
        NotAuthorised,
        NotFound,
        ServiceUnreachable,
        TrainyardError,
        UnexpectedStatus,
        WaitTimedOut,
    )
    from trainyard.contract.spec import JobSpec

    __version__: str

__all__ = [
    "AmbiguousName",
    "ApiError",
    "ChecksumMismatch",
    "Client",
    "InvalidSpec",
    "InvalidState",
    "InvalidUrl",
    "JobSpec",
    "NotAuthorised",
    "NotFound",
    "ServiceUnreachable",
    "TrainyardError",
    "UnexpectedStatus",
    "WaitTimedOut",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trainyard' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("trainyard")
    modules = {"Client": "trainyard.client.api", "JobSpec": "trainyard.contract.spec"}
    return getattr(import_module(modules.get(name, "trainyard.client.errors")), name)


def __dir__() -> list[str]:
    return __all__
