"""``python -m trainyard.service``: bind, say where, migrate, look after what lives, serve."""

import argparse
import contextlib
import errno
import os
import socket
import sys
from pathlib import Path

import uvicorn
from sqlalchemy.exc import DBAPIError

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import read_json, write_json
from trainyard.service.app import build_state, create_app
from trainyard.service.db.engine import UnknownSchemaVersion, error_text
from trainyard.service.launch.base import LOCAL, Launcher
from trainyard.service.launch.environment import WORKER_AGENT
from trainyard.service.launch.local import LocalLauncher
from trainyard.service.launch.router import LauncherRouter
from trainyard.service.launch.slurm.launcher import SLURM, SlurmLauncher
from trainyard.service.observability.logging import configure_logging
from trainyard.service.server import MAX_HEAD_BYTES, GracefulServer, TimeoutH11Protocol
from trainyard.service.settings import InvalidSettings, Settings
from trainyard.service.timing import Timing

BACKLOG = 512
PREDECESSOR_SECONDS = 20.0
SHUTDOWN_SECONDS = 10
UNACKED_TIMEOUT_MILLISECONDS = 60_000


class BindError(Exception):
    """The address cannot be listened at; the message says why and what to do."""


class AlreadyRunning(Exception):
    """Another service runs on the home; the message says where."""


def main(arguments: list[str] | None = None, agent: tuple[str, ...] = WORKER_AGENT, timing: Timing = Timing()) -> int:
    """Serve until SIGTERM or SIGINT, and return an exit code. Runs continue without the service.

    ``agent``: the command that starts an attempt's agent. It and ``timing`` are for tests.
    """
    try:
        settings, schedules = _settings(arguments)
        return _run(settings, schedules, agent, timing)
    except InvalidSettings as error:
        return _refuse(str(error), code=2)
    except (BindError, AlreadyRunning, UnknownSchemaVersion) as error:
        return _refuse(str(error))
    except DBAPIError as error:
        return _refuse(error_text(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}; --home or TRAINYARD_HOME says where the service may write")


def _refuse(why: str, code: int = 1) -> int:
    print(f"service: {why}", file=sys.stderr)
    return code


def _run(settings: Settings, schedules: bool, agent: tuple[str, ...], timing: Timing) -> int:
    settings.home.mkdir(parents=True, exist_ok=True)
    with _hold_home(settings) if schedules else contextlib.nullcontext():
        configure_logging(settings.log_format, settings.log_level, settings.secrets())
        return _serve(settings, schedules, agent, timing)


def _hold_home(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """On SQLite, one service on a home; a predecessor that is shutting down is waited for. Raises NotAlone.

    On Postgres there may be several, on this host or others: the lease says which of them schedules.
    """
    if not settings.database_url.startswith("sqlite"):
        return contextlib.nullcontext()
    lock = FileLock(settings.home / "service.lock")
    with contextlib.suppress(LockBusy):
        return lock.take()
    there = f"another service runs on {settings.home}{_its_url(settings)}"
    print(f"service: {there}; waiting {PREDECESSOR_SECONDS:g} s for it to end", file=sys.stderr, flush=True)
    try:
        return lock.take(seconds=PREDECESSOR_SECONDS)
    except LockBusy:
        raise AlreadyRunning(f"{there}: use that one, stop it, or give this one a --home of its own") from None


def _its_url(settings: Settings) -> str:
    with contextlib.suppress(OSError, ValueError):
        said = read_json(settings.service_file)
        return f", at {said['url']}" if isinstance(said, dict) and "url" in said else ""
    return ""


def _settings(arguments: list[str] | None) -> tuple[Settings, bool]:
    """The settings, and whether this service may schedule."""
    parser = argparse.ArgumentParser(prog="python -m trainyard.service", description="The Trainyard service")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8000); 0: any free one")
    parser.add_argument("--home", type=Path, help="directory for runs, database and caches (./trainyard-home)")
    parser.add_argument("--database-url", help="default: SQLite in the home")
    parser.add_argument("--no-scheduler", action="store_true", help="only answer: another service here schedules")
    given = parser.parse_args(arguments)
    settings = Settings.read(os.environ, given.host, given.port, given.home, given.database_url)
    return settings, not given.no_scheduler


def _serve(settings: Settings, schedules: bool, agent: tuple[str, ...], timing: Timing) -> int:
    with _bound(settings) as listener:
        url = _url(settings.host, listener.getsockname()[1])
        services = build_state(settings, _launcher(settings, agent), schedules=schedules, timing=timing)
        # Here, and not only in the application's life: what a database says no to is said in a line.
        services.database.upgrade(settings.home / "migrate.lock")

        def lead() -> None:
            # Agents of runs that outlived our predecessor find us by this file.
            write_json(settings.service_file, {"url": url})

        def ready() -> None:
            print(f"Trainyard is ready at {url}", flush=True)

        app = create_app(services, ready)
        services.scheduler.on_lead = lead
        config = uvicorn.Config(
            app,
            access_log=False,
            # Its loggers write where ours do, and as ours do.
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            timeout_keep_alive=30,
            http=TimeoutH11Protocol,
            # Who may speak for others is ours to decide, see `service.proxies`; uvicorn would believe all of loopback.
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        server = GracefulServer(config, services.broadcaster.stop)
        server.run(sockets=[listener])
        return 0 if server.started else 1


def _launcher(settings: Settings, agent: tuple[str, ...]) -> Launcher:
    roots = (settings.data_roots, settings.save_roots)
    local = LocalLauncher(settings.home, settings.corpus_cache, *roots, agent)
    if settings.slurm is None:
        return local
    slurm = SlurmLauncher(settings.home, settings.corpus_cache, settings.slurm, *roots, agent)
    return LauncherRouter({LOCAL: local, SLURM: slurm})


def _bound(settings: Settings) -> socket.socket:
    """A listening socket: connections made from now on are answered as soon as we serve."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Said to be TCP in so many words: only then does asyncio switch off that small answers wait for the peer's ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it: what a peer does not take for so long is thrown away with its connection.
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
    listener.listen(BACKLOG)
    return listener


def _bind_error(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program listens there already; --port takes another port, and --port 0 any that is free"
    return f"cannot be listened at: {error.strerror}; --host and --port say where"


def _url(host: str, port: int) -> str:
    """Where agents on this host reach us."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


if __name__ == "__main__":
    sys.exit(main())
