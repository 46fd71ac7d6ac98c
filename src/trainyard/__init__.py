"""The Python API of Trainyard: `Client`, `AsyncClient`, their results and errors, `JobSpec` and `__version__`.

Each name is imported at its first use, because the agent of a run also imports `trainyard` and must not load httpx2.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.client.api import Client, Job
    from trainyard.client.async_client import AsyncClient, AsyncJob
    from trainyard.client.connection import RetryPolicy
    from trainyard.client.errors import (
        AmbiguousName,
        ApiError,
        ChecksumMismatch,
        FieldProblem,
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
    from trainyard.client.pages import AsyncPages, Pages
    from trainyard.client.sse import StreamEvent, StreamUnsupported
    from trainyard.contract.spec import JobSpec

    __version__: str

__all__ = [
    "AmbiguousName",
    "ApiError",
    "AsyncClient",
    "AsyncJob",
    "AsyncPages",
    "ChecksumMismatch",
    "Client",
    "FieldProblem",
    "InvalidSpec",
    "InvalidState",
    "InvalidUrl",
    "Job",
    "JobSpec",
    "NotAuthorised",
    "NotFound",
    "Pages",
    "RetryPolicy",
    "ServiceUnreachable",
    "StreamEvent",
    "StreamUnsupported",
    "TrainyardError",
    "UnexpectedStatus",
    "WaitTimedOut",
    "__version__",
]

MODULES = {
    "AsyncClient": "client.async_client",
    "AsyncJob": "client.async_client",
    "AsyncPages": "client.pages",
    "Client": "client.api",
    "Job": "client.api",
    "JobSpec": "contract.spec",
    "Pages": "client.pages",
    "RetryPolicy": "client.connection",
    "StreamEvent": "client.sse",
    "StreamUnsupported": "client.sse",
}
"""Name -> its module. All others are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trainyard' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("trainyard")
    return getattr(import_module(f"trainyard.{MODULES.get(name, 'client.errors')}"), name)


def __dir__() -> list[str]:
    return __all__
