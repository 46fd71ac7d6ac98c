"""The settings of the service, read once from environment variables and the command line."""

import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from trainyard.contract.allowed_paths import parse_roots
from trainyard.contract.processes import in_container
from trainyard.service.home import DEFAULT_MODE
from trainyard.service.launch.base import LOCAL
from trainyard.service.launch.slurm.config import SlurmSetup
from trainyard.service.observability.logging import Format, Level
from trainyard.service.proxies import TrustedProxies
from trainyard.service.settings_base import (
    EnvironmentSettings,
    InvalidSettings,
    WholeNumber,
    parse_database_url,
    split_commas,
)
from trainyard.service.ssrf import Network
from trainyard.service.static_tokens import parse_tokens

__all__ = ["InvalidSettings", "Settings", "is_loopback"]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
DATABASE_FILE = "trainyard.db"
DATABASES = ("sqlite", "postgresql", "postgres", "postgresql+psycopg")


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file. Its path may have characters with a meaning in URLs, such as ``?``."""
    return URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)


def _default_hosts(fields: dict[str, Any]) -> tuple[str, ...]:
    host = fields["host"]
    # A wildcard address has no name. A token is required there, which a page of another site does not have.
    return ("*",) if host in ("0.0.0.0", "::") else (*LOOPBACK_NAMES, host.lower())  # noqa: S104 - compared, not bound


def _default_roots(fields: dict[str, Any]) -> tuple[Path, ...]:
    # Not the temporary directory: every user of the host may write there, and replace files by links.
    return tuple(root.resolve() for root in (Path.cwd(), fields["home"]))


def _validate_database_url(url: str) -> str:
    try:
        supported = parse_database_url(url).drivername in DATABASES
    except ArgumentError:
        supported = False
    if not supported:
        raise ValueError("unsupported database")
    return url


def _validate_token_file(file: Path) -> Path:
    # Read at startup, so that a wrong path fails here and not at the first request.
    try:
        tokens = parse_tokens(file)
    except OSError as error:
        raise ValueError from error
    if not tokens:
        raise InvalidSettings("holds no token: one a line")
    return file


def _validate_token(token: str) -> str:
    # A header has no whitespace around the token. A variable that was set from a secret often ends with a newline.
    if not token.strip():
        raise InvalidSettings("is blank")
    return token.strip()


def _validate_launcher(name: str, info: ValidationInfo) -> str:
    # If the Slurm settings are invalid, "slurm" is missing from `data`; that error has its own line.
    launchers = (LOCAL, "slurm") if info.data.get("slurm", True) else (LOCAL,)
    if name not in launchers:
        raise InvalidSettings(f"must be {' or '.join(launchers)}; TRAINYARD_SLURM=on adds slurm")
    return name


def _validate_public_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    return url.rstrip("/")


def _parse_mode(value: str | int) -> int:
    mode = int(value, 8) if isinstance(value, str) else value
    # The owner may do everything, and others may at most read. A home that others write to is not safe.
    if mode & 0o700 != 0o700 or mode & ~0o2755:
        raise ValueError(value)
    return mode


Folder = Annotated[Path, AfterValidator(Path.resolve)]
Folders = Annotated[tuple[Folder, ...], BeforeValidator(parse_roots)]
MAX_DAYS = 36_500
"""100 years, which is for ever. A date cannot be computed for a much larger number of days."""

Days = Annotated[WholeNumber, AfterValidator(lambda days: min(days, MAX_DAYS))]
Switch = Annotated[
    bool, BeforeValidator(lambda text: {"off": False, "on": True}.get(text)), Field(description="must be off or on")
]


class Settings(EnvironmentSettings):
    """Settings of the service.

    Jobs may read files below ``data_roots`` and write below ``save_roots``; the home belongs to both. ``cpu_slots``
    is the number of CPU ranks that may run at once. ``excluded_devices``: ids, UUIDs or PCI addresses.
    ``allowed_hosts`` holds Host names without port; "*" allows any. ``idempotency_days``: how long an
    Idempotency-Key is remembered. ``preemption``: jobs of lower priority are paused for a waiting job of higher
    priority. ``on_stop``: whether the runs of this host save and end before the service, or are left running.
    ``niceness``: of the threads that serve requests, added to that of the service; runs are not affected.
    ``corpus_days``, ``corpus_bytes``: limits of the corpus cache, see `service.maintenance.corpus_cache`.
    ``webhook_networks``: private networks that webhooks may reach. ``public_url``: what links to the service begin
    with. ``slurm`` is None if Slurm is not used.
    ``launcher``: launcher of jobs whose spec names none. ``sidecar_threads``: CPU threads of each side process.
    ``generation_...``: limits of the processes that generate text, see `service.generation.pool`.
    ``evaluation_processes``: evaluations of checkpoints that run at once.
    """

    home: Folder = Field(default_factory=lambda: Path("trainyard-home").resolve(), alias="TRAINYARD_HOME")
    database_url: Annotated[str, AfterValidator(_validate_database_url)] = Field(
        default_factory=lambda fields: sqlite_url(fields["home"] / DATABASE_FILE),
        alias="TRAINYARD_DATABASE_URL",
        description="or --database-url must be sqlite:////FOLDER/FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME; "
        "without it, a SQLite file in the home is used",
        repr=False,
    )
    home_mode: Annotated[int, BeforeValidator(_parse_mode)] = Field(
        DEFAULT_MODE,
        alias="TRAINYARD_HOME_MODE",
        description="must be an octal mode: 0700, or 0750 if the home's group may read it; no one else may write",
    )
    data_roots: Annotated[Folders, AfterValidator(lambda roots, info: roots or _default_roots(info.data))] = Field(
        default_factory=_default_roots, alias="TRAINYARD_DATA_ROOTS"
    )
    save_roots: Folders = Field((), alias="TRAINYARD_SAVE_ROOTS")
    corpus_cache: Folder = Field(
        default_factory=lambda fields: fields["home"] / "cache" / "corpus", alias="TRAINYARD_CORPUS_CACHE"
    )
    cpu_slots: WholeNumber = Field(default_factory=lambda: os.cpu_count() or 1, alias="TRAINYARD_CPU_SLOTS")
    host: str = Field("127.0.0.1", alias="TRAINYARD_HOST")
    port: WholeNumber = Field(
        8000, alias="TRAINYARD_PORT", ge=0, le=65535, description="or --port must be 0 to 65535; 0 picks a free one"
    )
    token: Annotated[str, AfterValidator(_validate_token)] | None = Field(None, alias="TRAINYARD_TOKEN", repr=False)
    token_file: Annotated[Folder, AfterValidator(_validate_token_file)] | None = Field(
        None, alias="TRAINYARD_TOKEN_FILE", description="must be a text file that the service can read"
    )
    proxies: Annotated[TrustedProxies, BeforeValidator(lambda text: TrustedProxies.parse(text.split(",")))] = Field(
        TrustedProxies(),
        alias="TRAINYARD_TRUSTED_PROXIES",
        description="must be addresses or networks, separated by commas: 10.0.0.5,10.1.0.0/24",
    )
    allowed_hosts: Annotated[
        tuple[str, ...], BeforeValidator(lambda text: [*LOOPBACK_NAMES, *split_commas(text.lower())])
    ] = Field(default_factory=_default_hosts, alias="TRAINYARD_ALLOWED_HOSTS")
    excluded_devices: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        (), alias="TRAINYARD_EXCLUDE_DEVICES"
    )
    idempotency_days: Days = Field(7, alias="TRAINYARD_IDEMPOTENCY_DAYS")
    on_stop: Literal["leave", "save"] = Field(
        default_factory=lambda: "save" if in_container() else "leave", alias="TRAINYARD_ON_STOP"
    )
    niceness: WholeNumber = Field(
        0, alias="TRAINYARD_NICENESS", le=19, description="must be a whole number from 0 to 19"
    )
    preemption: Switch = Field(False, alias="TRAINYARD_PREEMPTION")
    log_format: Format = Field("text", alias="TRAINYARD_LOG_FORMAT")
    log_level: Level = Field("info", alias="TRAINYARD_LOG_LEVEL")
    disk_bytes: WholeNumber = Field(5 << 30, alias="TRAINYARD_DISK_LOW_BYTES")
    disk_percent: WholeNumber = Field(10, alias="TRAINYARD_DISK_LOW_PERCENT")
    corpus_days: Days = Field(30, alias="TRAINYARD_CORPUS_DAYS")
    corpus_bytes: WholeNumber = Field(0, alias="TRAINYARD_CORPUS_BYTES")
    webhook_networks: Annotated[tuple[Network, ...], BeforeValidator(split_commas)] = Field(
        (), alias="TRAINYARD_WEBHOOK_NETWORKS", description="must hold networks such as 10.1.0.0/16,fd00::/8"
    )
    public_url: Annotated[str, AfterValidator(_validate_public_url)] | None = Field(
        None, alias="TRAINYARD_PUBLIC_URL", description="must be an http or https URL such as https://train.example.com"
    )
    slurm: Annotated[SlurmSetup | None, BeforeValidator(SlurmSetup.read)] = None
    launcher: Annotated[str, AfterValidator(_validate_launcher)] = Field(LOCAL, alias="TRAINYARD_LAUNCHER")
    sidecar_threads: WholeNumber = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 1) // 4),
        alias="TRAINYARD_SIDECAR_THREADS",
        ge=1,
        description="must be a whole number, 1 or more",
    )
    generation_device: Literal["auto", "cpu"] = Field("auto", alias="TRAINYARD_GENERATION_DEVICE")
    generation_processes: WholeNumber = Field(2, alias="TRAINYARD_GENERATION_PROCESSES")
    generation_bytes: WholeNumber = Field(0, alias="TRAINYARD_GENERATION_BYTES")
    generation_idle_seconds: WholeNumber = Field(300, alias="TRAINYARD_GENERATION_IDLE_SECONDS")
    evaluation_processes: WholeNumber = Field(1, alias="TRAINYARD_EVALUATION_PROCESSES")
    thin_metrics_days: Days = Field(0, alias="TRAINYARD_THIN_METRICS_DAYS")
    metrics_days: Days = Field(0, alias="TRAINYARD_METRICS_DAYS")
    events_days: Days = Field(0, alias="TRAINYARD_EVENTS_DAYS")

    @property
    def link_url(self) -> str | None:
        """What links to the service begin with, or None if that is not known: the port may be any free one."""
        if self.public_url is not None or self.port == 0:
            return self.public_url
        host = socket.gethostname() if self.host in ("", "0.0.0.0", "::") else self.host  # noqa: S104 - not bound here
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def serves_local_user(self) -> bool:
        """Whether it is reached only from this host and without a token, so that every caller is the local user."""
        return is_loopback(self.host) and self.token is None and self.token_file is None

    @classmethod
    def read(
        cls,
        environment: Mapping[str, str],
        host: str | None = None,
        port: int | None = None,
        home: Path | None = None,
        database_url: str | None = None,
    ) -> "Settings":
        """Return the settings. Arguments win over ``environment``, which wins over defaults. Raises InvalidSettings."""
        flags = {
            "TRAINYARD_HOST": host,
            "TRAINYARD_PORT": port,
            "TRAINYARD_HOME": home,
            "TRAINYARD_DATABASE_URL": database_url,
        }
        given = {name: value for name, value in flags.items() if value not in (None, "")}
        settings = cls.from_environment(environment, slurm=environment, **given)
        settings.require_safe()
        return settings

    def require_safe(self, address: str | None = None) -> None:
        """Raise InvalidSettings if other hosts could use the service without a token.

        ``address``: the address that was bound, if known. A host name alone proves nothing.
        """
        if self.token is not None or self.token_file is not None:
            return
        if self.proxies.networks:
            raise InvalidSettings(
                "refusing to serve others through a proxy without a token: set TRAINYARD_TOKEN or TRAINYARD_TOKEN_FILE"
            )
        if not is_loopback(self.host) or not is_loopback(address or self.host):
            raise InvalidSettings(
                "refusing to listen on an address that others can reach without a token: "
                "set TRAINYARD_TOKEN or TRAINYARD_TOKEN_FILE, or listen on 127.0.0.1"
            )

    def require_own_database(self) -> None:
        """Raise InvalidSettings if release 0.1 put the database elsewhere, because of a ``?`` in the home's path."""
        if self.database_url != sqlite_url(self.home / DATABASE_FILE) or (self.home / DATABASE_FILE).exists():
            return
        before = Path(make_url(f"sqlite:///{self.home}/{DATABASE_FILE}").database or "")
        if before != self.home / DATABASE_FILE and before.is_file():
            raise InvalidSettings(
                f"release 0.1 kept the database of this home in {before}: stop every service that uses it, and move it "
                f"to {self.home / DATABASE_FILE}, or name it with --database-url"
            )

    @property
    def database_file(self) -> Path | None:
        """The file of a SQLite database; None for another one."""
        url = make_url(self.database_url)
        return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None

    def secrets(self) -> list[str]:
        """Return the strings that the log must not contain: the current tokens and the database password."""
        listed = parse_tokens(self.token_file) if self.token_file is not None else []
        url = make_url(self.database_url)
        return [str(secret) for secret in (self.token, *listed, url.password, url.query.get("password")) if secret]

    @property
    def readable_roots(self) -> tuple[Path, ...]:
        """Directories below which jobs may read."""
        return (*self.data_roots, self.home)

    @property
    def writable_roots(self) -> tuple[Path, ...]:
        """Directories below which jobs may write."""
        return (*self.save_roots, self.home)

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def trash(self) -> Path:
        """Records of pending deletions, see `service.jobs.deletion`."""
        return self.home / "trash"

    @property
    def service_file(self) -> Path:
        """Tells agents the URL of the running service."""
        return self.home / "service.json"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
