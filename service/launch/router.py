"""Several launchers in one service: each attempt is its own launcher's, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainyard.contract.messages import RunSettings
from trainyard.service.launch.base import (
    AttemptName,
    Found,
    Launch,
    Launcher,
    LaunchRefused,
    State,
)


class SideBySide:
    """Passes each call on to the launcher that the attempt names."""

    def __init__(self, launchers: Mapping[str, Launcher]) -> None:
        self._launchers = launchers

    def start(self, launch: Launch) -> None:
        """Raises LaunchRefused also where the service was set up without the attempt's launcher."""
        launcher = self._launchers.get(launch.name.launcher)
        if launcher is None:
            raise LaunchRefused(f"this service has no launcher called {launch.name.launcher}")
        launcher.start(launch)

    def find(self, name: AttemptName) -> Found:
        """Nothing is known of an attempt whose launcher this service does not have."""
        launcher = self._launchers.get(name.launcher)
        return launcher.find(name) if launcher is not None else Found(State.UNKNOWN)

    def alive_among(self, names: Sequence[AttemptName]) -> set[AttemptName]:
        """Each launcher looks for its own."""
        found: set[AttemptName] = set()
        for key, launcher in self._launchers.items():
            found |= launcher.alive_among([name for name in names if name.launcher == key])
        return found

    def stop(self, name: AttemptName) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.stop(name)

    def save(self, name: AttemptName) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.save(name)

    def end(self, name: AttemptName) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.end(name)

    def settle(self, name: AttemptName, settings: RunSettings) -> None:
        """Pass it on."""
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.settle(name, settings)

    def unread(self, name: AttemptName, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Pass it on."""
        launcher = self._launchers.get(name.launcher)
        return launcher.unread(name, after_seq, limit) if launcher is not None else []
