"""Builds the service: its parts, the FastAPI application with routes and middleware, and its startup and shutdown."""

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
    checkpoints,
    corpora,
    devices,
    documentation,
    evaluations,
    exports,
    forks,
    generation,
    ingest,
    jobs,
    logs,
    mcp,
    metrics,
    openai,
    planning,
    prometheus,
    status,
    streams,
    tokens,
    webhooks,
)
from trainyard.service.auth.permissions import methods_at, scopes_of
from trainyard.service.bodies import invalid_request
from trainyard.service.dashboard.assets import Assets
from trainyard.service.dashboard.pages import DashboardMiddleware
from trainyard.service.db.engine import Database
from trainyard.service.devices.inventory import HostInventory, Inventory, visible_devices
from trainyard.service.devices.xids import XidWatcher
from trainyard.service.errors import ServiceError, error_response, from_exception
from trainyard.service.home import create_directory
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
from trainyard.service.webhooks.notice_client import NoticeClient
from trainyard.service.webhooks.sender import Sender

DESCRIPTION = "Pretraining runs over REST: launch, watch, pause, resume. Errors are application/problem+json."
REQUEST_THREADS = 32
"""Endpoints that run at once. There are more database connections, so that no endpoint waits for one."""

ROUTERS = (
    jobs,
    forks,
    planning,
    artifacts,
    logs,
    metrics,
    streams,
    checkpoints,
    evaluations,
    exports,
    corpora,
    generation,
    openai,
    mcp,
    ingest,
    devices,
    tokens,
    webhooks,
    status,
    prometheus,
    documentation,
)
ROUTES = [route for module in ROUTERS for route in module.router.routes]


def build_state(
    settings: Settings,
    launcher: Launcher,
    inventory: Inventory | None = None,
    schedules: bool = True,
    timing: Timing = Timing(),
    prepares: bool = False,
) -> AppState:
    """Create the parts of a service. Nothing is started.

    Creates only the home directory. With ``schedules`` False the service only serves the API. With ``prepares``,
    corpora are prepared before jobs get devices.
    """
    create_directory(settings.home, settings.home_mode)
    database = Database(settings.database_url)
    host_inventory = inventory or HostInventory(settings.cpu_slots, visible_devices(), settings.excluded_devices)
    lease = LeaderLease(database, timing=timing)
    scheduler = Scheduler(
        database,
        launcher,
        host_inventory,
        lease=lease,
        enabled=schedules,
        preempts=settings.preemption,
        timing=timing,
        corpora=(settings.corpus_cache, settings.home) if prepares else None,
        xid_watcher=XidWatcher(),
    )
    sender = Sender(
        database,
        WebhookClient(settings.webhook_networks),
        lease,
        enabled=schedules,
        notices=NoticeClient(settings.webhook_networks, settings.link_url),
    )
    shown_inventory = host_inventory if schedules else PublishedInventory(database, host_inventory)
    return AppState(settings, database, shown_inventory, scheduler, MetricBroadcaster(database), sender)


def create_app(state: AppState, ready: Callable[[], None] | None = None, scheduling: bool = True) -> FastAPI:
    """Return the ASGI application.

    ``ready`` is called at the end of the startup. With ``scheduling`` False no background thread starts: tests run the
    rounds themselves.
    """
    maintenance = _maintenance_loop(state)
    state.scheduler.reclaim_devices_by(state.sidecars.reclaim)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(REQUEST_THREADS, "requests"))
        state.database.upgrade(state.settings.home / "migrate.lock")
        deletion.sweep(state.settings, state.database)
        state.sidecars.end_orphans()
        state.leader  # noqa: B018 - creates the monitor, which counts the seconds since a renewal from now on
        if scheduling:
            state.scheduler.start()
            state.evaluations.start()
            maintenance.start()
            state.sender.start()
        if ready is not None:
            ready()
        yield
        state.broadcaster.stop()
        # Python waits for threads of a pool before it exits, and a thread waits for its export.
        state.exports_stopping.set()
        state.exports.shutdown(wait=False, cancel_futures=True)
        maintenance.stop()
        # First: the end of its processes is then not taken for a failure.
        state.evaluations.stop()
        await state.generation.close()
        await asyncio.to_thread(state.sidecars.close)
        # Before the scheduler gives up the lease: the sender still has to record what it has just sent.
        state.sender.stop()
        state.scheduler.stop()
        state.shared_reads.close()
        state.database.close()

    app = FastAPI(
        title="Trainyard",
        version=status.package_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        # FastAPI's own routes would need neither scope nor known query parameters, and its page loads from a CDN.
        openapi_url=None,
    )
    app.state.app_state = state
    app.router.route_class = ServiceRoute
    for kind in (ServiceError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _handle_error)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(DashboardMiddleware, assets=Assets(state.settings.home / "cache" / "dashboard"))
    # The last one added is the outermost: the Host header is checked for pages too.
    app.add_middleware(
        RequestMiddleware, settings=state.settings, metrics=state.metrics, authenticator=state.authenticator
    )
    # Also for a router that does not use ServiceRoute: a route without a scope must not start.
    scopes_of(route for module in ROUTERS for route in module.router.routes)
    # Not by include_router: FastAPI would match each request twice, through a list of lists, which took half of the
    # time of a small request. The routes have the prefix and the dependencies of their router already.
    app.router.routes.extend(ROUTES)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign] # FastAPI's own way to extend the document
    return app


def _handle_error(request: Request, exception: Exception) -> JSONResponse:
    if isinstance(exception, RequestValidationError):
        error = invalid_request(request, exception)
    else:
        error = from_exception(exception)
    if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette lists only the methods of the first route that matches the path.
        methods = methods_at(request.url.path, ROUTES)
        error.headers |= {"Allow": ", ".join(methods)} if methods else {}
    return error_response(error, request.url.path, request.scope.get("request_id"))


def _maintenance_loop(state: AppState) -> MaintenanceLoop:
    return MaintenanceLoop(
        state.scheduler,
        state.disks,
        corpora=CorpusCachePruner.of(state.settings),
        policy=Policy.of(state.settings),
        count=state.metrics.rows_removed,
    )
