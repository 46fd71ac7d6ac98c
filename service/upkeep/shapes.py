"""What the API answers of the service itself."""

from typing import Literal

from trainyard.service.shapes import Shape


class ReadyPart(Shape):
    """Something the service needs to work, and how it is."""

    name: str
    ok: bool
    detail: str


class Readiness(Shape):
    """The service can take work."""

    status: Literal["ok"] = "ok"
    parts: list[ReadyPart]


class DiskUsage(Shape):
    """A file system that the service writes to. ``state``: ok, low (below ``low_below_bytes``), full or unreadable."""

    id: str
    paths: list[str]
    state: str
    total_bytes: int | None
    free_bytes: int | None
    low_below_bytes: int | None


class ServiceStatus(Shape):
    """How the service itself is. ``schedules``: whether it is the one that does."""

    object: Literal["status"] = "status"
    ready: bool
    schedules: bool
    parts: list[ReadyPart]
    disks: list[DiskUsage]
