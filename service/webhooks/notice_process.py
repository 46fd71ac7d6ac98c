"""Check and send notices by Apprise: `python -m trainyard.service.webhooks.notice_process`.

Apprise offers no deadline for a whole delivery and no control over its connections. In a process of its own, an audit
hook sees every connection that any of its plugins makes, after the name is resolved, so redirects and DNS rebinding
lead nowhere else. The hook also keeps plugins from reading files, writing files and starting programs: some take the
path of a template or a key from the URL.

Loading the plugins takes a second, so the process stays, and each request is answered by a fork of it. A request is a
line of JSON, ``{id, url, networks}`` to check a URL, with ``{notice, seconds}`` to send. The answer is a line as well.
"""

import base64
import contextlib
import ipaddress
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import apprise
import certifi
import requests
from apprise.manager_plugins import NotificationManager

from trainyard.contract.parsing import nearest
from trainyard.service.notice_urls import HIDDEN
from trainyard.service.ssrf import AddressNotAllowed, Network, host_error, resolve_allowed
from trainyard.service.webhooks.http_client import MAX_SNIPPET_BYTES, printable, retry_after

MAX_MEMORY = 1 << 30
"""Bytes of address space, against an endless response: Apprise reads responses whole."""

CONNECTIONS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
PROGRAMS = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"})
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
READABLE = tuple(
    str(Path(path).resolve())
    for path in (
        sys.prefix,
        sys.base_prefix,
        apprise.__path__[0],
        Path(certifi.where()).parent,
        "/usr/share",
        "/usr/lib",
    )
)
MIN_MASKED = 3
"""Shorter parts of a URL are not masked: they would match ordinary text."""

ASSET = apprise.AppriseAsset(
    async_mode=False,
    allow_templates=False,
    app_id="Trainyard",
    app_desc="Trainyard",
    app_url="",
    http_redirects=False,
    pem_autogen=False,
    pgp_autogen=False,
    storage_mode=apprise.PersistentStoreMode.MEMORY,
)


class Guard:
    """The audit hook: no connection until `allow` is called, and never a program or a file of the host."""

    def __init__(self) -> None:
        self._networks: Sequence[Network] | None = ()
        self._may_connect = False
        self.refusal: str | None = None

    def allow(self, networks: Sequence[Network] | None) -> None:
        """Allow connections to public addresses and to ``networks``, or to every address if that is None."""
        self._networks, self._may_connect = networks, True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CONNECTIONS:
            self._check_address(arguments[1])
        elif event == "open":
            self._check_file(*arguments)
        elif event in PROGRAMS:
            raise PermissionError("a notice may not start a program")

    def _check_address(self, address: object) -> None:
        if not self._may_connect:
            raise PermissionError("the check of a URL may not connect")
        if self._networks is None:
            return
        try:
            host = str(address[0]) if isinstance(address, tuple) else ""
            resolve_allowed([str(ipaddress.ip_address(host.partition("%")[0]))], self._networks)
        except (AddressNotAllowed, ValueError) as error:
            reason = error if isinstance(error, AddressNotAllowed) else "leads to no address of the internet"
            self.refusal = str(reason)
            raise PermissionError(self.refusal) from None

    def _check_file(self, path: object, mode: str | None, flags: int) -> None:
        if isinstance(path, int):
            return
        name = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        writes = flags & WRITE_FLAGS if mode is None else set(mode) & set("wax+")
        if writes or not any(name.startswith(f"{prefix}{os.sep}") for prefix in READABLE):
            raise PermissionError("a notice may not open a file")


class Exchanges:
    """Keeps the last response and the last error of `requests`, and Apprise's last warning."""

    def __init__(self) -> None:
        self.response: requests.Response | None = None
        self.error: Exception | None = None
        self.warning: str | None = None

    def record(self) -> None:
        """Start to record. Redirects are not followed from now on, whatever the URL says."""
        transport: Any = requests.adapters.HTTPAdapter
        session: Any = requests.Session
        send = transport.send

        def recorded(adapter: requests.adapters.HTTPAdapter, *arguments: Any, **options: Any) -> requests.Response:
            self.response = self.error = None
            try:
                self.response = send(adapter, *arguments, **options)
            except Exception as error:
                self.error = error
                raise
            return self.response

        transport.send = recorded
        session.get_redirect_target = lambda _session, _response: None
        logger = logging.getLogger("apprise")
        logger.setLevel(logging.WARNING)
        logger.addFilter(self._keep)

    def reason(self) -> str | None:
        """Return why nothing was accepted, or None if that is not known."""
        if self.response is not None and 300 <= self.response.status_code < 400:
            return "redirects are not followed"
        if isinstance(self.error, requests.Timeout):
            return "no answer in time"
        if isinstance(self.error, requests.exceptions.SSLError):
            return "its certificate is not accepted"
        if self.error is not None:
            return _cause(self.error)
        return None

    def _keep(self, line: logging.LogRecord) -> bool:
        self.warning = line.getMessage()
        return False


def main() -> int:
    """Answer requests until stdin is closed."""
    _kinds()  # loads all plugins
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes forks that ended
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a plugin that prints must not write among the answers
    for line in sys.stdin.buffer:
        if os.fork() == 0:
            _answer(json.loads(line), answers)
    return 0


