"""What a user may change while the run goes on: how often it tells and saves, and how much it keeps.

The agent leaves the wish in the attempt's settings.json. Rank 0 looks at each step, and all ranks take it over at the
same one, with the agreement that is exchanged anyway. None of it changes what is trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainyard.contract.events import SettingsChanged
from trainyard.contract.report import RunSettings, read_message
from trainyard.contract.spec import JobSpec

Stamp = tuple[int, int]


def with_settings(spec: JobSpec, settings: RunSettings) -> JobSpec:
    """The spec with other ones."""
    return spec.model_copy(
        update={
            "reporting": spec.reporting.model_copy(update={"log_interval": settings.log_interval}),
            "checkpoint": spec.checkpoint.model_copy(
                update={"save_interval": settings.save_interval, "keep_last": settings.keep_last}
            ),
        }
    )


@dataclass
class SettingsWish:
    """Looks for the wish: one stat a step. ``now``: the settings that hold, or were passed on to all ranks."""

    file: Path
    now: RunSettings
    _seen: Stamp | None = field(default=None)

    def news(self) -> RunSettings | None:
        """Other settings than those that hold, once."""
        try:
            found = self.file.stat()
        except OSError:
            return None
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp == self._seen:
            return None
        self._seen = stamp
        wished = read_message(RunSettings, self.file)
        if wished is None or wished == self.now:
            return None
        self.now = wished
        return wished


def changed(step: int, before: RunSettings, after: RunSettings) -> SettingsChanged:
    """What is to be said of it."""
    return SettingsChanged(step=step, message=", ".join(_words(before, after)), **after.model_dump())


def _words(before: RunSettings, after: RunSettings) -> Iterator[str]:
    for name, value in after.model_dump().items():
        if value != getattr(before, name):
            yield f"{name} is {value:,} and was {getattr(before, name):,}"
