"""The service of the demo: a process with its own folder and a free port."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from trainyard.client.api import Client
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import TrainyardError
from trainyard.contract.rundir import read_json

STALL_SECONDS = 60.0
"""The service counts as hung if it uses no processor time for this long while it starts."""

STOP_SECONDS = 60.0


class ServiceFailed(Exception):
    """The demo's service did not become ready. The message says how it ended."""


class DemoService:
    """``python -m trainyard.service`` in a folder. It is ready when `start` returns."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / "service.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> str:
        """Start it, wait until it is ready, and return its URL. Raises ServiceFailed."""
        with self.log.open("ab") as log:
            # A session of its own, so that Ctrl-C reaches only the demo, which then stops the service.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainyard.service"],
                env=environment(os.environ, self.home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.url = self._wait_until_ready(self._process)
        return self.url

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> str:
        # Not a limit for the whole start, which may take long on a busy machine.
        used, used_at = 0, time.monotonic()
        while time.monotonic() < used_at + STALL_SECONDS:
            if process.poll() is not None:
                raise ServiceFailed(f"the service ended with exit code {process.returncode}")
            address = read_json(self.home / "service.json")
            if address and _is_ready(str(address["url"])):
                return str(address["url"])
            if used != (used := _processor_time(process.pid)):
                used_at = time.monotonic()
            time.sleep(0.1)
        raise ServiceFailed(f"the service is not ready, and has done nothing for {STALL_SECONDS:.0f} s")

    def tail(self, lines: int) -> list[str]:
        """Return the last lines of its log, without those of requests that were answered."""
        content = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [line for line in content if " INFO trainyard request " not in line][-lines:]

    def stop(self) -> None:
        """Stop it. Workers that still train are not its children and continue."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def detach(self) -> int:
        """Leave it running after the demo, and return its pid."""
        process, self._process = self._process, None
        return process.pid if process else 0


def environment(inherited: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of the demo's service: without the user's settings, and with a free port."""
    others = {name: value for name, value in inherited.items() if not name.startswith("TRAINYARD_")}
    return others | {"TRAINYARD_HOME": str(home), "TRAINYARD_HOST": "127.0.0.1", "TRAINYARD_PORT": "0"}


def _processor_time(pid: int) -> int:
    """Return the processor time that a process has used, in clock ticks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _is_ready(url: str) -> bool:
    with Client(url, token="", timeout=2.0, retries=RetryPolicy(seconds=0.0)) as trainyard:
        try:
            trainyard.ready()
        except TrainyardError:
            return False
    return True
