"""A launcher that passes each call to the launcher that the attempt names."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainyard.contract.messages import RunSettings
from trainyard.service.launch.base import AttemptRef, AttemptState, AttemptStatus, Launch, Launcher, LaunchRefused


class LauncherRouter:
    """Routes by ``AttemptRef.launcher``."""

    def __init__(self, launchers: Mapping[str, Launcher]) -> None:
        self._launchers = launchers

    def start(self, launch: Launch) -> None:
        """Start the attempt. Raises LaunchRefused also if the service has no such launcher."""
        launcher = self._launchers.get(launch.name.launcher)
        if launcher is None:
            raise LaunchRefused(f"this service has no launcher called {launch.name.launcher}")
        launcher.start(launch)

    def find(self, name: AttemptRef) -> AttemptStatus:
        launcher = self._launchers.get(name.launcher)
        return launcher.find(name) if launcher is not None else AttemptStatus(AttemptState.UNKNOWN)

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        found: set[AttemptRef] = set()
        for key, launcher in self._launchers.items():
            found |= launcher.find_alive([name for name in names if name.launcher == key])
        return found

    def stop(self, name: AttemptRef) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.stop(name)

    def save(self, name: AttemptRef) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.save(name)

    def kill(self, name: AttemptRef) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.kill(name)

    def write_settings(self, name: AttemptRef, settings: RunSettings) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.write_settings(name, settings)

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        launcher = self._launchers.get(name.launcher)
        return launcher.unacked_lines(name, after_seq, limit) if launcher is not None else []
