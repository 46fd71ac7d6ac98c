"""The application state, created once, and the dependency by which routes get it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Request

from trainyard.contract.scopes import Scope
from trainyard.service import home
from trainyard.service.api.shared_reads import SharedReads
from trainyard.service.auth.authenticator import Authenticator
from trainyard.service.auth.principal import Principal
from trainyard.service.db.engine import Database
from trainyard.service.devices.inventory import Inventory
from trainyard.service.evaluations.runner import EvaluationRunner
from trainyard.service.generation.pool import GenerationPool
from trainyard.service.jobs.rendered import RenderedJobs
from trainyard.service.jobs.submission import HostLimits
from trainyard.service.leadership import LeaderMonitor
from trainyard.service.logs.line_index import LineIndexCache
from trainyard.service.maintenance.disk_monitor import DiskMonitor
from trainyard.service.observability.prometheus import ServiceMetrics
from trainyard.service.planning.matrix_speed import MatrixSpeed
from trainyard.service.scheduler.loop import Scheduler
from trainyard.service.settings import Settings
from trainyard.service.sidecars.sidecars import Sidecars
from trainyard.service.streams.broadcaster import MetricBroadcaster
from trainyard.service.webhooks.sender import Sender

MAX_EXPORTS = 4
"""Exports that run at once. Each takes minutes, and its process loads torch."""


@dataclass(frozen=True)
class AppState:
    """The parts of a running service."""

    settings: Settings
    database: Database
    inventory: Inventory
    scheduler: Scheduler
    broadcaster: MetricBroadcaster
    sender: Sender
    metrics: ServiceMetrics = field(default_factory=ServiceMetrics)
    rendered_jobs: RenderedJobs = field(default_factory=RenderedJobs)
    line_indexes: LineIndexCache = field(default_factory=LineIndexCache)
    matrix_speed: MatrixSpeed | None = None
    exports_stopping: threading.Event = field(default_factory=threading.Event)

    @cached_property
    def exports(self) -> ThreadPoolExecutor:
        """Threads for exports only. On the threads of requests, exports would block even the agents' reports."""
        return ThreadPoolExecutor(MAX_EXPORTS, thread_name_prefix="exports")

    @cached_property
    def disks(self) -> DiskMonitor:
        return DiskMonitor.of(self.settings)

    @cached_property
    def leader(self) -> LeaderMonitor:
        return LeaderMonitor()

    @cached_property
    def shared_reads(self) -> SharedReads:
        return SharedReads(self.database, lambda: self.scheduler.waiting_version)

    @cached_property
    def authenticator(self) -> Authenticator:
        return Authenticator(self.settings, self.database)

    @cached_property
    def service_key(self) -> bytes:
        return home.service_key(self.settings.home)

    @cached_property
    def sidecars(self) -> Sidecars:
        settings, scheduler = self.settings, self.scheduler
        roots = settings.readable_roots, settings.writable_roots
        schedules = lambda: scheduler.leads and scheduler.launches  # noqa: E731
        return Sidecars(self.database, self.inventory, settings.sidecar_threads, *roots, schedules)

    @cached_property
    def generation(self) -> GenerationPool:
        return GenerationPool(self.sidecars, self.settings)

    @cached_property
    def evaluations(self) -> EvaluationRunner:
        scheduler = self.scheduler
        leads = lambda: scheduler.leads and scheduler.launches  # noqa: E731
        return EvaluationRunner(self.settings, self.sidecars, scheduler.reading, scheduler.writing, leads)

    def host_limits(self, caller: Principal) -> HostLimits:
        """Return the limits that the caller's spec is validated against, with the current devices."""
        return HostLimits(self.settings, self.inventory.devices(), names_roots=caller.scope.covers(Scope.ADMIN))


# A coroutine, because FastAPI runs a plain function in a thread: too expensive for reading one attribute.
async def _state(request: Request) -> AppState:
    state: AppState = request.app.state.app_state
    return state


StateDep = Annotated[AppState, Depends(_state)]
