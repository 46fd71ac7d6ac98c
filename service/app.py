"""The application: routes, errors, and a life that begins with the migrations and the scheduler."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from trainyard.service.api.dependencies import AppState
from trainyard.service.api.middleware import HeadMiddleware, RequestMiddleware
from trainyard.service.api.openapi import openapi
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers import (
    artifacts,
    logs,
    prometheus,
    status,
)
from trainyard.service.api.routers import checkpoints as checkpoint_routes
from trainyard.service.api.routers import devices as device_routes
from trainyard.service.api.routers import exports as export_routes
from trainyard.service.api.routers import forks as fork_routes
from trainyard.service.api.routers import ingest as report_routes
from trainyard.service.api.routers import jobs as job_routes
from trainyard.service.api.routers import metrics as metric_routes
from trainyard.service.api.routers import planning as plan_routes
from trainyard.service.api.routers import streams as stream_routes
from trainyard.service.api.routers import tokens as access_routes
from trainyard.service.api.routers import webhooks as webhook_routes
from trainyard.service.auth.permissions import methods_at, scopes_of
from trainyard.service.bodies import invalid_request
from trainyard.service.dashboard.assets import Assets
from trainyard.service.dashboard.pages import DashboardMiddleware
from trainyard.service.db.engine import Database
from trainyard.service.devices.inventory import HostInventory, Inventory, visible_devices
from trainyard.service.errors import ServiceError, from_exception, problem_response
from trainyard.service.jobs import deletion
from trainyard.service.launch.base import Launcher
from trainyard.service.leadership import LeaderLease
from trainyard.service.maintenance.corpus_cache import CorpusCachePruner
from trainyard.service.maintenance.loop import MaintenanceLoop
from trainyard.service.maintenance.retention import Policy
from trainyard.service.scheduler.loop import Scheduler
from trainyard.service.scheduler.published_inventory import PublishedInventory
from trainyard.service.settings import Settings
from trainyard.service.streams.broadcaster import MetricBroadcaster
from trainyard.service.timing import Timing
from trainyard.service.webhooks.http_client import WebhookClient
from trainyard.service.webhooks.sender import Sender

DESCRIPTION = "Pretraining runs over REST: launch, watch, pause, resume. Errors are application/problem+json."
REQUEST_THREADS = 32
"""Endpoints that run at once. Fewer than the database's connections, so that none waits for one."""

ROUTERS = (
    job_routes,
    fork_routes,
    plan_routes,
    artifacts,
    logs,
    metric_routes,
    stream_routes,
    checkpoint_routes,
    export_routes,
    report_routes,
    device_routes,
    access_routes,
    webhook_routes,
    status,
    prometheus,
)
ROUTES = [route for module in ROUTERS for route in module.router.routes]


def build_state(
    settings: Settings,
    launcher: Launcher,
    inventory: Inventory | None = None,
    schedules: bool = True,
    timing: Timing = Timing(),
) -> AppState:
    """The parts of a service. Nothing runs yet, and nothing was written. One that never ``schedules`` only answers."""
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    devices = inventory or HostInventory(settings.cpu_slots, visible_devices())
    lease = LeaderLease(database, timing=timing)
    scheduler = Scheduler(
        database,
        launcher,
        devices,
        lease=lease,
        wanted=schedules,
        preempts=settings.preemption,
        timing=timing,
    )
    sender = Sender(database, WebhookClient(settings.webhook_networks), lease, wanted=schedules)
    seen = devices if schedules else PublishedInventory(database, devices)
    return AppState(settings, database, seen, scheduler, MetricBroadcaster(database), sender)


def create_app(services: AppState, ready: Callable[[], None] | None = None, scheduling: bool = True) -> FastAPI:
    """The ASGI application. ``ready`` is called once it works; ``scheduling`` False leaves the rounds to the caller."""
    upkeep = _upkeep(services)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(REQUEST_THREADS, "requests"))
        services.database.upgrade(services.settings.home / "migrate.lock")
        deletion.sweep(services.settings, services.database)
        services.leader  # noqa: B018 - from now on its silence counts
        if scheduling:
            services.scheduler.start()
            upkeep.start()
            services.sender.start()
        if ready is not None:
            ready()
        yield
        services.broadcaster.stop()
        upkeep.stop()
        # While the lease is still held: what was sent a moment ago is written down as sent.
        services.sender.stop()
        services.scheduler.stop()
        services.database.close()

    app = FastAPI(
        title="Trainyard",
        version=status.package_version(),
        description=DESCRIPTION,
        lifespan=life,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.services = services
    app.router.route_class = ServiceRoute
    for kind in (ServiceError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(DashboardMiddleware, assets=Assets(services.settings.home / "cache" / "dashboard"))
    # Added last, so outermost: even pages come from a host that is ours.
    app.add_middleware(
        RequestMiddleware, settings=services.settings, telemetry=services.metrics, gatekeeper=services.authenticator
    )
    scopes_of(route for module in ROUTERS for route in module.router.routes)
    for module in ROUTERS:
        app.include_router(module.router)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign] # FastAPI's own way to extend the document
    return app


def _refused(request: Request, error: Exception) -> JSONResponse:
    """Every "no" as a problem. With a 405 the framework names the methods of the first route alone that it finds."""
    made = invalid_request(request, error) if isinstance(error, RequestValidationError) else from_exception(error)
    if made.status == HTTPStatus.METHOD_NOT_ALLOWED:
        methods = methods_at(request.url.path, ROUTES)
        made.headers |= {"Allow": ", ".join(methods)} if methods else {}
    return problem_response(made, request.scope.get("request_id"))


def _upkeep(services: AppState) -> MaintenanceLoop:
    settings, telemetry = services.settings, services.metrics
    shelf, policy = CorpusCachePruner.of(settings), Policy.of(settings)
    return MaintenanceLoop(
        services.scheduler, services.disks, corpora=shelf, policy=policy, count=telemetry.rows_removed
    )