def _answer(request: Mapping[str, Any], answers: int) -> None:
    # In a fork: ends the process.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    networks = [ipaddress.ip_network(text) for text in request["networks"]]

    def answer(result: Mapping[str, Any]) -> None:
        # Shorter than PIPE_BUF, so that lines of several forks do not mix.
        os.write(answers, json.dumps({"id": request["id"], **result}, ensure_ascii=False).encode() + b"\n")
        os._exit(0)

    guard = Guard()
    try:
        plugin, error = _plugin(request["url"], networks, guard)
        if "notice" not in request:
            answer({"error": error})
        elif plugin is None:
            answer({"status": None, "error": error, "seconds": 0.0, "succeeded": False})
        else:
            guard.allow(None if _is_mail(plugin) else networks)
            answer(_send(plugin, request, guard, answer))
    except Exception as error:
        reason = f"Apprise failed: {type(error).__name__}"
        failed = {"status": None, "seconds": 0.0, "succeeded": False} if "notice" in request else {}
        answer({"error": reason, **failed})
    finally:
        os._exit(1)


def _kinds() -> list[str]:
    manager: Any = NotificationManager
    return sorted(manager().schemas())


def _plugin(url: str, networks: Sequence[Network], guard: Guard) -> tuple[apprise.NotifyBase | None, str | None]:
    """Return (plugin, None), or (None, what is wrong with the URL). ``guard`` is installed."""
    kind, kinds = url.partition("://")[0].lower(), _kinds()
    sys.addaudithook(guard)
    if kind not in kinds:
        near = nearest(kind, tuple(kinds))
        meant = f"did you mean {near}://?" if near is not None else "https://appriseit.com/services/ lists them"
        return None, f"is neither an http or https URL nor of one of Apprise's kinds; {meant}"
    plugin = apprise.Apprise.instantiate(url, asset=ASSET, suppress_exceptions=True)
    if not isinstance(plugin, apprise.NotifyBase):
        return None, f"is no complete {kind}:// URL; see https://appriseit.com/services/"
    if not (_is_mail(plugin) or _uses_http(plugin)):
        return None, f"{kind}:// sends neither by HTTP nor by mail, and only these two are supported"
    templates: Sequence[str] = plugin.templates
    if not _is_mail(plugin) and any("{host}" in template for template in templates):
        error = host_error((plugin.host or "").strip("[]"), networks)
        return (None, error) if error is not None else (plugin, None)
    return plugin, None


def _cause(error: BaseException) -> str:
    # The innermost reason, without the addresses and the objects that requests puts into its own message.
    causes = [error]
    while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None and inner not in causes:
        causes.append(inner)
    if any(isinstance(cause, socket.gaierror | UnicodeError) for cause in causes):
        return "its name cannot be resolved"
    texts = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    return texts[-1] if texts else type(error).__name__


def _is_mail(plugin: apprise.NotifyBase) -> bool:
    return type(plugin).__module__.startswith("apprise.plugins.email.")


def _uses_http(plugin: apprise.NotifyBase) -> bool:
    modules = [base.__module__ for base in type(plugin).__mro__]
    return any(hasattr(sys.modules[name], "requests") for name in modules if name.startswith("apprise.plugins."))


def _send(
    plugin: apprise.NotifyBase, request: Mapping[str, Any], guard: Guard, answer: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Send the notice and return the result; after the deadline ``answer`` is called instead."""
    seconds, notice, exchanges, mask = request["seconds"], request["notice"], Exchanges(), Mask(request["url"])
    begin = time.monotonic()

    def expire() -> None:
        late = f"no answer within {seconds:g} s"
        answer({"status": None, "error": late, "seconds": time.monotonic() - begin, "succeeded": False})

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    exchanges.record()
    if _is_mail(plugin):
        plugin.notify_format = apprise.NotifyFormat.TEXT  # HTML is its default
    try:
        succeeded = plugin.notify(
            title=notice["title"],
            body=notice["body"],
            notify_type=apprise.NotifyType(notice["level"]),
            body_format=apprise.NotifyFormat.TEXT,
        )
    except Exception as error:
        succeeded, exchanges.error = False, exchanges.error or error
    response = exchanges.response
    reason = guard.refusal or exchanges.reason() or mask(exchanges.warning or "Apprise could not send it")
    return {
        "status": response.status_code if response is not None else None,
        "error": None if succeeded else reason[:MAX_SNIPPET_BYTES],
        "seconds": time.monotonic() - begin,
        "snippet": mask(printable(response.content[:MAX_SNIPPET_BYTES])) if response is not None else None,
        "retry_after": retry_after(response.headers.get("retry-after")) if response is not None else None,
        "succeeded": bool(succeeded),
    }


class Mask:
    """Replaces every part of a URL in a text: keys, topics, hosts, addresses, and the login as HTTP encodes it."""

    def __init__(self, url: str) -> None:
        rest = url.partition("://")[2]
        parts = {part for piece in re.split(r"[/:@?&=#,;]", rest) for part in (piece, unquote(piece), quote(piece, ""))}
        user = rest.rpartition("@")[0]
        for login in (user, unquote(user)):
            parts.add(base64.b64encode(login.encode()).decode())
        known = sorted((part for part in parts if len(part) >= MIN_MASKED), key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known)) or "(?!)", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        return self._known.sub(HIDDEN, text)


if __name__ == "__main__":
    sys.exit(main())
