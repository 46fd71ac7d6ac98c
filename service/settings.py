"""The service's settings: frozen, read once from the environment and the command line."""

import ipaddress
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from service.launch.base import LOCAL
from service.launch.slurm_setup import SlurmSetup
from service.logs import FORMATS, LEVELS
from service.proxies import Proxies
from service.tokens import tokens_in
from service.webhooks.addresses import Network

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
DATABASES = ("sqlite", "postgresql", "postgres", "postgresql+psycopg")
LARGEST_PORT = 65535


class SettingsRefused(ValueError):
    """The settings cannot be worked with, or would put the service at risk; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """Where the service keeps its things, what it may read and write, and who may talk to it.

    ``data_roots`` are read below, ``save_roots`` written below; the home always counts among both. ``cpu_slots`` is the
    number of CPU ranks that may run at once. ``allowed_hosts`` holds Host names without port; "*" allows any.
    ``idempotency_days``: how long a submission may be sent again. ``preemption``: a job of higher priority that waits
    makes those of lower priority pause. ``corpus_days``, ``corpus_bytes``: what of the corpus cache goes, see
    `service.upkeep.corpora`. ``webhook_networks``: not public, and may be sent to all the same. ``slurm``: how Slurm is
    used; None: it is not. ``launcher``: the one of jobs whose spec names none.
    """

    home: Path
    database_url: str = field(repr=False)
    data_roots: tuple[Path, ...]
    save_roots: tuple[Path, ...]
    corpus_cache: Path
    cpu_slots: int
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    proxies: Proxies = field(default_factory=Proxies)
    allowed_hosts: tuple[str, ...] = LOOPBACK_NAMES
    idempotency_days: int = 7
    preemption: bool = False
    log_format: str = "text"
    log_level: str = "info"
    disk_bytes: int = 5 << 30
    disk_percent: int = 10
    corpus_days: int = 30
    corpus_bytes: int = 0
    webhook_networks: tuple[Network, ...] = ()
    launcher: str = LOCAL
    slurm: SlurmSetup | None = None
    thin_metrics_days: int = 0
    metrics_days: int = 0
    events_days: int = 0

    @classmethod
    def read(
        cls,
        environment: Mapping[str, str],
        host: str | None = None,
        port: int | None = None,
        home: Path | None = None,
        database_url: str | None = None,
    ) -> "Settings":
        """Arguments win over ``environment``, which wins over the defaults. Raises SettingsRefused."""
        home = (home or Path(environment.get("TRAINYARD_HOME") or "trainyard-home")).resolve()
        host = host or environment.get("TRAINYARD_HOST") or "127.0.0.1"
        token = environment.get("TRAINYARD_TOKEN") or None
        default_roots = (Path.cwd(), home, Path(tempfile.gettempdir()))
        settings = cls(
            home=home,
            database_url=_database(
                database_url or environment.get("TRAINYARD_DATABASE_URL") or f"sqlite:///{home}/trainyard.db"
            ),
            data_roots=_paths(environment.get("TRAINYARD_DATA_ROOTS")) or tuple(p.resolve() for p in default_roots),
            save_roots=_paths(environment.get("TRAINYARD_SAVE_ROOTS")),
            corpus_cache=Path(environment.get("TRAINYARD_CORPUS_CACHE") or home / "cache" / "corpus").resolve(),
            cpu_slots=_whole(environment, "TRAINYARD_CPU_SLOTS", os.cpu_count() or 1),
            host=host,
            port=_port(port if port is not None else _whole(environment, "TRAINYARD_PORT", 8000)),
            token=token,
            token_file=_token_file(environment.get("TRAINYARD_TOKEN_FILE")),
            proxies=_proxies(environment.get("TRAINYARD_TRUSTED_PROXIES")),
            allowed_hosts=_allowed_hosts(environment.get("TRAINYARD_ALLOWED_HOSTS"), host),
            idempotency_days=_whole(environment, "TRAINYARD_IDEMPOTENCY_DAYS", 7),
            preemption=_one_of(environment, "TRAINYARD_PREEMPTION", ("off", "on")) == "on",
            log_format=_one_of(environment, "TRAINYARD_LOG_FORMAT", FORMATS),
            disk_bytes=_whole(environment, "TRAINYARD_DISK_LOW_BYTES", 5 << 30),
            disk_percent=_whole(environment, "TRAINYARD_DISK_LOW_PERCENT", 10),
            corpus_days=_whole(environment, "TRAINYARD_CORPUS_DAYS", 30),
            corpus_bytes=_whole(environment, "TRAINYARD_CORPUS_BYTES", 0),
            webhook_networks=_networks(environment.get("TRAINYARD_WEBHOOK_NETWORKS")),
            thin_metrics_days=_whole(environment, "TRAINYARD_THIN_METRICS_DAYS", 0),
            metrics_days=_whole(environment, "TRAINYARD_METRICS_DAYS", 0),
            events_days=_whole(environment, "TRAINYARD_EVENTS_DAYS", 0),
            log_level=_one_of(environment, "TRAINYARD_LOG_LEVEL", ("info", *LEVELS)),
            **_launchers(environment),
        )
        settings.require_safe()
        return settings

    def require_safe(self, address: str | None = None) -> None:
        """Raise SettingsRefused where others on the network could use the service without a token.

        ``address``: what was bound to, where that is known: a name may mean anything.
        """
        if self.token is not None or self.token_file is not None:
            return
        if self.proxies.networks:
            raise SettingsRefused(
                "refusing to serve others through a proxy without a token: set TRAINYARD_TOKEN or TRAINYARD_TOKEN_FILE"
            )
        if not is_loopback(self.host) or not is_loopback(address or self.host):
            raise SettingsRefused(
                "refusing to listen on an address that others can reach without a token: "
                "set TRAINYARD_TOKEN or TRAINYARD_TOKEN_FILE, or listen on 127.0.0.1"
            )

    def secrets(self) -> list[str]:
        """What must be seen nowhere: the tokens as they are now, and the database's password."""
        listed = tokens_in(self.token_file) if self.token_file is not None else []
        password = make_url(self.database_url).password
        return [secret for secret in (self.token, *listed, password) if secret]

    @property
    def runs(self) -> Path:
        """Holds one directory a job."""
        return self.home / "runs"

    @property
    def trash(self) -> Path:
        """Notes of files that are to go, see `service.jobs.files`."""
        return self.home / "trash"

    @property
    def service_file(self) -> Path:
        """Where agents find the URL of the service that runs now."""
        return self.home / "service.json"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _allowed_hosts(given: str | None, host: str) -> tuple[str, ...]:
    if given:
        return (*LOOPBACK_NAMES, *(name.strip().lower() for name in given.split(",") if name.strip()))
    # A wildcard address has no name of its own; there a token is required, and no page elsewhere knows it.
    return ("*",) if host in ("0.0.0.0", "::") else (*LOOPBACK_NAMES, host.lower())  # noqa: S104 - compared, not bound


