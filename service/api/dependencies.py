"""What the routes work with, made once when the app is."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Request

from trainyard.service.auth.authenticator import Gatekeeper
from trainyard.service.db.engine import Database
from trainyard.service.devices.inventory import Inventory
from trainyard.service.jobs.submission import Host
from trainyard.service.leadership import LeaderWatch
from trainyard.service.logs.line_index import Lines
from trainyard.service.maintenance.disk_monitor import DiskWatch
from trainyard.service.observability.prometheus import Telemetry
from trainyard.service.scheduler.loop import Scheduler
from trainyard.service.settings import Settings
from trainyard.service.streams.broadcaster import Pulse
from trainyard.service.webhooks.sender import Sender


@dataclass(frozen=True)
class Services:
    """The parts of a running service."""

    settings: Settings
    database: Database
    inventory: Inventory
    scheduler: Scheduler
    pulse: Pulse
    sender: Sender
    telemetry: Telemetry = field(default_factory=Telemetry)
    lines: Lines = field(default_factory=Lines)

    @cached_property
    def disks(self) -> DiskWatch:
        """How full the disks are."""
        return DiskWatch.of(self.settings)

    @cached_property
    def leader(self) -> LeaderWatch:
        """Whether the service that schedules goes on, where that is another one."""
        return LeaderWatch()

    @cached_property
    def gatekeeper(self) -> Gatekeeper:
        """Knows the tokens."""
        return Gatekeeper(self.settings, self.database)

    @property
    def host(self) -> Host:
        """What a spec is held against."""
        return Host(self.settings, self.inventory.devices())


# A coroutine: a plain function would be sent to a thread and back, for one attribute.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesNeeded = Annotated[Services, Depends(_services)]
"""A route's handle on the service."""
