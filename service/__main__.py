"""``python -m trainyard.service``: read the settings, bind the socket, migrate the database, and serve."""

import argparse
import contextlib
import errno
import logging
import os
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvicorn
from sqlalchemy.exc import DBAPIError

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import read_json, write_json
from trainyard.service import descriptors, home
from trainyard.service.api.dependencies import AppState
from trainyard.service.app import build_state, create_app
from trainyard.service.db.engine import UnknownSchemaVersion, error_text
from trainyard.service.db.suitability import UnsuitableDatabase, require_local_file, require_suitable_server
from trainyard.service.launch.base import LOCAL, Launcher, LauncherRouter
from trainyard.service.launch.environment import WORKER_AGENT
from trainyard.service.launch.local import LocalLauncher
from trainyard.service.launch.slurm.launcher import SLURM, SlurmLauncher
from trainyard.service.niceness import raise_niceness
from trainyard.service.observability.logging import configure_logging
from trainyard.service.planning.matrix_speed import MatrixSpeed
from trainyard.service.scheduler.loop import Scheduler
from trainyard.service.server import (
    ACCEPTS_PER_ROUND,
    LISTEN_BACKLOG,
    MAX_HEAD_BYTES,
    GracefulServer,
    TimeoutH11Protocol,
)
from trainyard.service.settings import InvalidSettings, Settings
from trainyard.service.timing import Timing

log = logging.getLogger("trainyard")

PREDECESSOR_SECONDS = 20.0
SHUTDOWN_SECONDS = 10
UNACKED_TIMEOUT_MILLISECONDS = 60_000


class BindError(Exception):
    """The service cannot listen on the address."""


class AlreadyRunning(Exception):
    """Another service runs on the same home."""


def main(
    arguments: list[str] | None = None,
    agent: tuple[str, ...] = WORKER_AGENT,
    timing: Timing = Timing(),
    prepares: bool = True,
) -> int:
    """Serve until SIGTERM or SIGINT, and return an exit code. Runs continue, or save first: see `Settings.on_stop`.

    ``agent``: the command that starts an attempt's agent. It, ``timing`` and ``prepares`` (corpora are prepared before
    jobs get devices) are for tests.
    """
    try:
        settings, schedules = _read_settings(arguments)
        settings.require_own_database()
        home.create_directory(settings.home, settings.home_mode)
        with _lock_home(settings) if schedules else contextlib.nullcontext():
            secrets = [*settings.secrets(), os.environ.get("PGPASSWORD", "")]
            configure_logging(settings.log_format, settings.log_level, secrets)
            _protect_home(settings)
            return _serve(settings, schedules, agent, timing, prepares)
    except InvalidSettings as error:
        return _fail(str(error), code=2)
    except (BindError, AlreadyRunning, UnknownSchemaVersion, UnsuitableDatabase) as error:
        return _fail(str(error))
    except DBAPIError as error:
        return _fail(error_text(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}; --home or TRAINYARD_HOME says where the service may write")


def _protect_home(settings: Settings) -> None:
    home.share_new_files(settings.home_mode)
    home.restrict(settings.home, settings.home_mode, settings.database_file)
    # A cache that is shared with other services keeps its mode.
    home.create_directory(settings.corpus_cache, settings.home_mode)


def _fail(message: str, code: int = 1) -> int:
    print(f"service: {message}", file=sys.stderr)
    return code


def _lock_home(settings: Settings) -> contextlib.AbstractContextManager[object]:
    # On Postgres several services may run, on this host or others: the leader lease decides which one schedules.
    if not settings.database_url.startswith("sqlite"):
        return contextlib.nullcontext()
    lock = FileLock(settings.home / "service.lock")
    with contextlib.suppress(LockBusy):
        return lock.take()
    conflict = f"another service runs on {settings.home}{_url_of_other(settings)}"
    # A predecessor may still be shutting down.
    print(f"service: {conflict}; waiting {PREDECESSOR_SECONDS:g} s for it to end", file=sys.stderr, flush=True)
    try:
        return lock.take(seconds=PREDECESSOR_SECONDS)
    except LockBusy:
        raise AlreadyRunning(f"{conflict}: use that one, stop it, or give this one a --home of its own") from None


def _url_of_other(settings: Settings) -> str:
    with contextlib.suppress(OSError, ValueError):
        content = read_json(settings.service_file)
        return f", at {content['url']}" if isinstance(content, dict) and "url" in content else ""
    return ""


def _read_settings(arguments: list[str] | None) -> tuple[Settings, bool]:
    parser = argparse.ArgumentParser(prog="python -m trainyard.service", description="The Trainyard service")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8000); 0: any free one")
    parser.add_argument("--home", type=Path, help="directory for runs, database and caches (./trainyard-home)")
    parser.add_argument("--database-url", help="default: SQLite in the home")
    parser.add_argument("--no-scheduler", action="store_true", help="serve only the API: another service schedules")
    options = parser.parse_args(arguments)
    settings = Settings.read(os.environ, options.host, options.port, options.home, options.database_url)
    return settings, not options.no_scheduler


