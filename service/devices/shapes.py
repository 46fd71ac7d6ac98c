"""What the API answers of devices."""

from typing import Literal

from pydantic import Field

from trainyard.service.shapes import Shape


class LeasedDevice(Shape):
    """A device, who has it, and processes on it that belong to no attempt."""

    object: Literal["device"] = "device"
    id: str
    kind: str
    model: str | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    temperature_celsius: int | None = None
    job_id: str | None
    attempt_id: str | None
    processes: list[int] = Field(default_factory=list)
