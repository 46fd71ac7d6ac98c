"""Several launchers in one service: each attempt is its own launcher's, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainyard.contract.messages import RunSettings
from trainyard.service.launch.base import (
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    Launcher,
    LaunchRefused,
)


class LauncherRouter:
    """Passes each call on to the launcher that the attempt names."""

    def __init__(self, launchers: Mapping[str, Launcher]) -> None:
        self._launchers = launchers

    def start(self, launch: Launch) -> None:
        """Raises LaunchRefused also where the service was set up without the attempt's launcher."""
        launcher = self._launchers.get(launch.name.launcher)
        if launcher is None:
            raise LaunchRefused(f"this service has no launcher called {launch.name.launcher}")
        launcher.start(launch)

    def find(self, name: AttemptRef) -> AttemptStatus:
        """Nothing is known of an attempt whose launcher this service does not have."""
        launcher = self._launchers.get(name.launcher)
        return launcher.find(name) if launcher is not None else AttemptStatus(AttemptState.UNKNOWN)

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        """Each launcher looks for its own."""
        found: set[AttemptRef] = set()
        for key, launcher in self._launchers.items():
            found |= launcher.find_alive([name for name in names if name.launcher == key])
        return found

    def stop(self, name: AttemptRef) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.stop(name)

    def save(self, name: AttemptRef) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.save(name)

    def kill(self, name: AttemptRef) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.kill(name)

    def settle(self, name: AttemptRef, settings: RunSettings) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.settle(name, settings)

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Pass it on."""
        launcher = self._launchers.get(name.launcher)
        return launcher.unacked_lines(name, after_seq, limit) if launcher is not None else []