def _serve(settings: Settings, schedules: bool, agent: tuple[str, ...], timing: Timing, prepares: bool) -> int:
    descriptors.raise_limit()
    if settings.database_file is not None:
        require_local_file(settings.database_file)
    with _bind(settings) as listener:
        url = _url(settings.host, listener.getsockname()[1])
        local = _local_launcher(settings, agent)
        launcher = _launcher(settings, local, agent)
        state = build_state(settings, launcher, schedules=schedules, timing=timing, prepares=prepares)
        state = replace(state, matrix_speed=MatrixSpeed(settings.home))
        for warning in require_suitable_server(state.database):
            log.warning(warning)
        # The application upgrades too, but an error here becomes one line on stderr and not a traceback.
        state.database.upgrade(settings.home / "migrate.lock")

        # Agents of runs that outlived the previous service find this one by the file.
        state.scheduler.on_lead = lambda: write_json(settings.service_file, {"url": url})
        # Here, because an error while it is written becomes one line on stderr.
        state.service_key  # noqa: B018 - creates the file
        app = create_app(state, ready=lambda: _on_ready(settings, url))
        config = uvicorn.Config(
            app,
            access_log=False,
            # uvicorn's loggers use the handler and format of ours.
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            timeout_keep_alive=30,
            http=TimeoutH11Protocol,
            loop="asyncio",  # what is tested; uvicorn would take uvloop, which trackio installs
            backlog=ACCEPTS_PER_ROUND,
            # uvicorn would trust every peer on loopback; `service.proxies` trusts only the configured proxies.
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        before_exit = None
        if schedules and settings.on_stop == "save":
            before_exit = partial(_save_runs, state.scheduler, local)
        server = GracefulServer(config, partial(_end_streams, state), before_exit)
        server.run(sockets=[listener])
        if server.started:
            log.info("stopped")
        return 0 if server.started else 1


def _end_streams(state: AppState) -> None:
    state.broadcaster.stop()
    state.generation.stop()


def _save_runs(scheduler: Scheduler, local: LocalLauncher) -> None:
    """Make all runs of this host save and end. They resume when a service starts on this home."""
    log.info("stopping: runs save first; a second signal ends the service at once")
    scheduler.stop_launching()
    for name in local.save_and_stop_all():
        log.warning("did not stop in time", extra=name.fields)


def _local_launcher(settings: Settings, agent: tuple[str, ...]) -> LocalLauncher:
    return LocalLauncher(settings.home, settings.corpus_cache, settings.data_roots, settings.save_roots, agent)


def _on_ready(settings: Settings, url: str) -> None:
    # After the start of the scheduler's thread, which starts the agents: they must not inherit it. The threads of
    # requests and streams are started by this one, later.
    raise_niceness(settings.niceness)
    _print_ready(url)


def _print_ready(url: str) -> None:
    # A full disk or a reader that has exited must not end the service.
    with contextlib.suppress(OSError):
        print(f"Trainyard is ready at {url}", flush=True)


def _launcher(settings: Settings, local: LocalLauncher, agent: tuple[str, ...]) -> Launcher:
    if settings.slurm is None:
        return local
    roots = (settings.data_roots, settings.save_roots)
    slurm = SlurmLauncher(settings.home, settings.corpus_cache, settings.slurm, *roots, agent)
    return LauncherRouter({LOCAL: local, SLURM: slurm})


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is explicitly TCP; without it small responses wait for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit this: a peer that does not acknowledge data for so long is disconnected.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKED_TIMEOUT_MILLISECONDS)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise BindError(f"{settings.host}:{settings.port}: {_bind_error(error)}") from error
    try:
        settings.require_safe(listener.getsockname()[0])
    except InvalidSettings:
        listener.close()
        raise
    listener.listen(LISTEN_BACKLOG)
    return listener


def _bind_error(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program listens there already; --port takes another port, and --port 0 any that is free"
    return f"cannot listen: {error.strerror}; set --host and --port"


def _url(host: str, port: int) -> str:
    # Agents on this host use it, so a wildcard address becomes loopback.
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


if __name__ == "__main__":
    sys.exit(main())
