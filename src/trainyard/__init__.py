"""Trainyard's Python API: `Client`, `JobSpec`, the client's errors and the version.

Names are loaded when they are first used: the agent of a run imports `trainyard` too and must stay free of pydantic and httpx2.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.client.api import Trainyard as Client
    from trainyard.client.errors import (
        InvalidSpec,
        InvalidState,
        NotAuthorised,
        NotFound,
        Refused,
        ServiceUnreachable,
        TrainyardError,
        WaitTimedOut,
    )
    from trainyard.contract.spec import JobSpec

    __version__: str

__all__ = [
    "Client",
    "InvalidSpec",
    "InvalidState",
    "JobSpec",
    "NotAuthorised",
    "NotFound",
    "Refused",
    "ServiceUnreachable",
    "TrainyardError",
    "WaitTimedOut",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trainyard' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("trainyard")
    if name == "Client":
        return import_module("trainyard.client.api").Trainyard
    module = "trainyard.contract.spec" if name == "JobSpec" else "trainyard.client.errors"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
