"""What the routes work with, made once when the app is."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.db import Database
from service.devices.inventory import Inventory
from service.jobs.lines import Lines
from service.jobs.specs import Host
from service.scheduler.loop import Scheduler
from service.settings import Settings
from service.streams.pulse import Pulse
from service.telemetry import Telemetry


@dataclass(frozen=True)
class Services:
    """The parts of a running service."""

    settings: Settings
    database: Database
    inventory: Inventory
    scheduler: Scheduler
    pulse: Pulse
    telemetry: Telemetry = field(default_factory=Telemetry)
    lines: Lines = field(default_factory=Lines)

    @property
    def host(self) -> Host:
        """What a spec is held against."""
        return Host(self.settings, self.inventory.devices())


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesNeeded = Annotated[Services, Depends(_services)]
"""A route's handle on the service."""
