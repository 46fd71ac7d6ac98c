"""What a user may change while the run goes on: how often it tells and saves, and how much it keeps.

The agent leaves the wish in the attempt's settings.json. Rank 0 looks at each step, and all ranks take it over at the
same one, with the agreement that is exchanged anyway. None of it changes what is trained.
"""

import faulthandler
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from trainyard.contract.events import SettingsChanged
from trainyard.contract.messages import RunSettings, read_message
from trainyard.contract.spec import JobSpec
from trainyard.worker.distributed import DistributedContext


class StopSignal:
    """Whether this process was asked to stop. Looking costs one stat; only rank 0 looks at the file."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._signalled = False

    @classmethod
    def install_handlers(cls, file: Path | None) -> Self:
        """Also listen to SIGTERM and Ctrl-C, and print all stacks on SIGUSR2: that is how a hang is looked into."""
        wish = cls(file)
        signal.signal(signal.SIGTERM, wish.on_signal)
        signal.signal(signal.SIGINT, wish.on_signal)
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        return wish

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Only remember: the step under way is finished first. A second Ctrl-C does not wait for it."""
        if self._signalled and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self._signalled = True

    def requested(self) -> bool:
        """Whether to stop."""
        return self._signalled or (self._file is not None and self._file.exists())


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
class LiveSettings:
    """Looks for the wish: one stat a step. ``now``: the settings that hold, or were passed on to all ranks."""

    file: Path
    current: RunSettings
    _seen: Stamp | None = field(default=None)

    def poll(self) -> RunSettings | None:
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
        if wished is None or wished == self.current:
            return None
        self.current = wished
        return wished


def settings_changed_event(step: int, before: RunSettings, after: RunSettings) -> SettingsChanged:
    """What is to be said of it."""
    return SettingsChanged(step=step, message=", ".join(_changes(before, after)), **after.model_dump())


def _changes(before: RunSettings, after: RunSettings) -> Iterator[str]:
    for name, value in after.model_dump().items():
        if value != getattr(before, name):
            yield f"{name} is {value:,} and was {getattr(before, name):,}"


@dataclass(frozen=True)
class ControlFlags:
    """What any rank wished, known to all."""

    stop: bool = False
    save: bool = False
    spike: bool = False
    settings: RunSettings | None = None

    def to_ints(self) -> list[int]:
        """For a sum by maximum: one rank alone has other settings, and nobody's are 0."""
        nobody = dict.fromkeys(RunSettings.model_fields, 0)
        settings = self.settings.model_dump() if self.settings is not None else nobody
        return [self.stop, self.save, self.spike, *settings.values()]

    @classmethod
    def from_ints(cls, numbers: list[int]) -> Self:
        """The inverse."""
        stop, save, spike, *settings = numbers
        found = dict(zip(RunSettings.model_fields, settings, strict=True))
        return cls(bool(stop), bool(save), bool(spike), RunSettings(**found) if any(settings) else None)


class ControlSync:
    """Makes one rank's wish everybody's, at no cost: it is summed in the background and read a step later."""

    def __init__(self, ranks: DistributedContext) -> None:
        self._ranks = ranks
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, mine: ControlFlags) -> ControlFlags:
        """Give this step's wishes and take those that were given a step ago. Each rank calls it once a step."""
        if self._ranks.control is None:
            return mine
        agreed = self.finish()
        wishes = torch.tensor(mine.to_ints(), dtype=torch.int64)
        work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True)
        assert work is not None
        self._pending = (work, wishes)
        return agreed

    def finish(self) -> ControlFlags:
        """Take what is still under way, so that nothing is when the ranks part."""
        if self._pending is None:
            return ControlFlags()
        work, wishes = self._pending
        work.wait()
        self._pending = None
        return ControlFlags.from_ints(wishes.tolist())