def _database(url: str) -> str:
    """The URL, if it is one of a database that we work with. It is not shown: it may hold a password."""
    try:
        known = make_url(url).drivername in DATABASES
    except (ArgumentError, ValueError):
        known = False
    if not known:
        raise SettingsRefused(
            "TRAINYARD_DATABASE_URL or --database-url must be sqlite:////FOLDER/FILE or "
            "postgresql+psycopg://USER:PASSWORD@HOST/NAME; where it is left out, a SQLite file in the home is used"
        )
    return url


def _port(number: int) -> int:
    if not 0 <= number <= LARGEST_PORT:
        raise SettingsRefused(f"TRAINYARD_PORT or --port must be 0 to {LARGEST_PORT}; 0 takes a free one")
    return number


def _proxies(given: str | None) -> Proxies:
    try:
        return Proxies.of((given or "").split(","))
    except ValueError:
        message = "TRAINYARD_TRUSTED_PROXIES must be addresses or networks, separated by commas: 10.0.0.5,10.1.0.0/24"
        raise SettingsRefused(message) from None


def _token_file(given: str | None) -> Path | None:
    """Looked into now: a wrong path must not be found out by the first request."""
    if not given:
        return None
    file = Path(given).resolve()
    try:
        found = tokens_in(file)
    except (OSError, ValueError):
        raise SettingsRefused("TRAINYARD_TOKEN_FILE must be a text file that the service can read") from None
    if not found:
        raise SettingsRefused("TRAINYARD_TOKEN_FILE holds no token: one a line")
    return file


def _networks(given: str | None) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in (given or "").split(",") if part.strip())
    except ValueError:
        raise SettingsRefused("TRAINYARD_WEBHOOK_NETWORKS must hold networks such as 10.1.0.0/16,fd00::/8") from None


def _paths(text: str | None) -> tuple[Path, ...]:
    return tuple(Path(part).resolve() for part in (text or "").split(":") if part)


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if not text:
        return default
    if not text.isdecimal():
        raise SettingsRefused(f"{name} must be a whole number")
    return int(text)


def _one_of(environment: Mapping[str, str], name: str, words: Sequence[str]) -> str:
    """One of ``words``, the first where nothing is said."""
    text = environment.get(name) or words[0]
    if text not in words:
        raise SettingsRefused(f"{name} must be {' or '.join(sorted(set(words)))}")
    return text


def _launchers(environment: Mapping[str, str]) -> dict[str, Any]:
    try:
        slurm = SlurmSetup.read(environment)
    except ValueError as error:
        raise SettingsRefused(str(error)) from None
    launcher = environment.get("TRAINYARD_LAUNCHER") or LOCAL
    there = (LOCAL, "slurm") if slurm is not None else (LOCAL,)
    if launcher not in there:
        raise SettingsRefused(f"TRAINYARD_LAUNCHER must be {' or '.join(there)}; TRAINYARD_SLURM=on adds slurm")
    return {"launcher": launcher, "slurm": slurm}
